"""Planes of bits as a type of blocks: a group of columns of a row, whose codes a quantiser chooses one after another.

A value is the sum of what planes say: the base plane -3, -1, 1 or 3 times half a step, each plane behind it that more
or less is missing, by as much as is missing on average (D2MoE, arXiv:2504.15299). While codes are chosen all planes of
a group lie side by side; `coterie.model.disk.encodings.bit_planes` pulls them apart.

Steps are the best for all planes together. The step with the least error in the base plane alone is smaller, and worse
for the base as well: its values are shorter than what they stand for, by an eighth where numbers are normally
distributed, and three matrices of an expert make that a third of its output. On the bundled qwen3_moe, nearest codes
read in two bits lost 0.069 nats with it, and 0.046 with the step that is best for four.

Codes can be the best in one number of bits. Where each error is made good by later columns, `round_nested` weighs all.

Legend: as in `coterie.model.disk.encodings.ggml.block_type`; P planes, of which the first p give a number of bits; L
codes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.model.disk.encodings.ggml.bits import pack_bits, unpack_bits
from coterie.model.disk.encodings.ggml.block_type import Codes, Scales, as_half, half_bytes, halves, ratio
from coterie.model.disk.encodings.plane_types import BASE_BITS, SCALE_BYTES

#: Steps that are tried for a group, as shares of the one at which its largest number is the largest level of the base.
_SHARES = tuple(0.4 + 0.05 * place for place in range(13))

#: Numbers that are rounded in all bits at once; each has a target in every number of bits.
_TARGETS_AT_ONCE = 2**21


@dataclass(frozen=True, kw_only=True, slots=True)
class Planes:
    """A type of this kind; see `coterie.model.disk.encodings.ggml.block_type.BlockType` for what it does.

    Attributes:
        name: like PLANES4_G128.
        bits: of a number, in all planes.
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
        """Nowhere: scales lie between the planes, and are not trained."""
        return slice(0, 0)

    @property
    def part_bytes(self) -> list[int]:
        """Bytes of a group, part by part: of each plane its scale, and its bits."""
        return [SCALE_BYTES, self.block * BASE_BITS // 8, *self._num_signs * (SCALE_BYTES, self.block // 8)]

    @property
    def _num_signs(self) -> int:
        return self.bits - BASE_BITS

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Search the step with the smallest error in all planes, each weighted by its column's importance."""
        importance_NRB = importance_NRB.expand_as(weight_NRB)
        unseen_NR1 = importance_NRB.sum(dim=-1, keepdim=True) <= 0
        importance_NRB = torch.where(unseen_NR1, 1.0, importance_NRB)
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
        assert scales.sign_NRP is not None
        code_NRv = _nearest(weight_NRv, scales.scale_NR).to(torch.int16)
        value_NRv = _level(code_NRv) * scales.scale_NR[..., None]
        for plane in range(self._num_signs):
            negative_NRv = weight_NRv < value_NRv
            code_NRv = code_NRv | negative_NRv.to(torch.int16) << BASE_BITS + plane
            value_NRv = value_NRv + _signed(negative_NRv, scales.sign_NRP[..., plane])
        return Codes(code_NRc=code_NRv), value_NRv

    def values(self, scales: Scales) -> Tensor:
        """Return what each code stands for in every number of planes (N, R, L, P)."""
        assert scales.sign_NRP is not None
        code_L = torch.arange(1 << self.bits, dtype=torch.int16, device=scales.scale_NR.device)
        value_NRL = _level(code_L & 3) * scales.scale_NR[..., None]
        values = [value_NRL]
        for plane in range(self._num_signs):
            value_NRL = value_NRL + _signed(code_L >> BASE_BITS + plane & 1, scales.sign_NRP[..., plane])
            values.append(value_NRL)
        return torch.stack(values, dim=-1)

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes of a group: of each plane the scale, and then its bits."""
        assert scales.sign_NRP is not None
        code_NRB = codes.code_NRc
        parts = [half_bytes(scales.scale_NR), pack_bits(code_NRB & 3, BASE_BITS, self.block // 4)]
        for plane in range(self._num_signs):
            negative_NRB = code_NRB >> BASE_BITS + plane & 1
            parts += [half_bytes(scales.sign_NRP[..., plane]), pack_bits(negative_NRB, 1, self.block // 8)]
        return torch.cat(parts, dim=-1)

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of groups."""
        scale_NR2, base_NRk, *signs = torch.split(byte_NRK, self.part_bytes, dim=-1)
        value_NRB = _level(unpack_bits(base_NRk, BASE_BITS, self.block // 4)) * halves(scale_NR2)[..., None]
        for counts_NR2, negative_NRk in zip(signs[::2], signs[1::2], strict=True):
            value_NRB = value_NRB + _signed(unpack_bits(negative_NRk, 1, self.block // 8), halves(counts_NR2))
        return value_NRB


def round_nested(
    weight_NRC: Tensor, importance_NC: Tensor, upper_NCC: Tensor, kind: Planes, prefix_weight: float
) -> tuple[Tensor, Tensor]:
    """Round column after column so that numbers in fewer bits are good as well.

    Every number of bits has targets of its own, in which the later columns make good the errors that it has. A number
    gets the code with the least sum of the squared distances from its targets, each weighted.

    Args:
        weight_NRC: the matrices.
        importance_NC: how much the error of each column weighs where scales are fitted, which is for all bits.
        upper_NCC: U with H^-1 = U^T U, see `coterie.compress.quantisers.gptq`.
        kind: the type.
        prefix_weight: how much a squared distance weighs in one bit less; in two bits less that squared, and so on.

    Returns:
        Bytes (N, R, K), uint8, and values (N, R, C), float32.

    Raises:
        ValueError: columns that are no whole groups.
    """
    num_columns = weight_NRC.shape[-1]
    if num_columns % kind.block:
        raise ValueError(f"{num_columns} columns are no whole groups of {kind.block}, as {kind.name} has them")
    at_once = max(1, _TARGETS_AT_ONCE // (len(weight_NRC) * num_columns))
    parts = [
        _round_some(some_NRC, importance_NC, upper_NCC, kind, prefix_weight)
        for some_NRC in torch.split(weight_NRC, at_once, dim=1)
    ]
    byte_parts, value_parts = zip(*parts, strict=True)
    return torch.cat(byte_parts, dim=1), torch.cat(value_parts, dim=1)


def _round_some(
    weight_NRC: Tensor, importance_NC: Tensor, upper_NCC: Tensor, kind: Planes, prefix_weight: float
) -> tuple[Tensor, Tensor]:
    """Round some rows of all matrices: rows do not hang on each other."""
    num_planes = kind.bits - BASE_BITS + 1
    power_P = torch.arange(num_planes - 1, -1, -1, device=weight_NRC.device)
    counts_P = torch.tensor(float(prefix_weight), device=weight_NRC.device) ** power_P
    target_NRCP = weight_NRC.to(torch.float32)[..., None].repeat(1, 1, 1, num_planes)
    value_NRC, packed = torch.empty_like(weight_NRC, dtype=torch.float32), []
    for start in range(0, weight_NRC.shape[-1], kind.block):
        stop = start + kind.block
        scales = kind.fit(target_NRCP[..., start:stop, -1], importance_NC[:, None, start:stop])
        value_NRLP, codes, errors = kind.values(scales), [], []
        for column in range(start, stop):
            missing_NRLP = target_NRCP[..., column, None, :] - value_NRLP
            code_NR = (missing_NRLP.square() @ counts_P).argmin(dim=-1)
            error_NRP = missing_NRLP.take_along_dim(code_NR[..., None, None], dim=-2).squeeze(-2)
            value_NRC[..., column] = value_NRLP[..., -1].take_along_dim(code_NR[..., None], dim=-1).squeeze(-1)
            error_NRP = error_NRP / upper_NCC[:, None, column, column, None]
            pull_Nc = upper_NCC[:, column, column + 1 : stop]
            target_NRCP[..., column + 1 : stop, :] -= error_NRP[..., None, :] * pull_Nc[:, None, :, None]
            codes.append(code_NR)
            errors.append(error_NRP)
        error_NRBP = torch.stack(errors, dim=-2)
        target_NRCP[..., stop:, :] -= torch.einsum("nrbp,nbc->nrcp", error_NRBP, upper_NCC[:, start:stop, stop:])
        packed.append(kind.pack(scales, Codes(code_NRc=torch.stack(codes, dim=-1).to(torch.int16))))
    return torch.cat(packed, dim=-1), value_NRC


def _nearest(weight_NRv: Tensor, step_NR: Tensor) -> Tensor:
    """Return the base codes (N, R, v) that are nearest to numbers, 0 to 3."""
    return (ratio(weight_NRv, step_NR[..., None]).floor() + 2).clamp(0, 3)


def _level(code_NRv: Tensor) -> Tensor:
    """Return what base codes stand for, in steps: -1.5 to 1.5."""
    return code_NRv.to(torch.float32) - 1.5


def _signed(negative_NRv: Tensor, counts_NR: Tensor) -> Tensor:
    """Return what a plane of signs adds."""
    return (1 - 2 * negative_NRv.to(torch.float32)) * counts_NR[..., None]
