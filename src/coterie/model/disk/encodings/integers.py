"""Whole numbers in 32-bit words, a scale and perhaps a zero for each group of columns: what encodings of them share.

A value is (code - zero) times scale, in float32, a band of the matrix at a time; only the result is in the number
format that was chosen. Codes are 0 or more, and the first of a word is in its lowest bits.

Legend: R rows, C columns, G groups of columns, B columns of a band, P and Q axes of any part, W words, N codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.encodings import scaled

if TYPE_CHECKING:
    from torch import Tensor

#: Bits of a word.
WORD = 32

#: Formats of scales.
SCALE_DTYPES = ("F32", "F16", "BF16")


def codes_of(word_PW: Tensor, bits: int) -> Tensor:
    """Return the codes (P, W * 32 / bits), uint8, of words, int32; `bits` divides 8."""
    import torch

    # In one axis first: a tensor that has an axis of 1 may have any stride there and still be contiguous.
    byte_PK = word_PW.reshape(-1).view(torch.uint8).view(*word_PW.shape[:-1], -1)
    if bits == 8:
        return byte_PK
    shift = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (byte_PK[..., None] >> shift & (1 << bits) - 1).flatten(-2)


def words_of(code_PN: Tensor, bits: int) -> Tensor:
    """Return the words (P, W), int32, of codes, uint8; the last word is filled up with zeros."""
    import torch

    padded_PN = torch.nn.functional.pad(code_PN, (0, -code_PN.shape[-1] % (WORD // bits)))
    part_PKN = padded_PN.view(*padded_PN.shape[:-1], -1, 8 // bits)
    byte_PK = torch.zeros(part_PKN.shape[:-1], dtype=torch.uint8)
    for place in range(8 // bits):
        byte_PK |= part_PKN[..., place] << place * bits
    return byte_PK.view(torch.int32)


def num_words(count: int, bits: int) -> int:
    """Return the words that hold as many codes."""
    return -(-count * bits // WORD)


def added_to_codes(word_PW: Tensor, number: int, bits: int) -> Tensor:
    """Return words, int32, with a number added to each code; what leaves a code goes to the next one of its word."""
    import torch

    ones = sum(1 << place for place in range(0, WORD, bits))
    total_PW = word_PW.to(torch.int64) + number * ones
    return ((total_PW + 2**31) % 2**32 - 2**31).to(torch.int32)


def fill(out_PQ: Tensor, code_PQ: Tensor, zero_PG: Tensor | float, scale_PG: Tensor, group_Q: Tensor) -> None:
    """Write (code - zero) * scale into a part of a matrix.

    Args:
        out_PQ: the part, in whatever format and order.
        code_PQ: its codes.
        zero_PG: the zeros of its groups, float32, or one for all.
        scale_PG: the scales of its groups, float32.
        group_Q: the group of each column.

    Raises:
        UnsupportedDtype: a value is too large for float16.
    """
    import torch

    value_PQ = code_PQ.to(torch.float32)
    value_PQ -= zero_PG if isinstance(zero_PG, float) else zero_PG.index_select(1, group_Q)
    value_PQ *= scale_PG.index_select(1, group_Q)
    if out_PQ.dtype == torch.float16:
        scaled.check_narrow(value_PQ)
    out_PQ.copy_(value_PQ)


def groups_in_order(columns: int, group: int) -> Tensor:
    """Return the group (C,), int64, of every column where `group` of them follow each other."""
    import torch

    return torch.arange(columns) // group


def checked_groups(index_C: Tensor, groups: int) -> Tensor:
    """Return the group of every column, as a stored tensor says it, int64.

    Raises:
        CorruptCheckpoint: there is no such group.
    """
    import torch

    low, high = int(index_C.min()), int(index_C.max())
    if low < 0 or high >= groups:
        raise CorruptCheckpoint(
            f"assigns columns to groups {low} to {high}, and there are groups 0 to {groups - 1}: fetch the file again"
        )
    return index_C.to(torch.int64)


def rounded(value_RC: Tensor, group: int, bits: int, *, zero: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix to the nearest codes; return those (R, C), uint8, zeros and scales (R, G), float32.

    The scale is the smallest at which no number of its group leaves the range.

    Args:
        value_RC: the values.
        group: columns that share a scale; the last ones may be fewer.
        bits: of a code.
        zero: the code of the number 0, where that is the same for all; None to choose it for each group.

    Raises:
        UnsupportedDtype: a value is no finite number.
    """
    import torch

    value_RC = value_RC.to(torch.float32)
    if not bool(torch.isfinite(value_RC).all()):
        raise UnsupportedDtype(f"holds numbers that are not finite, which cannot be stored in {bits} bits with scales")
    rows, columns = value_RC.shape
    value_RGK = torch.nn.functional.pad(value_RC, (0, -columns % group)).view(rows, -1, group)
    low_RG, high_RG, top = value_RGK.amin(dim=2).clamp(max=0), value_RGK.amax(dim=2).clamp(min=0), 2**bits - 1
    scale_RG = (high_RG - low_RG) / top if zero is None else torch.maximum(-low_RG / zero, high_RG / (top - zero))
    scale_RG = scale_RG.masked_fill(scale_RG == 0, 1.0)
    zero_RG = (-low_RG / scale_RG).round() if zero is None else torch.full_like(scale_RG, zero)
    code_RGK = (value_RGK / scale_RG[..., None] + zero_RG[..., None]).round().clamp(0, top)
    return code_RGK.view(rows, -1)[:, :columns].to(torch.uint8), zero_RG, scale_RG
