"""Types whose values are a whole number times a step, less a minimum: Q5_K, Q4_K, Q2_K, Q5_1, Q4_1.

Legend: as in `block_type`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.model.disk.encodings.ggml.bits import in_groups, pack_bits, unpack_bits
from coterie.model.disk.encodings.ggml.block_type import Codes, Scales, as_half, half_bytes, halves, no_factors, ratio

#: How many steps more than there are between the first and the last code the range of weights is tried at.
_STEPS_MORE = (-0.6, -0.3, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3)

#: Shares of the largest factor that the largest step, and the largest minimum, are tried at.
_FACTOR_SHARES = (0.9, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Affine:
    """A type of this kind; see `block_type.BlockType` for what it does.

    Attributes:
        bits: of a code.
        largest_factor: of steps and of minima; 1 for a block without sub-blocks, whose minimum has either sign.
        to_bytes: (factors, factors of minima, codes) as bytes, the two scales left out.
        from_bytes: those bytes as the three.
        scales_first: whether the two scales lie before the rest.
    """

    name: str
    block: int
    sub_block: int
    bits: int
    largest_factor: int
    to_bytes: Callable[[Tensor, Tensor, Tensor], Tensor]
    from_bytes: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    scales_first: bool = True
    together: int = 1

    @property
    def numbers_at(self) -> slice:
        """Where scale and minimum lie in a block's bytes."""
        return slice(0, 4) if self.scales_first else slice(-4, None)

    @property
    def _free(self) -> bool:
        return self.largest_factor == 1

    def nearest(self, weight: Tensor, step: Tensor, minimum: Tensor) -> Tensor:
        """Return the nearest codes, float32; steps and minima broadcast."""
        return ratio(weight + minimum, step).round().clamp(0, 2**self.bits - 1)

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Search steps and minima of sub-blocks, then the two scales that they are multiples of."""
        weight_NRSs = in_groups(weight_NRB, self.sub_block)
        importance_NRSs = in_groups(importance_NRB.expand_as(weight_NRB), self.sub_block)
        step_NRS, minimum_NRS = self._search(weight_NRSs, importance_NRSs)
        if self._free:
            one_NRS = torch.ones_like(step_NRS)
            return Scales(
                scale_NR=as_half(step_NRS.squeeze(-1)), factor_NRS=one_NRS,
                minimum_NR=as_half(minimum_NRS.squeeze(-1)), minimum_factor_NRS=one_NRS,
            )  # fmt: skip
        best: Scales | None = None
        least_NR = torch.full_like(step_NRS[..., 0], torch.inf)
        for share in _FACTOR_SHARES:
            for minimum_share in _FACTOR_SHARES:
                scale_NR = as_half(step_NRS.amax(dim=-1) / (self.largest_factor * share))
                low_NR = as_half(minimum_NRS.amax(dim=-1) / (self.largest_factor * minimum_share))
                first = Scales(
                    scale_NR=scale_NR, factor_NRS=self._factors(step_NRS, scale_NR),
                    minimum_NR=low_NR, minimum_factor_NRS=self._factors(minimum_NRS, low_NR),
                )  # fmt: skip
                for scales in (first, self._refit(first, weight_NRSs, importance_NRSs)):
                    error_NR = self._error(scales, weight_NRSs, importance_NRSs)
                    better_NR = error_NR < least_NR
                    least_NR = torch.where(better_NR, error_NR, least_NR)
                    best = scales.where(better_NR, best)
        assert best is not None
        return best

    def _search(self, weight_NRSs: Tensor, importance_NRSs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the steps and minima (N, R, S) of sub-blocks as free numbers."""
        low_NRS, high_NRS = weight_NRSs.amin(dim=-1), weight_NRSs.amax(dim=-1)
        if not self._free:  # a minimum is not below zero
            low_NRS = low_NRS.clamp(max=0)
        largest = 2**self.bits - 1
        least_NRS = torch.full_like(low_NRS, torch.inf)
        best_NRS, best_minimum_NRS = torch.zeros_like(low_NRS), -low_NRS
        total_NRS = importance_NRSs.sum(-1)
        weighted_NRS = (importance_NRSs * weight_NRSs).sum(-1)
        for more in _STEPS_MORE:
            step_NRS, minimum_NRS = (high_NRS - low_NRS).clamp(min=0) / (largest + more), -low_NRS
            for _ in range(2):
                code_NRSs = self.nearest(weight_NRSs, step_NRS[..., None], minimum_NRS[..., None])
                first_NRS = (importance_NRSs * code_NRSs).sum(-1)
                second_NRS = (importance_NRSs * code_NRSs.square()).sum(-1)
                mixed_NRS = (importance_NRSs * code_NRSs * weight_NRSs).sum(-1)
                below_NRS = total_NRS * second_NRS - first_NRS.square()
                new_NRS = ratio(total_NRS * mixed_NRS - first_NRS * weighted_NRS, below_NRS)
                new_minimum_NRS = ratio(first_NRS * mixed_NRS - second_NRS * weighted_NRS, below_NRS)
                if not self._free:
                    outside_NRS = new_minimum_NRS < 0
                    new_NRS = torch.where(outside_NRS, ratio(mixed_NRS, second_NRS), new_NRS).clamp(min=0)
                    new_minimum_NRS = torch.where(outside_NRS, 0.0, new_minimum_NRS)
                # Where all codes are one, there is no line through them.
                solvable_NRS = below_NRS > 1e-6 * total_NRS * second_NRS
                step_NRS = torch.where(solvable_NRS, new_NRS, step_NRS)
                minimum_NRS = torch.where(solvable_NRS, new_minimum_NRS, minimum_NRS)
            code_NRSs = self.nearest(weight_NRSs, step_NRS[..., None], minimum_NRS[..., None])
            wrong_NRSs = weight_NRSs - code_NRSs * step_NRS[..., None] + minimum_NRS[..., None]
            error_NRS = (importance_NRSs * wrong_NRSs.square()).sum(-1)
            better_NRS = error_NRS < least_NRS
            least_NRS = torch.where(better_NRS, error_NRS, least_NRS)
            best_NRS = torch.where(better_NRS, step_NRS, best_NRS)
            best_minimum_NRS = torch.where(better_NRS, minimum_NRS, best_minimum_NRS)
        return best_NRS, best_minimum_NRS

    def _factors(self, value_NRS: Tensor, scale_NR: Tensor) -> Tensor:
        return ratio(value_NRS, scale_NR[..., None]).round().clamp(0, self.largest_factor)

    def _refit(self, scales: Scales, weight_NRSs: Tensor, importance_NRSs: Tensor) -> Scales:
        """Return scales with the best two numbers for the codes that follow from given ones."""
        step_NRS, minimum_NRS = self.steps(scales)
        assert scales.minimum_factor_NRS is not None
        code_NRSs = self.nearest(weight_NRSs, step_NRS[..., None], minimum_NRS[..., None])
        unit_NRSs = code_NRSs * scales.factor_NRS[..., None]
        low_NRSs = -scales.minimum_factor_NRS[..., None].expand_as(unit_NRSs)

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (importance_NRSs * a * b).sum(dim=(-2, -1))

        uu, ul, ll = dot(unit_NRSs, unit_NRSs), dot(unit_NRSs, low_NRSs), dot(low_NRSs, low_NRSs)
        uw, lw = dot(unit_NRSs, weight_NRSs), dot(low_NRSs, weight_NRSs)
        below = uu * ll - ul.square()
        # Without minima, or where all lies on one line, only one number can be solved for.
        solvable = below > 1e-6 * uu * ll
        scale_NR = torch.where(solvable, ratio(ll * uw - ul * lw, below), ratio(uw, uu))
        low_NR = torch.where(solvable, ratio(uu * lw - ul * uw, below), 0.0)
        usable = (scale_NR > 0) & (low_NR >= 0) & (solvable | (ll == 0))
        assert scales.minimum_NR is not None
        return Scales(
            scale_NR=torch.where(usable, as_half(scale_NR), scales.scale_NR), factor_NRS=scales.factor_NRS,
            minimum_NR=torch.where(usable, as_half(low_NR), scales.minimum_NR),
            minimum_factor_NRS=scales.minimum_factor_NRS,
        )  # fmt: skip

    def _error(self, scales: Scales, weight_NRSs: Tensor, importance_NRSs: Tensor) -> Tensor:
        step_NRS, minimum_NRS = self.steps(scales)
        code_NRSs = self.nearest(weight_NRSs, step_NRS[..., None], minimum_NRS[..., None])
        wrong_NRSs = weight_NRSs - code_NRSs * step_NRS[..., None] + minimum_NRS[..., None]
        return (importance_NRSs * wrong_NRSs.square()).sum(dim=(-2, -1))

    def steps(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """Return the steps and the minima (N, R, S) of sub-blocks."""
        assert scales.minimum_NR is not None
        assert scales.minimum_factor_NRS is not None
        return (
            scales.scale_NR[..., None] * scales.factor_NRS,
            scales.minimum_NR[..., None] * scales.minimum_factor_NRS,
        )

    def choose(self, weight_NRv: Tensor, scales: Scales, column: int, metric_Nvv: Tensor) -> tuple[Codes, Tensor]:
        """Choose the nearest codes of columns of one sub-block."""
        step_NR1, minimum_NR1 = self.steps(scales.at(column // self.sub_block))
        code_NRv = self.nearest(weight_NRv, step_NR1, minimum_NR1)
        return Codes(code_NRc=code_NRv.to(torch.int16)), code_NRv * step_NR1 - minimum_NR1

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes of a block."""
        assert scales.minimum_NR is not None
        assert scales.minimum_factor_NRS is not None
        # Types without sub-blocks add their minimum, the others take it off.
        minimum_NR = -scales.minimum_NR if self._free else scales.minimum_NR
        numbers = torch.cat((half_bytes(scales.scale_NR), half_bytes(minimum_NR)), dim=-1)
        rest = self.to_bytes(scales.factor_NRS, scales.minimum_factor_NRS, codes.code_NRc)
        return torch.cat((numbers, rest) if self.scales_first else (rest, numbers), dim=-1)

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of blocks."""
        if self.scales_first:
            numbers, rest = byte_NRK[..., :4], byte_NRK[..., 4:]
        else:
            numbers, rest = byte_NRK[..., -4:], byte_NRK[..., :-4]
        factor_NRS, minimum_factor_NRS, code_NRB = self.from_bytes(rest)
        step_NRS = halves(numbers[..., :2])[..., None] * factor_NRS
        minimum_NRS = halves(numbers[..., 2:])[..., None] * minimum_factor_NRS * (-1 if self._free else 1)
        code_NRSs = in_groups(code_NRB.to(torch.float32), self.sub_block)
        return (code_NRSs * step_NRS[..., None] - minimum_NRS[..., None]).flatten(-2)


def _q4_1_to(factor_NRS: Tensor, minimum_factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    return pack_bits(code_NRB, 4, 16)


def _q4_1_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return no_factors(byte_NRK), no_factors(byte_NRK), unpack_bits(byte_NRK, 4, 16)


def _q5_1_to(factor_NRS: Tensor, minimum_factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    return torch.cat((pack_bits(code_NRB >> 4, 1, 1), pack_bits(code_NRB & 15, 4, 16)), dim=-1)


def _q5_1_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    code = unpack_bits(byte_NRK[..., 4:], 4, 16) | unpack_bits(byte_NRK[..., :4], 1, 1) << 4
    return no_factors(byte_NRK), no_factors(byte_NRK), code


def _q2_k_to(factor_NRS: Tensor, minimum_factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    factors = factor_NRS.to(torch.uint8) | minimum_factor_NRS.to(torch.uint8) << 4
    return torch.cat((factors, pack_bits(code_NRB, 2, 32)), dim=-1)


def _q2_k_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    factors, codes = torch.split(byte_NRK, [16, 64], dim=-1)
    return (factors & 15).to(torch.float32), (factors >> 4).to(torch.float32), unpack_bits(codes, 2, 32)


def _factor_bytes(factor_NRS: Tensor, minimum_factor_NRS: Tensor) -> Tensor:
    """Return 8 factors and 8 factors of minima, 6 bits each, as 12 bytes.

    Those of the first four sub-blocks fill the low bits of bytes 0 to 7, whose upper two bits are the upper ones of
    the last four; bytes 8 to 11 hold the low four bits of those.
    """
    factor, minimum = factor_NRS.to(torch.uint8), minimum_factor_NRS.to(torch.uint8)
    first = factor[..., :4] | factor[..., 4:] >> 4 << 6
    second = minimum[..., :4] | minimum[..., 4:] >> 4 << 6
    return torch.cat((first, second, factor[..., 4:] & 15 | (minimum[..., 4:] & 15) << 4), dim=-1)


def _factors_of(byte_NRK: Tensor) -> tuple[Tensor, Tensor]:
    first, second, low = torch.split(byte_NRK, [4, 4, 4], dim=-1)
    factor = torch.cat((first & 63, low & 15 | first >> 6 << 4), dim=-1)
    minimum = torch.cat((second & 63, low >> 4 | second >> 6 << 4), dim=-1)
    return factor.to(torch.float32), minimum.to(torch.float32)


def _q4_k_to(factor_NRS: Tensor, minimum_factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    return torch.cat((_factor_bytes(factor_NRS, minimum_factor_NRS), pack_bits(code_NRB, 4, 32)), dim=-1)


def _q4_k_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *_factors_of(byte_NRK[..., :12]), unpack_bits(byte_NRK[..., 12:], 4, 32)


def _q5_k_to(factor_NRS: Tensor, minimum_factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    codes = torch.cat((pack_bits(code_NRB >> 4, 1, 32), pack_bits(code_NRB & 15, 4, 32)), dim=-1)
    return torch.cat((_factor_bytes(factor_NRS, minimum_factor_NRS), codes), dim=-1)


def _q5_k_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    factors, high, low = torch.split(byte_NRK, [12, 32, 128], dim=-1)
    return *_factors_of(factors), unpack_bits(low, 4, 32) | unpack_bits(high, 1, 32) << 4


TYPES = {
    "Q5_K": Affine(
        name="Q5_K", block=256, sub_block=32, bits=5, largest_factor=63, to_bytes=_q5_k_to, from_bytes=_q5_k_from
    ),
    "Q4_K": Affine(
        name="Q4_K", block=256, sub_block=32, bits=4, largest_factor=63, to_bytes=_q4_k_to, from_bytes=_q4_k_from
    ),
    "Q2_K": Affine(
        name="Q2_K", block=256, sub_block=16, bits=2, largest_factor=15, to_bytes=_q2_k_to, from_bytes=_q2_k_from,
        scales_first=False,
    ),
    "Q5_1": Affine(
        name="Q5_1", block=32, sub_block=32, bits=5, largest_factor=1, to_bytes=_q5_1_to, from_bytes=_q5_1_from
    ),
    "Q4_1": Affine(
        name="Q4_1", block=32, sub_block=32, bits=4, largest_factor=1, to_bytes=_q4_1_to, from_bytes=_q4_1_from
    ),
}  # fmt: skip
