"""Integers of 4 or 8 bits with one scale for each group of columns of a row, as a type of blocks.

A value is a whole number from -2^(bits-1) to 2^(bits-1) - 1 times the scale of its group; compressed-tensors calls that
"pack-quantized", symmetric (0.20, ``compressors/pack_quantized``). While codes are chosen the scale and the numbers of
a group lie side by side; `as_stored` pulls them apart into the tensors that are written.

Scales are bfloat16, as loaders compute with them, and above 0: not all kernels are known to take others.

Legend: as in `coterie.model.disk.encodings.ggml.block_type`; G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.model.disk.encodings.ggml.bits import in_groups, pack_bits, unpack_bits
from coterie.model.disk.encodings.ggml.block_type import Codes, Scales, ratio
from coterie.model.disk.encodings.integer_types import INTEGERS, SCALE_BYTES

#: By the bits of a number, the scales that are tried, in shares of that at which the largest weight of a group is the
#: largest level; below 1 it is clipped. With 256 levels there is little to win: some 5 % of the error.
_SHARES = {4: (0.6, 0.68, 0.76, 0.83, 0.88, 0.92, 0.96, 1.0, 1.04, 1.1), 8: (0.97, 1.0, 1.03)}


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegerGroups:
    """A type of this kind; see `coterie.model.disk.encodings.ggml.block_type.BlockType` for what it does.

    Attributes:
        name: like INT4_G128.
        bits: of a number, 4 or 8.
        block: columns of a group.
    """

    name: str
    bits: int
    block: int

    @property
    def sub_block(self) -> int:
        """Columns that share a step: all of a group."""
        return self.block

    @property
    def together(self) -> int:
        """Columns that are coded together: each by itself."""
        return 1

    @property
    def numbers_at(self) -> slice:
        """Nowhere: the scale is no float16."""
        return slice(0, 0)

    @property
    def _half(self) -> int:
        return 1 << (self.bits - 1)

    def _levels(self, weight: Tensor, step: Tensor) -> Tensor:
        return ratio(weight, step).round_().clamp_(-self._half, self._half - 1)

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Search the scale with the smallest error of nearest codes, each weighted by its column's importance."""
        largest_NR = weight_NRB.abs().amax(dim=-1)
        # In shares of the largest, so that squares of very large and very small weights are numbers.
        unit_NRB = ratio(weight_NRB, largest_NR[..., None])
        importance_NRB = importance_NRB.expand_as(weight_NRB)
        # A group of zeros has the scale 1, as `integers.rounded` has it.
        best_NR, least_NR = torch.ones_like(largest_NR), torch.full_like(largest_NR, torch.inf)
        for share in _SHARES[self.bits]:
            step_NR = _as_stored(largest_NR * (share / (self._half - 1)))
            for _ in range(3):
                level_NRB = self._levels(weight_NRB, step_NR[..., None])
                wrong_NRB = unit_NRB - level_NRB * ratio(step_NR, largest_NR)[..., None]
                error_NR = (importance_NRB * wrong_NRB.square()).sum(-1)
                better_NR = (error_NR < least_NR) & (step_NR > 0)
                least_NR = torch.where(better_NR, error_NR, least_NR)
                best_NR = torch.where(better_NR, step_NR, best_NR)
                weighted_NRB = importance_NRB * level_NRB
                refit_NR = ratio((weighted_NRB * unit_NRB).sum(-1), (weighted_NRB * level_NRB).sum(-1)) * largest_NR
                step_NR = torch.where(refit_NR > 0, _as_stored(refit_NR), step_NR)
        return Scales(scale_NR=best_NR, factor_NRS=torch.ones_like(best_NR)[..., None])

    def choose(self, weight_NRv: Tensor, scales: Scales, column: int, metric_Nvv: Tensor) -> tuple[Codes, Tensor]:
        """Choose the nearest codes."""
        level_NRv = self._levels(weight_NRv, scales.scale_NR[..., None])
        return Codes(code_NRc=(level_NRv + self._half).to(torch.int16)), level_NRv * scales.scale_NR[..., None]

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes of a group: its scale, then its numbers in words, half of their range added."""
        scale_NR2 = scales.scale_NR.to(torch.bfloat16).unsqueeze(-1).contiguous().view(torch.uint8)
        code_NRB = codes.code_NRc.to(torch.uint8)
        return torch.cat((scale_NR2, code_NRB if self.bits == 8 else pack_bits(code_NRB, self.bits, 1)), dim=-1)

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of groups."""
        scale_NR1 = byte_NRK[..., :SCALE_BYTES].contiguous().view(torch.bfloat16).to(torch.float32)
        number_NRk = byte_NRK[..., SCALE_BYTES:]
        code_NRB = number_NRk if self.bits == 8 else unpack_bits(number_NRk, self.bits, 1)
        return (code_NRB.to(torch.float32) - self._half) * scale_NR1


def _as_stored(scale: Tensor) -> Tensor:
    """Return scales rounded to bfloat16, in float32; those beyond its range are its largest."""
    largest = torch.finfo(torch.bfloat16).max
    return scale.clamp(max=largest).to(torch.bfloat16).to(torch.float32)


def as_stored(byte_RK: Tensor, name: str) -> dict[str, Tensor]:
    """Return what `coterie.model.disk.encodings.integer_types.integer_encoding` stores of a matrix, by suffix.

    Args:
        byte_RK: its groups, one after the other in every row, uint8.
        name: the type.
    """
    bits, group = INTEGERS[name]
    byte_RGK = in_groups(byte_RK, SCALE_BYTES + group * bits // 8)
    rows, groups = byte_RGK.shape[:2]
    return {
        "": byte_RGK[..., SCALE_BYTES:].reshape(rows, -1).contiguous().view(torch.int32),
        "_scale": byte_RGK[..., :SCALE_BYTES].reshape(rows, -1).contiguous().view(torch.bfloat16),
        "_shape": torch.tensor([rows, groups * group]),
    }
