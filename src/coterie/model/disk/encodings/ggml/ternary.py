"""Types whose values are -1, 0 or 1 times the scale of their block: TQ2_0 and TQ1_0.

The best scale is found, not searched for: at any scale s the numbers that become -1 or 1 are those above s / 2 in
magnitude, so they are the largest k of a block, and for given k the scale has a closed form. Legend: as in
`block_type`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.model.disk.encodings.ggml.bits import in_groups, pack_bits, unpack_bits
from coterie.model.disk.encodings.ggml.block_type import Scales, as_half, halves, no_factors, ratio
from coterie.model.disk.encodings.ggml.scaled import Scaled

#: Runs of TQ1_0: (bytes, numbers in each). A byte holds base-3 digits, the first number the highest one.
_RUNS = ((32, 5), (16, 5), (4, 4))


class Ternary(Scaled):
    """A type of this kind; see `block_type.BlockType` for what it does.

    All columns of a block share a step; they count as sub-blocks of 32, as many as rows are a multiple of.
    """

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Return the scales at which the error of nearest codes, weighted by importance, is least."""
        scale_NR = as_half(best_scale(weight_NRB, importance_NRB.expand_as(weight_NRB)))
        factor_NRS = torch.ones_like(scale_NR[..., None]).expand(*scale_NR.shape, self.block // self.sub_block)
        return Scales(scale_NR=scale_NR, factor_NRS=factor_NRS)

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of blocks; the fourth code of TQ2_0, which nobody writes, is read as 2 like in GGML."""
        _, code_NRB = self.from_bytes(byte_NRK[..., :-2])
        return (code_NRB.to(torch.float32) - 1) * halves(byte_NRK[..., -2:])[..., None]


def best_scale(weight_C: Tensor, importance_C: Tensor) -> Tensor:
    """Return the scale (...) at which -1, 0 or 1 times it is nearest to numbers (..., C), weighted by importance.

    With the k largest magnitudes coded as -1 or 1 the best scale is s = sum(d |w|) / sum(d) over these, d their
    importance, and takes sum(d |w|)^2 / sum(d) off the error of zeros; the k that takes most is taken.
    """
    magnitude_C, order_C = weight_C.abs().sort(dim=-1, descending=True)
    weighing_C = importance_C.gather(-1, order_C)
    above_C, below_C = (weighing_C * magnitude_C).cumsum(dim=-1), weighing_C.cumsum(dim=-1)
    scale_C = ratio(above_C, below_C)
    return scale_C.gather(-1, (above_C * scale_C).argmax(dim=-1, keepdim=True)).squeeze(-1)


def _tq2_0_to(factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    return pack_bits(code_NRB, 2, 32)


def _tq2_0_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor]:
    return no_factors(byte_NRK), unpack_bits(byte_NRK, 2, 32)


def _tq1_0_to(factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    power_51 = 3 ** torch.arange(4, -1, -1, device=code_NRB.device)[:, None]
    parts = torch.split(code_NRB.to(torch.int64), [size * count for size, count in _RUNS], dim=-1)
    numbers = [
        (in_groups(part, count, size) * power_51[:count]).sum(dim=-2).flatten(-2)
        for part, (size, count) in zip(parts, _RUNS, strict=True)
    ]
    # Kept as a fraction of 256 instead of 243, rounded up: then digits come out by multiplication, the highest first.
    return ((torch.cat(numbers, dim=-1) * 256 + 242) // 243).to(torch.uint8)


def _tq1_0_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor]:
    power_51 = 3 ** torch.arange(5, device=byte_NRK.device)[:, None]
    parts = torch.split(byte_NRK.to(torch.int64), [size for size, _ in _RUNS], dim=-1)
    digits = [
        ((part.unsqueeze(-2) * power_51[:count] & 255) * 3 >> 8).flatten(-2)
        for part, (_, count) in zip(parts, _RUNS, strict=True)
    ]
    return no_factors(byte_NRK), torch.cat(digits, dim=-1)


TYPES = {
    "TQ2_0": Ternary(
        name="TQ2_0", block=256, sub_block=32, levels=(-1, 0, 1), factors=(1, 1), to_bytes=_tq2_0_to,
        from_bytes=_tq2_0_from, scale_first=False,
    ),
    "TQ1_0": Ternary(
        name="TQ1_0", block=256, sub_block=32, levels=(-1, 0, 1), factors=(1, 1), to_bytes=_tq1_0_to,
        from_bytes=_tq1_0_from, scale_first=False,
    ),
}  # fmt: skip
