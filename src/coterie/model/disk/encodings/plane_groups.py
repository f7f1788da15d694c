"""Planes of bits as a type of blocks: a group of columns of a row, whose codes a quantiser chooses one after another.

A value is the sum of what planes say: the base plane -3, -1, 1 or 3 times half a step, each plane behind it that more
or less is missing, by as much as is missing on average (D2MoE, arXiv:2504.15299). While codes are chosen all planes of
a group lie side by side; `coterie.model.disk.encodings.bit_planes` pulls them apart.

One choice of codes cannot be the best in every number of bits. The step that is best for the base plane by itself clips
too much for what follows: four bits have twice the error with it that they have with the step that is best for them. So
there is one number of bits that steps and codes serve, all of them unless something else is said (`rounded`).

Legend: as in `coterie.model.disk.encodings.ggml.block_type`; P planes of signs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coterie.model.disk.encodings.ggml.bits import in_groups, pack_bits, unpack_bits
from coterie.model.disk.encodings.ggml.block_type import Codes, Scales, as_half, half_bytes, halves, ratio
from coterie.model.disk.encodings.ggml.rounding import round_columns
from coterie.model.disk.encodings.plane_types import BASE_BITS, SCALE_BYTES

if TYPE_CHECKING:
    from coterie.model.disk.encodings.ggml.block_type import Layout

#: Steps that are tried for a group, as shares of the one at which its largest number is the largest level of the base.
_SHARES = tuple(0.4 + 0.05 * place for place in range(13))


@dataclass(frozen=True, kw_only=True, slots=True)
class Planes:
    """A type of this kind; see `coterie.model.disk.encodings.ggml.block_type.BlockType` for what it does.

    Attributes:
        name: like PLANES4_G128.
        bits: of a number, in all planes.
        block: columns of a group.
        skipped: bits of the first planes, which are elsewhere: there are only those behind them; 0 for all.
    """

    name: str
    bits: int
    block: int
    skipped: int = 0

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
        """Nowhere: scales lie between the planes, and are not trained."""
        return slice(0, 0)

    @property
    def part_bytes(self) -> list[int]:
        """Bytes of a group, part by part: of each plane its scale, and its bits."""
        base = [] if self.skipped else [SCALE_BYTES, self.block * BASE_BITS // 8]
        return base + self._num_signs * [SCALE_BYTES, self.block // 8]

    @property
    def _num_signs(self) -> int:
        return self.bits - max(self.skipped, BASE_BITS)

    def split(self, bits: int) -> tuple[Planes, Planes]:
        """Return the planes of the first bits of a number, and those behind them."""
        return replace(self, bits=bits), replace(self, skipped=bits)

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Search the step with the smallest error in all planes, each weighted by its column's importance."""
        importance_NRB = importance_NRB.expand_as(weight_NRB)
        unseen_NR1 = importance_NRB.sum(dim=-1, keepdim=True) <= 0
        importance_NRB = torch.where(unseen_NR1, 1.0, importance_NRB)
        if self.skipped:
            return self._with_signs(torch.zeros_like(weight_NRB[..., 0]), weight_NRB, importance_NRB)[0]
        largest_NR = weight_NRB.abs().amax(dim=-1) / 1.5
        best, least_NR = None, torch.full_like(largest_NR, torch.inf)
        for share in _SHARES:
            step_NR = as_half(largest_NR * share)
            if self.bits == BASE_BITS:  # the best step for these codes
                level_NRB = _level(_nearest(weight_NRB, step_NR))
                weighted_NRB = importance_NRB * level_NRB
                step_NR = as_half(ratio((weighted_NRB * weight_NRB).sum(-1), (weighted_NRB * level_NRB).sum(-1)))
            scales, error_NR = self._with_signs(step_NR, weight_NRB, importance_NRB)
            better_NR = error_NR < least_NR
            best, least_NR = scales.where(better_NR, best), torch.where(better_NR, error_NR, least_NR)
        assert best is not None
        return best

    def _with_signs(self, step_NR: Tensor, weight_NRB: Tensor, importance_NRB: Tensor) -> tuple[Scales, Tensor]:
        """Return a step and what signs then count, and the error (N, R)."""
        missing_NRB = weight_NRB
        if not self.skipped:
            missing_NRB = weight_NRB - _level(_nearest(weight_NRB, step_NR)) * step_NR[..., None]
        signs = []
        for _ in range(self._num_signs):
            counts_NR = as_half(ratio((importance_NRB * missing_NRB.abs()).sum(-1), importance_NRB.sum(-1)))
            missing_NRB = missing_NRB - _signed(missing_NRB < 0, counts_NR)
            signs.append(counts_NR)
        sign_NRP = torch.stack(signs, dim=-1) if signs else step_NR.new_empty(*step_NR.shape, 0)
        scales = Scales(scale_NR=step_NR, factor_NRS=torch.ones_like(step_NR)[..., None], sign_NRP=sign_NRP)
        return scales, (importance_NRB * missing_NRB.square()).sum(-1)

    def choose(self, weight_NRv: Tensor, scales: Scales, column: int, metric_Nvv: Tensor) -> tuple[Codes, Tensor]:
        """Choose the nearest codes, plane by plane: the base in the lowest two bits, signs above it."""
        value_NRv, code_NRv = torch.zeros_like(weight_NRv), torch.zeros_like(weight_NRv, dtype=torch.int16)
        if not self.skipped:
            code_NRv = _nearest(weight_NRv, scales.scale_NR).to(torch.int16)
            value_NRv = _level(code_NRv) * scales.scale_NR[..., None]
        assert scales.sign_NRP is not None
        for plane in range(self._num_signs):
            negative_NRv = weight_NRv < value_NRv
            code_NRv = code_NRv | negative_NRv.to(torch.int16) << BASE_BITS + plane
            value_NRv = value_NRv + _signed(negative_NRv, scales.sign_NRP[..., plane])
        return Codes(code_NRc=code_NRv), value_NRv

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes of a group: of each plane the scale, and then its bits."""
        code_NRB, parts = codes.code_NRc, []
        if not self.skipped:
            parts = [half_bytes(scales.scale_NR), pack_bits(code_NRB & 3, BASE_BITS, self.block // 4)]
        assert scales.sign_NRP is not None
        for plane in range(self._num_signs):
            negative_NRB = code_NRB >> BASE_BITS + plane & 1
            parts += [half_bytes(scales.sign_NRP[..., plane]), pack_bits(negative_NRB, 1, self.block // 8)]
        return torch.cat(parts, dim=-1)

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of groups."""
        parts = torch.split(byte_NRK, self.part_bytes, dim=-1)
        value_NRB = torch.zeros((*byte_NRK.shape[:-1], self.block), device=byte_NRK.device)
        for place, (scale_NR2, bit_NRk) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            scale_NR = halves(scale_NR2)
            if place == 0 and not self.skipped:
                value_NRB = _level(unpack_bits(bit_NRk, BASE_BITS, self.block // 4)) * scale_NR[..., None]
            else:
                value_NRB = value_NRB + _signed(unpack_bits(bit_NRk, 1, self.block // 8), scale_NR)
        return value_NRB


def rounded(
    weight_NRC: Tensor, importance_NC: Tensor, upper_NCC: Tensor | None, kind: Layout, serve_bits: int = 0
) -> tuple[Tensor, Tensor]:
    """Round as `coterie.model.disk.encodings.ggml.rounding.round_columns` does; planes so that they serve some bits.

    Steps of those bits are the best for them, and with an upper factor the later columns make good what is missing in
    them. The planes behind them then say what is missing, and what they leave is made good by their later columns.

    Args:
        weight_NRC: the matrices.
        importance_NC: how much the error of each column weighs where scales are fitted.
        upper_NCC: U with H^-1 = U^T U, see `coterie.compress.quantisers.gptq`; None for the nearest codes.
        kind: the format.
        serve_bits: of a number in planes, that are served first; 0, or as many as there are, for all. Other types have
            one number of bits.

    Returns:
        Bytes (N, R, K), uint8, and values (N, R, C), float32.

    Raises:
        ValueError: columns that are no whole blocks.
    """
    if not isinstance(kind, Planes) or not serve_bits or serve_bits >= kind.bits:
        return round_columns(weight_NRC, importance_NC, upper_NCC, kind)
    first, behind = kind.split(serve_bits)
    byte_parts, value_parts = [], []
    # One matrix at a time: what the first planes leave takes as much as the matrices.
    for number in range(len(weight_NRC)):
        one = slice(number, number + 1)
        weight_1RC, upper_1CC = weight_NRC[one].to(torch.float32), None if upper_NCC is None else upper_NCC[one]
        first_1RK, value_1RC = round_columns(weight_1RC, importance_NC[one], upper_1CC, first)
        behind_1RK, _ = round_columns(weight_1RC - value_1RC, importance_NC[one], upper_1CC, behind)
        groups = [in_groups(first_1RK, sum(first.part_bytes)), in_groups(behind_1RK, sum(behind.part_bytes))]
        byte_1RGK = torch.cat(groups, dim=-1)
        byte_parts.append(byte_1RGK.flatten(-2))
        value_parts.append(kind.unpack(byte_1RGK).flatten(-2))
    return torch.cat(byte_parts), torch.cat(value_parts)


def _nearest(weight_NRv: Tensor, step_NR: Tensor) -> Tensor:
    """Return the base codes (N, R, v) that are nearest to numbers, 0 to 3."""
    return (ratio(weight_NRv, step_NR[..., None]).floor() + 2).clamp(0, 3)


def _level(code_NRv: Tensor) -> Tensor:
    """Return what base codes stand for, in steps: -1.5 to 1.5."""
    return code_NRv.to(torch.float32) - 1.5


def _signed(negative_NRv: Tensor, counts_NR: Tensor) -> Tensor:
    """Return what a plane of signs adds."""
    return (1 - 2 * negative_NRv.to(torch.float32)) * counts_NR[..., None]
