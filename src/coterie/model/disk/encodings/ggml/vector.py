"""Types whose columns are coded together, as an entry of a grid of vectors with signs.

They are IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS and IQ2_XXS. A grid holds magnitudes. Where signs have seven bits for eight
columns, the number of negative ones is even. The grids are read from the package gguf. Legend: as in `block_type`; G
entries of a grid, V columns of one, g groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coterie.errors import InputError
from coterie.model.disk.encodings.ggml.bits import in_groups, pack_bits, pack_words, unpack_bits, unpack_words
from coterie.model.disk.encodings.ggml.block_type import Codes, Scales, as_half, half_bytes, halves, ratio

#: Steps that are tried for a sub-block, as shares of the one at which its largest weight is the grid's largest number.
_SHARES = (0.55, 0.65, 0.74, 0.82, 0.9, 0.98, 1.06, 1.15, 1.26, 1.4, 1.6, 2.4, 5.0)
_FACTOR_SHARES = (0.8, 0.87, 0.94, 1.0)

#: Entries that are compared by the whole metric, after the diagonal has chosen them.
_CANDIDATES = 16

#: Groups whose distances to all entries are computed at a time.
_AT_A_TIME = 2**14

#: Numbers whose scales are fitted at a time, by where: tables of their distances to all entries stay in a CPU's cache.
_FITTED_AT_ONCE, _FITTED_ELSEWHERE = {"cpu": 2**13}, 2**18

_LARGEST_FACTOR = 15


class _Search:
    """Finds the nearest entries to rows of magnitudes over steps, for one choice of steps after another.

    The distance of a group x, with importance w, from step s times entry q is, up to what is the same for all entries,
    s^2 sum(w q^2) - 2 s sum(w x q): both sums are computed once.
    """

    def __init__(self, magnitude_RB: Tensor, importance_RB: Tensor, grid_GV: Tensor, sub_block: int) -> None:
        group = grid_GV.shape[-1]
        self._magnitude_RSs = in_groups(magnitude_RB, sub_block)
        magnitude_gV, importance_gV = (each.reshape(-1, group) for each in (magnitude_RB, importance_RB))
        self._square_gG = importance_gV @ grid_GV.square().T
        self._product_gG = (importance_gV * magnitude_gV) @ grid_GV.T
        self._groups = sub_block // group
        self._place_G = torch.arange(len(grid_GV), dtype=torch.int32, device=grid_GV.device)
        self._low_bits = (1 << (len(grid_GV) - 1).bit_length()) - 1

    def largest(self) -> Tensor:
        """Return the largest magnitude of every sub-block, (R, S)."""
        return self._magnitude_RSs.abs().amax(dim=-1)

    def sums(self, step_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum(w x q) and sum(w q^2) of sub-blocks (R, S), with q the entries that are nearest at these steps."""
        inverse_g1 = ratio(torch.ones_like(step_RS), step_RS).repeat_interleave(self._groups, dim=-1).reshape(-1, 1)
        distance_gG = torch.addcmul(self._square_gG, self._product_gG, inverse_g1, value=-2)
        # The least with its place in the last bits of the number: several times as fast as asking where the least is.
        bits_gG = distance_gG.view(torch.int32).bitwise_and_(~self._low_bits).bitwise_or_(self._place_G)
        least_g1 = bits_gG.view(torch.float32).amin(dim=-1, keepdim=True)
        place_g1 = (least_g1.view(torch.int32) & self._low_bits).long()
        sums = (
            each.gather(-1, place_g1).view(*step_RS.shape, -1).sum(-1) for each in (self._product_gG, self._square_gG)
        )
        product_RS, square_RS = sums
        return product_RS, square_RS


