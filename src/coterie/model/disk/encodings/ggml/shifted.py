"""Types whose columns are coded by eight, as an entry of a grid of -1, 0 and 1, shifted up or down: IQ1_M and IQ1_S.

The shift is an eighth. IQ1_M chooses its side for every eight columns, IQ1_S for the 32 of a sub-block. An entry with
its shift has a number here, those that are shifted down behind those that are shifted up; so both types have one grid
of 4096 entries, of which a sub-block of IQ1_S uses one half. The grid is read from the package gguf. Legend: as in
`block_type`; G entries of a grid, V columns of one, g groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coterie.model.disk.encodings.ggml.bits import in_groups, pack_bits, pack_words, unpack_bits, unpack_words
from coterie.model.disk.encodings.ggml.block_type import Codes, Scales, as_half, half_bytes, halves, ratio
from coterie.model.disk.encodings.ggml.ternary import best_scale
from coterie.model.disk.encodings.ggml.vector import read_grid

#: Columns of an entry, and how far it is shifted.
_GROUP, _SHIFT = 8, 0.125

#: Entries on one side, and the step of a sub-block: the scale times 1, 3, 5, ... 15.
_ENTRIES, _LARGEST_FACTOR = 2048, 7

#: Steps that are tried for a sub-block, as shares of the best one of free numbers -1, 0 and 1; and shares of the
#: largest factor that the largest step is tried at. Three times as many of both take 0.3 % off the error.
_SHARES = (0.8, 1.0, 1.2)
_FACTOR_SHARES = (0.87, 1.0)

#: Groups whose distances to all entries are computed at a time.
_AT_A_TIME = 2**12


@dataclass(frozen=True, kw_only=True, slots=False)
class Shifted:
    """A type of this kind; see `block_type.BlockType` for what it does.

    Factors of `Scales` are which multiple, 0 to 7, and 8 more where a sub-block is shifted down as a whole.

    Attributes:
        side_of_sub_block: whether a sub-block has one shift; else each group of eight columns has.
        to_bytes: (two bytes of the scale, factors, codes) as bytes.
        from_bytes: those bytes as the three.
        numbers_at: where the scale lies in a block's bytes.
    """

    name: str
    block: int = 256
    sub_block: int
    together: int = _GROUP
    side_of_sub_block: bool
    to_bytes: Callable[[Tensor, Tensor, Tensor], Tensor]
    from_bytes: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    numbers_at: slice

    @cached_property
    def grid(self) -> Tensor:
        """The entries (G, V) with their shifts, float32.

        Raises:
            InputError: the package gguf is not installed.
        """
        entry_GV = read_grid("IQ1_S", _GROUP)
        return torch.cat((entry_GV + _SHIFT, entry_GV - _SHIFT))

    @cached_property
    def _table(self) -> Tensor:
        """The entries and their squares, side by side (2 V, G)."""
        return torch.cat((self.grid, self.grid.square()), dim=-1).T.contiguous()

    def _nearest(self, weight_NRB: Tensor, importance_NRB: Tensor, step_NRS: Tensor) -> Tensor:
        """Return the numbers of the entries (N, R, g) that are nearest at given steps."""
        table = self._table.to(weight_NRB.device)
        weighing_NRB = importance_NRB.expand_as(weight_NRB)
        step_NRg = step_NRS.repeat_interleave(self.sub_block // _GROUP, dim=-1)
        # d (w - s v)^2 over s, without what all entries have in common: s d v^2 - 2 d w v. It is one product.
        square_NRgV = in_groups(weighing_NRB, _GROUP) * step_NRg[..., None]
        row_gW = torch.cat((in_groups(-2 * weighing_NRB * weight_NRB, _GROUP), square_NRgV), dim=-1).flatten(0, -2)
        parts = [in_groups(some_gW @ table, _ENTRIES).min(dim=-1) for some_gW in torch.split(row_gW, _AT_A_TIME)]
        distance_g2, place_g2 = (torch.cat(each).view(*step_NRg.shape, 2) for each in zip(*parts, strict=True))
        if self.side_of_sub_block:
            summed_NRS2 = distance_g2.view(*step_NRS.shape, -1, 2).sum(dim=-2)
            down_NRg = (summed_NRS2[..., 1] < summed_NRS2[..., 0]).repeat_interleave(self.sub_block // _GROUP, dim=-1)
        else:
            down_NRg = distance_g2[..., 1] < distance_g2[..., 0]
        return torch.where(down_NRg, place_g2[..., 1] + _ENTRIES, place_g2[..., 0])

    def _units(self, code_NRg: Tensor) -> Tensor:
        """Return the values of entries in units of steps."""
        return self.grid.to(code_NRg.device)[code_NRg.long()].flatten(-2)

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Search the steps of sub-blocks, then the scale that they are multiples of."""
        step_NRS = self._search_steps(weight_NRB, importance_NRB)
        best: Scales | None = None
        least_NR = torch.full_like(step_NRS[..., 0], torch.inf)
        for share in _FACTOR_SHARES:
            scale_NR = as_half(step_NRS.amax(dim=-1) / ((2 * _LARGEST_FACTOR + 1) * share))
            factor_NRS = ((ratio(step_NRS, scale_NR[..., None]) - 1) / 2).round().clamp(0, _LARGEST_FACTOR)
            first = Scales(scale_NR=scale_NR, factor_NRS=factor_NRS)
            code_NRg = self._nearest(weight_NRB, importance_NRB, self.steps(first))
            unit_NRB = self._units(code_NRg) * self._multiples(first).repeat_interleave(self.sub_block, dim=-1)
            weighted_NRB = importance_NRB * unit_NRB
            refit_NR = ratio((weighted_NRB * weight_NRB).sum(-1), (weighted_NRB * unit_NRB).sum(-1))
            if self.side_of_sub_block:
                down_NRS = code_NRg[..., :: self.sub_block // _GROUP] >= _ENTRIES
                factor_NRS = factor_NRS + (_LARGEST_FACTOR + 1) * down_NRS
            refit = Scales(scale_NR=as_half(refit_NR), factor_NRS=factor_NRS)
            error_NR = (importance_NRB * (weight_NRB - unit_NRB * refit.scale_NR[..., None]).square()).sum(-1)
            better_NR = error_NR < least_NR
            least_NR = torch.where(better_NR, error_NR, least_NR)
            best = refit.where(better_NR, best)
        assert best is not None
        return best

    def _search_steps(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Tensor:
        weight_NRSs = in_groups(weight_NRB, self.sub_block)
        importance_NRSs = in_groups(importance_NRB.expand_as(weight_NRB), self.sub_block)
        start_NRS = best_scale(weight_NRSs, importance_NRSs)
        least_NRS, best_NRS = torch.full_like(start_NRS, torch.inf), torch.zeros_like(start_NRS)
        for share in _SHARES:
            code_NRg = self._nearest(weight_NRB, importance_NRB, start_NRS * share)
            unit_NRSs = in_groups(self._units(code_NRg), self.sub_block)
            weighted_NRSs = importance_NRSs * unit_NRSs
            step_NRS = ratio((weighted_NRSs * weight_NRSs).sum(-1), (weighted_NRSs * unit_NRSs).sum(-1)).clamp(min=0)
            error_NRS = (importance_NRSs * (weight_NRSs - unit_NRSs * step_NRS[..., None]).square()).sum(-1)
            better_NRS = error_NRS < least_NRS
            least_NRS = torch.where(better_NRS, error_NRS, least_NRS)
            best_NRS = torch.where(better_NRS, step_NRS, best_NRS)
        return best_NRS

    def _multiples(self, scales: Scales) -> Tensor:
        return 2 * (scales.factor_NRS % (_LARGEST_FACTOR + 1)) + 1

    def steps(self, scales: Scales) -> Tensor:
        """Return the steps (N, R, S) of sub-blocks."""
        return scales.scale_NR[..., None] * self._multiples(scales)

    def choose(self, weight_NRv: Tensor, scales: Scales, column: int, metric_Nvv: Tensor) -> tuple[Codes, Tensor]:
        """Choose the best entry of all by the whole metric M: |(w - s v) M|^2 is least."""
        here = scales.at(column // self.sub_block)
        step_NR1 = self.steps(here)
        grid_GV = self.grid.to(weight_NRv.device)
        square_NG = (grid_GV @ metric_Nvv).square().sum(dim=-1)
        table_NWG = torch.cat((grid_GV.T.expand(len(square_NG), -1, -1), square_NG[:, None]), dim=-2)
        # What is compared over s, without what all entries have in common: s |v M|^2 - 2 w M M^T v.
        row_NRW = torch.cat((-2 * weight_NRv @ (metric_Nvv @ metric_Nvv.mT), step_NR1), dim=-1)
        distance_NRG = row_NRW @ table_NWG
        if self.side_of_sub_block:
            up_NR1 = here.factor_NRS <= _LARGEST_FACTOR
            distance_NRG[..., :_ENTRIES].masked_fill_(~up_NR1, torch.inf)
            distance_NRG[..., _ENTRIES:].masked_fill_(up_NR1, torch.inf)
        code_NR1 = distance_NRG.min(dim=-1, keepdim=True).indices
        return Codes(code_NRc=code_NR1.to(torch.int16)), self._units(code_NR1) * step_NR1

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes of a block."""
        return self.to_bytes(half_bytes(scales.scale_NR), scales.factor_NRS.long(), codes.code_NRc.long())

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of blocks."""
        number_NR2, factor_NRS, code_NRg = self.from_bytes(byte_NRK)
        scales = Scales(scale_NR=halves(number_NR2), factor_NRS=factor_NRS.to(torch.float32))
        return self._units(code_NRg) * self.steps(scales).repeat_interleave(self.sub_block, dim=-1)


def _iq1_s_to(number_NR2: Tensor, factor_NRS: Tensor, code_NRg: Tensor) -> Tensor:
    shift_4 = torch.arange(0, 12, 3, device=code_NRg.device)
    high_NRS = ((in_groups(code_NRg, 4) >> 8 & 7) << shift_4).sum(dim=-1)
    words = pack_words(high_NRS | factor_NRS << 12, 2)
    return torch.cat((number_NR2, (code_NRg & 255).to(torch.uint8), words), dim=-1)


def _iq1_s_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    number, low, words = torch.split(byte_NRK, [2, 32, 16], dim=-1)
    word_NRS = unpack_words(words, 2)
    shift_4 = torch.arange(0, 12, 3, device=byte_NRK.device)
    high_NRg = ((word_NRS[..., None] >> shift_4 & 7) | (word_NRS[..., None] >> 15 << 3)).flatten(-2)
    return number, word_NRS >> 12, low.long() | high_NRg << 8


def _iq1_m_to(number_NR2: Tensor, factor_NRS: Tensor, code_NRg: Tensor) -> Tensor:
    shift_4 = torch.arange(0, 12, 3, device=code_NRg.device)
    factors_NR4 = (in_groups(factor_NRS, 4) << shift_4).sum(dim=-1)
    # Four bits of the scale lie above the factors of four sub-blocks, the lowest ones first.
    words = pack_words(factors_NR4 | unpack_bits(number_NR2, 4, 1).long() << 12, 2)
    return torch.cat(((code_NRg & 255).to(torch.uint8), pack_bits(code_NRg >> 8, 4, 1), words), dim=-1)


def _iq1_m_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high, words = torch.split(byte_NRK, [32, 16, 8], dim=-1)
    word_NR4 = unpack_words(words, 2)
    shift_4 = torch.arange(0, 12, 3, device=byte_NRK.device)
    factor_NRS = (word_NR4[..., None] >> shift_4 & 7).flatten(-2)
    return pack_bits(word_NR4 >> 12, 4, 1), factor_NRS, low.long() | unpack_bits(high, 4, 1).long() << 8


TYPES = {
    "IQ1_M": Shifted(
        name="IQ1_M", sub_block=16, side_of_sub_block=False, to_bytes=_iq1_m_to, from_bytes=_iq1_m_from,
        numbers_at=slice(0, 0),  # in four places, none of them a float16 number
    ),
    "IQ1_S": Shifted(
        name="IQ1_S", sub_block=32, side_of_sub_block=True, to_bytes=_iq1_s_to, from_bytes=_iq1_s_from,
        numbers_at=slice(0, 2),
    ),
}  # fmt: skip
