"""Types whose values are a level times a step: Q8_0, Q6_K, Q5_0, Q4_0, Q3_K, IQ4_NL, IQ4_XS, MXFP4.

Levels are whole numbers, evenly spaced or not; the step of a sub-block is a small whole number times the scale of the
block. Legend: as in `block_type`; L levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coterie.model.disk.encodings.ggml.bits import in_groups, pack_bits, pack_words, unpack_bits, unpack_words
from coterie.model.disk.encodings.ggml.block_type import Codes, Scales, as_half, half_bytes, halves, no_factors, ratio

#: Levels of the types that have 16 uneven ones (llama.cpp, ggml-common.h); of MXFP4 twice the E2M1 numbers.
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

#: Shares of the range of levels that the largest weight of a sub-block is tried at, and that of factors.
_SHARES = (0.7, 0.76, 0.82, 0.87, 0.91, 0.95, 0.98, 1.0, 1.03, 1.07, 1.12)
_FACTOR_SHARES = (0.8, 0.87, 0.94, 1.0)

#: Levels so few that what a step is off is no small difference of large numbers.
_FEW_LEVELS = 64


@dataclass(frozen=True, kw_only=True, slots=False)
class Scaled:
    """A type of this kind; see `block_type.BlockType` for what it does.

    Attributes:
        levels: what codes stand for.
        factors: the smallest and the largest factor of a sub-block.
        to_bytes: (factors, codes) as bytes (N, R, K - 2), the scale's place left out.
        from_bytes: those bytes as factors and codes.
        scale_first: whether the scale lies before the rest.
    """

    name: str
    block: int
    sub_block: int
    levels: tuple[int, ...]
    factors: tuple[int, int]
    to_bytes: Callable[[Tensor, Tensor], Tensor]
    from_bytes: Callable[[Tensor], tuple[Tensor, Tensor]]
    scale_first: bool = True
    together: int = 1

    @property
    def numbers_at(self) -> slice:
        """Where the scale lies in a block's bytes."""
        return slice(0, 2) if self.scale_first else slice(-2, None)

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes in the order of their levels, the levels, and the borders between them."""
        level_L = torch.tensor(self.levels, dtype=torch.float32)
        code_L = torch.argsort(level_L, stable=True)
        level_L = level_L[code_L]
        return code_L.to(torch.int16), level_L, (level_L[1:] + level_L[:-1]) / 2

    @cached_property
    def _by_half(self) -> tuple[Tensor, Tensor]:
        """Code and level that are nearest to each interval of a half, from that above the lowest level on."""
        code_L, level_L, border_L = self._order
        middle_I = torch.arange(2 * min(self.levels), 2 * max(self.levels) + 1) / 2 + 0.25
        place_I = torch.bucketize(middle_I, border_L)
        return code_L[place_I], level_L[place_I]

    @cached_property
    def _even(self) -> bool:
        """Whether levels are whole numbers one after the other."""
        return self.levels == tuple(range(self.levels[0], self.levels[-1] + 1))

    def nearest(self, weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and levels nearest to weights in units of steps, which broadcast."""
        if self._even:
            level = self._nearest_even(weight, step)
            return (level - self.levels[0]).to(torch.int16), level
        place = self._half(weight, step)
        return self._looked_up(self._by_half[0], place), self._looked_up(self._by_half[1], place)

    def nearest_levels(self, weight: Tensor, step: Tensor) -> Tensor:
        """Return the levels alone, as searches want them."""
        if self._even:
            return self._nearest_even(weight, step)
        return self._looked_up(self._by_half[1], self._half(weight, step))

    def _nearest_even(self, weight: Tensor, step: Tensor) -> Tensor:
        return ratio(weight, step).round_().clamp_(self.levels[0], self.levels[-1])

    def _half(self, weight: Tensor, step: Tensor) -> Tensor:
        """Return which interval of a half weights lie in: levels are whole numbers, so borders are at halves."""
        low, high = 2 * min(self.levels), 2 * max(self.levels)
        return ratio(weight, step).mul_(2).floor_().clamp_(low, high).sub_(low).to(torch.int32)

    @staticmethod
    def _looked_up(table_I: Tensor, place: Tensor) -> Tensor:
        """Return entries of a table; several times as fast as indexing."""
        return table_I.to(place.device).index_select(0, place.flatten()).view(place.shape)

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Search the steps of sub-blocks, then the scale that they are multiples of."""
        weight_NRSs = in_groups(weight_NRB, self.sub_block)
        importance_NRSs = in_groups(importance_NRB.expand_as(weight_NRB), self.sub_block)
        step_NRS = self._search_steps(weight_NRSs, importance_NRSs)
        best: Scales | None = None
        least_NR = torch.full_like(step_NRS[..., 0], torch.inf)
        largest_NR = step_NRS.gather(-1, step_NRS.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
        for scale_NR in self._scales_to_try(largest_NR):
            for scales in self._scales_near(scale_NR, step_NRS, weight_NRSs, importance_NRSs):
                level_NRSs = self.nearest_levels(weight_NRSs, self.steps(scales)[..., None])
                wrong_NRSs = weight_NRSs - level_NRSs * self.steps(scales)[..., None]
                error_NR = (importance_NRSs * wrong_NRSs.square()).sum(dim=(-2, -1))
                better_NR = error_NR < least_NR
                least_NR = torch.where(better_NR, error_NR, least_NR)
                best = scales.where(better_NR, best)
        assert best is not None
        return best

    def _search_steps(self, weight_NRSs: Tensor, importance_NRSs: Tensor) -> Tensor:
        largest_NRS = weight_NRSs.gather(-1, weight_NRSs.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
        least_NRS = torch.full_like(largest_NRS, torch.inf)
        best_NRS = torch.zeros_like(largest_NRS)
        weighted_NRSs = importance_NRSs * weight_NRSs
        # A negative step turns the longer side of uneven levels towards the largest weight.
        for edge in (min(self.levels), max(self.levels)):
            for share in _SHARES:
                step_NRS = largest_NRS / (edge * share)
                for _ in range(2):
                    level_NRSs = self.nearest_levels(weight_NRSs, step_NRS[..., None])
                    product_NRS = (level_NRSs * weighted_NRSs).sum(-1)
                    step_NRS = ratio(product_NRS, level_NRSs.square().mul_(importance_NRSs).sum(-1))
                if len(self.levels) <= _FEW_LEVELS:  # at the best step for these levels, less what all steps have
                    error_NRS = -product_NRS * step_NRS
                else:
                    wrong_NRSs = weight_NRSs - level_NRSs * step_NRS[..., None]
                    error_NRS = wrong_NRSs.square().mul_(importance_NRSs).sum(-1)
                better_NRS = error_NRS < least_NRS
                least_NRS = torch.where(better_NRS, error_NRS, least_NRS)
                best_NRS = torch.where(better_NRS, step_NRS, best_NRS)
        return best_NRS

    def _scales_to_try(self, largest_NR: Tensor) -> list[Tensor]:
        if self.factors == (1, 1):
            return [largest_NR]
        edges = [float(edge) for edge in self.factors if edge]
        return [largest_NR / (edge * share) for edge in edges for share in _FACTOR_SHARES]

    def _scales_near(
        self, scale_NR: Tensor, step_NRS: Tensor, weight_NRSs: Tensor, importance_NRSs: Tensor
    ) -> list[Scales]:
        """Return scales at a given one, and at that which is best for the codes that follow from it."""
        low, high = self.factors
        scale_NR = as_half(scale_NR)
        factor_NRS = ratio(step_NRS, scale_NR[..., None]).round().clamp(low, high)
        first = Scales(scale_NR=scale_NR, factor_NRS=factor_NRS)
        level_NRSs = self.nearest_levels(weight_NRSs, self.steps(first)[..., None])
        unit_NRSs = level_NRSs * factor_NRS[..., None]
        weighted_NRSs = importance_NRSs * unit_NRSs
        refit_NR = ratio((weighted_NRSs * weight_NRSs).sum((-2, -1)), (weighted_NRSs * unit_NRSs).sum((-2, -1)))
        return [first, Scales(scale_NR=as_half(refit_NR), factor_NRS=factor_NRS)]

    def steps(self, scales: Scales) -> Tensor:
        """Return the steps (N, R, S) of sub-blocks."""
        return scales.scale_NR[..., None] * scales.factor_NRS

    def choose(self, weight_NRv: Tensor, scales: Scales, column: int, metric_Nvv: Tensor) -> tuple[Codes, Tensor]:
        """Choose the nearest codes of columns of one sub-block."""
        step_NR1 = self.steps(scales.at(column // self.sub_block))
        code_NRv, level_NRv = self.nearest(weight_NRv, step_NR1)
        return Codes(code_NRc=code_NRv), level_NRv * step_NR1

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes of a block."""
        parts = (half_bytes(scales.scale_NR), self.to_bytes(scales.factor_NRS, codes.code_NRc))
        return torch.cat(parts if self.scale_first else parts[::-1], dim=-1)

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of blocks."""
        if self.scale_first:
            scale, rest = byte_NRK[..., :2], byte_NRK[..., 2:]
        else:
            scale, rest = byte_NRK[..., -2:], byte_NRK[..., :-2]
        factor_NRS, code_NRB = self.from_bytes(rest)
        level_L = torch.tensor(self.levels, dtype=torch.float32, device=byte_NRK.device)
        step_NRS = halves(scale)[..., None] * factor_NRS
        return (in_groups(level_L[code_NRB.long()], self.sub_block) * step_NRS[..., None]).flatten(-2)


class PowerOfTwo(Scaled):
    """MXFP4: the scale is a power of two, kept as its exponent in one byte (OCP Microscaling Formats 1.0)."""

    @property
    def numbers_at(self) -> slice:
        """Nowhere: an exponent is no number that values are linear in."""
        return slice(0, 0)

    def _scales_to_try(self, largest_NR: Tensor) -> list[Tensor]:
        exponent_NR = torch.floor(torch.log2(largest_NR.abs().clamp(min=2.0**-126)))
        return [torch.exp2((exponent_NR + more).clamp(-126, 126)) for more in (-1, 0, 1, 2)]

    def _scales_near(
        self, scale_NR: Tensor, step_NRS: Tensor, weight_NRSs: Tensor, importance_NRSs: Tensor
    ) -> list[Scales]:
        return [Scales(scale_NR=scale_NR, factor_NRS=torch.ones_like(step_NRS))]

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes of a block; levels are doubled, so that the exponent is one more than that of the step."""
        exponent_NR1 = (torch.log2(scales.scale_NR).round() + 128).clamp(0, 254).to(torch.uint8).unsqueeze(-1)
        return torch.cat((exponent_NR1, self.to_bytes(scales.factor_NRS, codes.code_NRc)), dim=-1)

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of blocks."""
        _, code_NRB = self.from_bytes(byte_NRK[..., 1:])
        level_L = torch.tensor(self.levels, dtype=torch.float32, device=byte_NRK.device)
        return level_L[code_NRB.long()] * torch.exp2(byte_NRK[..., :1].to(torch.float32) - 128)


def _q8_0_to(factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    return (code_NRB.to(torch.int16) - 128).to(torch.int8).view(torch.uint8)


def _q8_0_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor]:
    return no_factors(byte_NRK), byte_NRK.contiguous().view(torch.int8).to(torch.int16) + 128


def _four_bits_to(factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    return pack_bits(code_NRB, 4, 16)


def _four_bits_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor]:
    return no_factors(byte_NRK), unpack_bits(byte_NRK, 4, 16)


def _q5_0_to(factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    return torch.cat((pack_bits(code_NRB >> 4, 1, 1), pack_bits(code_NRB & 15, 4, 16)), dim=-1)


def _q5_0_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor]:
    high = unpack_bits(byte_NRK[..., :4], 1, 1)
    return no_factors(byte_NRK), unpack_bits(byte_NRK[..., 4:], 4, 16) | high << 4


def _q6_k_to(factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    low, high = pack_bits(code_NRB & 15, 4, 64), pack_bits(code_NRB >> 4, 2, 32)
    return torch.cat((low, high, factor_NRS.to(torch.int8).view(torch.uint8)), dim=-1)


def _q6_k_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor]:
    low, high, factor = torch.split(byte_NRK, [128, 64, 16], dim=-1)
    code = unpack_bits(low, 4, 64) | unpack_bits(high, 2, 32) << 4
    return factor.contiguous().view(torch.int8).to(torch.float32), code


def _q3_k_to(factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    factor = (factor_NRS + 32).to(torch.uint8)
    scales = torch.cat((pack_bits(factor & 15, 4, 8), pack_bits(factor >> 4, 2, 4)), dim=-1)
    return torch.cat((pack_bits(code_NRB >> 2, 1, 32), pack_bits(code_NRB & 3, 2, 32), scales), dim=-1)


def _q3_k_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor]:
    high, low, scales = torch.split(byte_NRK, [32, 64, 12], dim=-1)
    factor = unpack_bits(scales[..., :8], 4, 8) | unpack_bits(scales[..., 8:], 2, 4) << 4
    return factor.to(torch.float32) - 32, unpack_bits(low, 2, 32) | unpack_bits(high, 1, 32) << 2


def _iq4_xs_to(factor_NRS: Tensor, code_NRB: Tensor) -> Tensor:
    factor = (factor_NRS + 32).to(torch.int64)
    shift = torch.arange(0, 16, 2, device=factor.device)
    high = pack_words(((factor >> 4) << shift).sum(dim=-1, keepdim=True), 2)
    return torch.cat((high, pack_bits(factor & 15, 4, 1), pack_bits(code_NRB, 4, 16)), dim=-1)


def _iq4_xs_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor]:
    high, low, codes = torch.split(byte_NRK, [2, 4, 128], dim=-1)
    shift = torch.arange(0, 16, 2, device=byte_NRK.device)
    factor = unpack_bits(low, 4, 1) | ((unpack_words(high, 2) >> shift) & 3) << 4
    return factor.to(torch.float32) - 32, unpack_bits(codes, 4, 16)


TYPES = {
    "Q8_0": Scaled(
        name="Q8_0", block=32, sub_block=32, levels=tuple(range(-128, 128)), factors=(1, 1), to_bytes=_q8_0_to,
        from_bytes=_q8_0_from,
    ),
    "Q6_K": Scaled(
        name="Q6_K", block=256, sub_block=16, levels=tuple(range(-32, 32)), factors=(-128, 127), to_bytes=_q6_k_to,
        from_bytes=_q6_k_from, scale_first=False,
    ),
    "Q5_0": Scaled(
        name="Q5_0", block=32, sub_block=32, levels=tuple(range(-16, 16)), factors=(1, 1), to_bytes=_q5_0_to,
        from_bytes=_q5_0_from,
    ),
    "Q4_0": Scaled(
        name="Q4_0", block=32, sub_block=32, levels=tuple(range(-8, 8)), factors=(1, 1), to_bytes=_four_bits_to,
        from_bytes=_four_bits_from,
    ),
    "Q3_K": Scaled(
        name="Q3_K", block=256, sub_block=16, levels=tuple(range(-4, 4)), factors=(-32, 31), to_bytes=_q3_k_to,
        from_bytes=_q3_k_from, scale_first=False,
    ),
    "IQ4_NL": Scaled(
        name="IQ4_NL", block=32, sub_block=32, levels=_IQ4_LEVELS, factors=(1, 1), to_bytes=_four_bits_to,
        from_bytes=_four_bits_from,
    ),
    "IQ4_XS": Scaled(
        name="IQ4_XS", block=256, sub_block=32, levels=_IQ4_LEVELS, factors=(-32, 31), to_bytes=_iq4_xs_to,
        from_bytes=_iq4_xs_from,
    ),
    "MXFP4": PowerOfTwo(
        name="MXFP4", block=32, sub_block=32, levels=_MXFP4_LEVELS, factors=(1, 1), to_bytes=_four_bits_to,
        from_bytes=_four_bits_from,
    ),
}  # fmt: skip
