"""Types of our own whose blocks are rotated before they are rounded: TURBO4, TURBO3 and TURBO2.

A block of 256 numbers is multiplied with a fixed random rotation, signs and then a Hadamard matrix. Whatever it held,
its numbers then look as if drawn from a normal distribution, so one scale and the levels that are best for that
distribution serve every block (TurboQuant, arXiv:2504.19874, which rotates by a random orthogonal matrix; signs and a
Hadamard matrix are its usual stand-in, which needs additions alone). Each rotated number bears on every number of the
block, so a block is coded as a whole; within it, in rotated coordinates, each error is made good by the coordinates
that follow.

Nothing but Coterie, and the code that it puts beside a result (`coterie.publish.modeling_coterie`), reads these types.
Legend: as in `block_type`; L levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coterie.model.disk.encodings.ggml.bits import in_groups, pack_bits, unpack_bits
from coterie.model.disk.encodings.ggml.block_type import Codes, Scales, as_half, half_bytes, halves, ratio

#: Numbers of a block.
_BLOCK = 256

#: A bit for each number, the first the highest: 1 turns its sign. They are pi's first 256 binary digits after the
#: point, which nobody chose.
_SIGNS = 0x243F6A8885A308D313198A2E03707344A4093822299F31D0082EFA98EC4E6C89

#: The positive levels at which the mean square error of a standard normal distribution is least (Lloyd 1982, Max 1960),
#: by bits; each level is the mean of what is nearest to it.
_LEVELS = {
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}

#: Scales that are tried, as shares of the root mean square of a block.
_SHARES = (0.85, 0.92, 1.0, 1.08, 1.16)

#: Share of the mean weight of a block's columns that every direction weighs more: some columns may weigh nothing.
_DAMPING = 1e-3

#: Matrices whose metrics are factored at once, in float64: each takes some three MB meanwhile.
_MATRICES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=False)
class Rotated:
    """A type of this kind; see `block_type.BlockType` for what it does.

    Attributes:
        bits: of a code: 2, 3 or 4.
    """

    name: str
    bits: int
    block: int = _BLOCK
    sub_block: int = _BLOCK
    together: int = _BLOCK

    @property
    def numbers_at(self) -> slice:
        """Where the scale lies in a block's bytes."""
        return slice(0, 2)

    @cached_property
    def levels(self) -> Tensor:
        """What codes stand for (L), in units of the scale, float32."""
        upper = torch.tensor(_LEVELS[self.bits])
        return torch.cat((-upper.flip(0), upper))

    def _nearest(self, rotated: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and levels nearest to rotated numbers in units of scales, which broadcast."""
        level_L = self.levels.to(rotated.device)
        code = torch.bucketize(ratio(rotated, scale), (level_L[1:] + level_L[:-1]) / 2)
        return code, level_L[code]

    def fit(self, weight_NRB: Tensor, importance_NRB: Tensor) -> Scales:
        """Search the scale; importance does not matter, since every rotated number bears on all columns alike."""
        rotated_NRB = rotate(weight_NRB)
        start_NR1 = rotated_NRB.square().mean(dim=-1, keepdim=True).sqrt()
        least_NR1, best_NR1 = torch.full_like(start_NR1, torch.inf), torch.zeros_like(start_NR1)
        for share in _SHARES:
            _, level_NRB = self._nearest(rotated_NRB, start_NR1 * share)
            mixed_NR1 = (level_NRB * rotated_NRB).sum(dim=-1, keepdim=True)
            scale_NR1 = as_half(ratio(mixed_NR1, level_NRB.square().sum(dim=-1, keepdim=True)))
            error_NR1 = (rotated_NRB - level_NRB * scale_NR1).square().sum(dim=-1, keepdim=True)
            best_NR1 = torch.where(error_NR1 < least_NR1, scale_NR1, best_NR1)
            least_NR1 = torch.minimum(error_NR1, least_NR1)
        return Scales(scale_NR=best_NR1.squeeze(-1), factor_NRS=torch.ones_like(best_NR1))

    def choose(self, weight_NRv: Tensor, scales: Scales, column: int, metric_Nvv: Tensor) -> tuple[Codes, Tensor]:
        """Choose codes of a block one rotated number after the other, errors made good as by GPTQ.

        Where all errors weigh the same there is nothing to make good, and they are the nearest. Else, with e the error
        in rotated coordinates and T upper triangular, the error of a row is |e T|^2. Its j-th term is zero where
        e_j T_jj = -(sum over i < j of e_i T_ij), so that is what the j-th number is rounded towards.
        """
        scale_NR1 = scales.scale_NR[..., None]
        rotated_NRv = rotate(weight_NRv)
        if _is_even(metric_Nvv):
            code_NRv, level_NRv = self._nearest(rotated_NRv, scale_NR1)
            return Codes(code_NRc=code_NRv.to(torch.int16)), rotate_back(level_NRv * scale_NR1)
        upper_Nvv = _triangular(metric_Nvv)
        pull_Nvv = upper_Nvv / upper_Nvv.diagonal(dim1=-2, dim2=-1)[:, None]
        code_NRv = torch.empty_like(rotated_NRv, dtype=torch.int16)
        level_NRv, error_NRv = torch.empty_like(rotated_NRv), torch.zeros_like(rotated_NRv)
        for place in range(self.block):
            pulled_NR = (error_NRv[..., :place] @ pull_Nvv[:, :place, place, None]).squeeze(-1)
            code_NR, level_NR = self._nearest(rotated_NRv[..., place] + pulled_NR, scales.scale_NR)
            code_NRv[..., place], level_NRv[..., place] = code_NR, level_NR
            error_NRv[..., place] = rotated_NRv[..., place] - level_NR * scales.scale_NR
        return Codes(code_NRc=code_NRv), rotate_back(level_NRv * scale_NR1)

    def pack(self, scales: Scales, codes: Codes) -> Tensor:
        """Return the bytes of a block: the scale, the lower bits of codes, and of three the upper one."""
        code_NRB = codes.code_NRc
        if self.bits == 3:
            parts = [pack_bits(code_NRB & 3, 2, 32), pack_bits(code_NRB >> 2, 1, 32)]
        else:
            parts = [pack_bits(code_NRB, self.bits, 32)]
        return torch.cat([half_bytes(scales.scale_NR), *parts], dim=-1)

    def unpack(self, byte_NRK: Tensor) -> Tensor:
        """Return the values of blocks."""
        code_NRK = byte_NRK[..., 2:]
        if self.bits == 3:
            code_NRB = unpack_bits(code_NRK[..., :64], 2, 32) | unpack_bits(code_NRK[..., 64:], 1, 32) << 2
        else:
            code_NRB = unpack_bits(code_NRK, self.bits, 32)
        level_NRB = self.levels.to(byte_NRK.device)[code_NRB.long()]
        return rotate_back(level_NRB * halves(byte_NRK[..., :2])[..., None])


def rotate(value_B: Tensor) -> Tensor:
    """Return blocks (..., 256) of numbers, their signs turned, times the Hadamard matrix over 16."""
    return _transformed(value_B * _signs(value_B))


def rotate_back(value_B: Tensor) -> Tensor:
    """Return the blocks (..., 256) that `rotate` made these of: the matrix is its own inverse."""
    numbers: Tensor = _transformed(value_B) * _signs(value_B)
    return numbers


def _signs(like: Tensor) -> Tensor:
    turned = [_SIGNS >> place & 1 for place in reversed(range(_BLOCK))]
    return 1 - 2 * torch.tensor(turned, dtype=like.dtype, device=like.device)


def _transformed(value_B: Tensor) -> Tensor:
    """Return blocks times the Hadamard matrix over 16: sums in a fixed order, so the same bits on every machine."""
    for _ in range(_BLOCK.bit_length() - 1):
        pair_H2 = in_groups(value_B, 2)
        value_B = torch.cat((pair_H2[..., 0] + pair_H2[..., 1], pair_H2[..., 0] - pair_H2[..., 1]), dim=-1)
    numbers: Tensor = value_B / 16
    return numbers


def _is_even(metric_Nvv: Tensor) -> bool:
    """Tell whether errors of all columns weigh the same: then those of all rotated numbers do."""
    first_N11 = metric_Nvv[:, :1, :1]
    return torch.equal(metric_Nvv, first_N11 * torch.eye(metric_Nvv.shape[-1], device=metric_Nvv.device))


def _triangular(metric_Nvv: Tensor) -> Tensor:
    """Return T (N, v, v), upper triangular, with |e T| = |e' M| for errors e' of columns that are e when rotated."""
    return torch.cat([_factor(some_Nvv) for some_Nvv in torch.split(metric_Nvv, _MATRICES_AT_ONCE)])


def _factor(metric_Nvv: Tensor) -> Tensor:
    turned_Nvv = rotate(metric_Nvv.to(torch.float64).mT).mT
    gram_Nvv = turned_Nvv @ turned_Nvv.mT
    mean_N = gram_Nvv.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    added_N = torch.where(mean_N > 0, _DAMPING * mean_N, 1.0)
    eye_vv = torch.eye(gram_Nvv.shape[-1], dtype=torch.float64, device=gram_Nvv.device)
    # T T^T is the Gram matrix: the factor of it turned about, turned back.
    lower_Nvv: Tensor = torch.linalg.cholesky((gram_Nvv + added_N[:, None, None] * eye_vv).flip(-2, -1))
    return lower_Nvv.flip(-2, -1).to(torch.float32)


TYPES = {
    "TURBO4": Rotated(name="TURBO4", bits=4),
    "TURBO3": Rotated(name="TURBO3", bits=3),
    "TURBO2": Rotated(name="TURBO2", bits=2),
}