@dataclass(frozen=True, kw_only=True, slots=False)
class Vector:
    """A type of this kind; see `block_type.BlockType` for what it does.

    Attributes:
        group: columns of an entry of the grid.
        even: whether the number of negative columns of eight is even.
        step_first, step_each: the step is the scale times (step_first + step_each * factor).
        to_bytes: (factors, codes, signs) as bytes, the scale left out; signs are bytes, a bit for each of 8 columns.
        from_bytes: those bytes as the three.
    """

    name: str
    block: int = 256
    sub_block: int
    group: int
    together: int
    even: bool
    step_first: float
    step_each: float
    to_bytes: Callable[[Tensor, Tensor, Tensor], Tensor]
    from_bytes: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

    @property
    def numbers_at(self) -> slice:
        """Where the scale lies in a block's bytes."""
        return slice(0, 2)

    @cached_property
    def grid(self) -> Tensor:
        """The entries (G, V), float32.

        Raises:
            InputError: the package gguf is not installed.
        """
        return read_grid(self.name, self.group)

    def signs(self, weight_v: Tensor, importance_v: Tensor) -> Tensor:
        """Return which columns (..., v) become negative; where that must be an even number, the cheapest one turns."""
        negative_v = weight_v < 0
        if not self.even:
            return negative_v
        negative_g8 = in_groups(negative_v, 8)
        cost_g8 = in_groups((importance_v * weight_v.square()).expand_as(weight_v), 8)
        turned_g8 = torch.zeros_like(negative_g8).scatter(-1, cost_g8.argmin(dim=-1, keepdim=True), True)
        odd_g1 = negative_g8.sum(dim=-1, keepdim=True) % 2 == 1
        return (negative_g8 ^ (turned_g8 & odd_g1)).flatten(-2)

    def nearest(self, magnitude_C: Tensor, importance_C: Tensor, count: int) -> Tensor:
        """Return the `count` nearest entries (..., g, count) to magnitudes in units of steps, some of them negative."""
        value_gV = in_groups(magnitude_C, self.group)
        importance_gV = in_groups(importance_C.expand_as(magnitude_C), self.group)
        grid_GV = self.grid.to(value_gV.device)
        shape, places = value_gV.shape[:-1], []
        flat_gV, flat_importance_gV = value_gV.reshape(-1, self.group), importance_gV.reshape(-1, self.group)
        for start in range(0, len(flat_gV), _AT_A_TIME):
            part_gV, weights_gV = (flat[start : start + _AT_A_TIME] for flat in (flat_gV, flat_importance_gV))
            distance_gG = weights_gV @ grid_GV.square().T - 2 * ((weights_gV * part_gV) @ grid_GV.T)
            places.append(distance_gG.topk(count, dim=-1, largest=False).indices)
        return torch.cat(places).view(*shape, count)

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Search the steps of sub-blocks, then the scale that they are multiples of; some rows at a time."""
        rows_RB = weight_NRB.flatten(0, 1)
        importance_RB = importance_NRB.expand_as(weight_NRB).flatten(0, 1)
        at_once = _FITTED_AT_ONCE.get(rows_RB.device.type, _FITTED_ELSEWHERE) // self.block
        some = zip(torch.split(rows_RB, at_once), torch.split(importance_RB, at_once), strict=True)
        parts = [self._fit(*each) for each in some]
        shape = weight_NRB.shape[:2]
        return Scales(
            scale_NR=torch.cat([scale_R for scale_R, _ in parts]).view(shape),
            factor_NRS=torch.cat([factor_RS for _, factor_RS in parts]).view(*shape, -1),
        )

    def _fit(self, weight_RB: Tensor, importance_RB: Tensor) -> tuple[Tensor, Tensor]:
        magnitude_RB = torch.where(self.signs(weight_RB, importance_RB), -weight_RB, weight_RB)
        search = _Search(magnitude_RB, importance_RB, self.grid.to(weight_RB.device), self.sub_block)
        step_RS = self._search_steps(search)
        least_R = torch.full_like(step_RS[..., 0], torch.inf)
        best_scale_R, best_factor_RS = torch.zeros_like(least_R), torch.zeros_like(step_RS)
        top = self.step_first + self.step_each * _LARGEST_FACTOR
        for share in _FACTOR_SHARES:
            scale_R = as_half(step_RS.amax(dim=-1) / (top * share))
            factor_RS = (ratio(step_RS, scale_R[..., None]) - self.step_first) / self.step_each
            factor_RS = factor_RS.round().clamp(0, _LARGEST_FACTOR)
            multiple_RS = self._multiples(factor_RS)
            product_RS, square_RS = search.sums(scale_R[..., None] * multiple_RS)
            above_R, below_R = (multiple_RS * product_RS).sum(-1), (multiple_RS.square() * square_RS).sum(-1)
            refit_R = as_half(ratio(above_R, below_R))
            error_R = refit_R.square() * below_R - 2 * refit_R * above_R  # what does not hang on the scale left out
            better_R = error_R < least_R
            least_R = torch.where(better_R, error_R, least_R)
            best_scale_R = torch.where(better_R, refit_R, best_scale_R)
            best_factor_RS = torch.where(better_R[..., None], factor_RS, best_factor_RS)
        return best_scale_R, best_factor_RS

    def _search_steps(self, search: _Search) -> Tensor:
        start_RS = search.largest() / float(self.grid.max())
        least_RS, best_RS = torch.full_like(start_RS, torch.inf), torch.zeros_like(start_RS)
        for share in _SHARES:
            product_RS, square_RS = search.sums(start_RS * share)
            step_RS = ratio(product_RS, square_RS).clamp(min=0)
            error_RS = step_RS.square() * square_RS - 2 * step_RS * product_RS
            better_RS = error_RS < least_RS
            least_RS = torch.where(better_RS, error_RS, least_RS)
            best_RS = torch.where(better_RS, step_RS, best_RS)
        return best_RS

    def _multiples(self, factor: Tensor) -> Tensor:
        return self.step_first + self.step_each * factor

    def steps(self, scales: Scales) -> Tensor:
        """Return the steps (N, R, S) of sub-blocks."""
        return scales.scale_NR[..., None] * self._multiples(scales.factor_NRS)

    def choose(self, weight_NRv: Tensor, scales: Scales, column: int, metric_Nvv: Tensor) -> tuple[Codes, Tensor]:
        """Choose entries by the diagonal of the metric, and among the best of them by the whole of it."""
        step_NR1 = self.steps(scales.at(column // self.sub_block))
        importance_N1v = metric_Nvv.square().sum(dim=-1)[:, None, :]
        negative_NRv = self.signs(weight_NRv, importance_N1v)
        magnitude_NRv = torch.where(negative_NRv, -weight_NRv, weight_NRv)
        groups = self.together // self.group
        count = min(_CANDIDATES if groups == 1 else round(_CANDIDATES ** (1 / groups)), len(self.grid))
        place_NRgc = self.nearest(ratio(magnitude_NRv, step_NR1), importance_N1v, count)
        # All combinations of one candidate for each group, (N, R, combinations, g).
        choices = torch.cartesian_prod(*[torch.arange(count, device=weight_NRv.device)] * groups).view(-1, groups)
        place_NRkg = torch.stack([place_NRgc[..., g, choices[:, g]] for g in range(groups)], dim=-1)
        sign_NR1v = torch.where(negative_NRv, -1.0, 1.0)[..., None, :]
        value_NRkv = self.grid.to(weight_NRv.device)[place_NRkg].flatten(-2) * sign_NR1v * step_NR1[..., None]
        wrong_NRkv = torch.einsum("nrkv,nvw->nrkw", weight_NRv[..., None, :] - value_NRkv, metric_Nvv)
        best_NR1 = wrong_NRkv.square().sum(dim=-1).argmin(dim=-1, keepdim=True)
        code_NRg = place_NRkg.gather(-2, best_NR1[..., None].expand(*best_NR1.shape, groups)).squeeze(-2)
        value_NRv = value_NRkv.gather(-2, best_NR1[..., None].expand(*best_NR1.shape, self.together)).squeeze(-2)
        return Codes(code_NRc=code_NRg.to(torch.int16), negative_NRv=negative_NRv), value_NRv

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes of a block."""
        assert codes.negative_NRv is not None
        sign_NRk = pack_bits(codes.negative_NRv.to(torch.uint8), 1, 1)
        rest = self.to_bytes(scales.factor_NRS.to(torch.int64), codes.code_NRc.to(torch.int64), sign_NRk)
        return torch.cat((half_bytes(scales.scale_NR), rest), dim=-1)

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of blocks."""
        factor_NRS, code_NRg, sign_NRk = self.from_bytes(byte_NRK[..., 2:])
        scales = Scales(scale_NR=halves(byte_NRK[..., :2]), factor_NRS=factor_NRS.to(torch.float32))
        sign_NRB = 1.0 - 2.0 * unpack_bits(sign_NRk, 1, 1).to(torch.float32)
        unit_NRB = self.grid.to(byte_NRK.device)[code_NRg.long()].flatten(-2)
        return unit_NRB * sign_NRB * self.steps(scales).repeat_interleave(self.sub_block, dim=-1)


def read_grid(name: str, group: int) -> Tensor:
    """Return the entries (G, V) of a type's grid, V of them columns, float32.

    Raises:
        InputError: the package gguf is not installed.
    """
    try:
        from gguf import quants
    except ImportError:
        raise InputError(
            f"{name} has a grid that the package gguf holds, which is not installed: pip install 'coterie[gguf]'"
        ) from None
    holder = getattr(quants, name)
    holder.init_grid()
    return torch.from_numpy(holder.grid.copy()).view(-1, group)


def _even_byte(low_NRk: Tensor) -> Tensor:
    """Return signs as bytes from their lower seven bits; the eighth makes the number of negative ones even."""
    bit_NRk7 = (low_NRk[..., None] >> torch.arange(7, device=low_NRk.device)) & 1
    return (low_NRk | (bit_NRk7.sum(dim=-1) & 1) << 7).to(torch.uint8)


def _signs_and_factor(factor_NRS: Tensor, sign_NRk: Tensor) -> Tensor:
    """Return words of four times seven bits of signs and four bits of a factor, as bytes (N, R, S, 4)."""
    shift_4 = torch.arange(0, 28, 7, device=sign_NRk.device)
    signs_NRS = (in_groups(sign_NRk.to(torch.int64) & 127, 4) << shift_4).sum(dim=-1)
    return in_groups(pack_words(signs_NRS | factor_NRS << 28, 4), 4)


def _signs_and_factor_of(byte_NRS4: Tensor) -> tuple[Tensor, Tensor]:
    word_NRS = unpack_words(byte_NRS4, 4).squeeze(-1)
    shift_4 = torch.arange(0, 28, 7, device=byte_NRS4.device)
    return word_NRS >> 28, _even_byte(((word_NRS[..., None] >> shift_4) & 127).flatten(-2))


def _iq2_xxs_to(factor_NRS: Tensor, code_NRg: Tensor, sign_NRk: Tensor) -> Tensor:
    codes = in_groups(code_NRg.to(torch.uint8), 4)
    return torch.cat((codes, _signs_and_factor(factor_NRS, sign_NRk)), dim=-1).flatten(-2)


def _iq2_xxs_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, words = torch.split(in_groups(byte_NRK, 8), [4, 4], dim=-1)
    factor, signs = _signs_and_factor_of(words)
    return factor, codes.flatten(-2), signs


def _iq3_xxs_to(factor_NRS: Tensor, code_NRg: Tensor, sign_NRk: Tensor) -> Tensor:
    return torch.cat((code_NRg.to(torch.uint8), _signs_and_factor(factor_NRS, sign_NRk).flatten(-2)), dim=-1)


def _iq3_xxs_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, words = torch.split(byte_NRK, [64, 32], dim=-1)
    factor, signs = _signs_and_factor_of(in_groups(words, 4))
    return factor, codes, signs


def _iq2_xs_to(factor_NRS: Tensor, code_NRg: Tensor, sign_NRk: Tensor) -> Tensor:
    words = pack_words(code_NRg | (sign_NRk.to(torch.int64) & 127) << 9, 2)
    return torch.cat((words, pack_bits(factor_NRS, 4, 1)), dim=-1)


def _iq2_xs_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    words, factors = torch.split(byte_NRK, [64, 8], dim=-1)
    word_NRg = unpack_words(words, 2)
    return unpack_bits(factors, 4, 1), word_NRg & 511, _even_byte(word_NRg >> 9)


def _iq2_s_to(factor_NRS: Tensor, code_NRg: Tensor, sign_NRk: Tensor) -> Tensor:
    low, high = (code_NRg & 255).to(torch.uint8), pack_bits(code_NRg >> 8, 2, 1)
    return torch.cat((low, sign_NRk, high, pack_bits(factor_NRS, 4, 1)), dim=-1)


def _iq2_s_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, signs, high, factors = torch.split(byte_NRK, [32, 32, 8, 8], dim=-1)
    return unpack_bits(factors, 4, 1), low.long() | unpack_bits(high, 2, 1).long() << 8, signs


def _iq3_s_to(factor_NRS: Tensor, code_NRg: Tensor, sign_NRk: Tensor) -> Tensor:
    low, high = (code_NRg & 255).to(torch.uint8), pack_bits(code_NRg >> 8, 1, 1)
    return torch.cat((low, high, sign_NRk, pack_bits(factor_NRS, 4, 1)), dim=-1)


def _iq3_s_from(byte_NRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high, signs, factors = torch.split(byte_NRK, [64, 8, 32, 4], dim=-1)
    return unpack_bits(factors, 4, 1), low.long() | unpack_bits(high, 1, 1).long() << 8, signs


TYPES = {
    "IQ3_S": Vector(
        name="IQ3_S", sub_block=32, group=4, together=4, even=False, step_first=1.0, step_each=2.0,
        to_bytes=_iq3_s_to, from_bytes=_iq3_s_from,
    ),
    "IQ3_XXS": Vector(
        name="IQ3_XXS", sub_block=32, group=4, together=8, even=True, step_first=0.25, step_each=0.5,
        to_bytes=_iq3_xxs_to, from_bytes=_iq3_xxs_from,
    ),
    "IQ2_S": Vector(
        name="IQ2_S", sub_block=16, group=8, together=8, even=False, step_first=0.125, step_each=0.25,
        to_bytes=_iq2_s_to, from_bytes=_iq2_s_from,
    ),
    "IQ2_XS": Vector(
        name="IQ2_XS", sub_block=16, group=8, together=8, even=True, step_first=0.125, step_each=0.25,
        to_bytes=_iq2_xs_to, from_bytes=_iq2_xs_from,
    ),
    "IQ2_XXS": Vector(
        name="IQ2_XXS", sub_block=32, group=8, together=8, even=True, step_first=0.125, step_each=0.25,
        to_bytes=_iq2_xxs_to, from_bytes=_iq2_xxs_from,
    ),
}  # fmt: skip
