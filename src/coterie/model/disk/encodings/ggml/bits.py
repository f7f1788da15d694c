"""Small whole numbers side by side in bytes, as GGML lays them out: in runs, which vector units unpack at once."""

from __future__ import annotations

import torch
from torch import Tensor


def in_groups(value_C: Tensor, *sizes: int) -> Tensor:
    """Return a tensor with its last axis split into groups of these extents: (..., C) as (..., groups, *sizes)."""
    return value_C.reshape(*value_C.shape[:-1], -1, *sizes)


def pack_bits(number_C: Tensor, bits: int, run: int) -> Tensor:
    """Return bytes (..., C * bits / 8) that hold numbers below 2^bits (..., C); uint8.

    Args:
        number_C: the numbers.
        bits: of each: 1, 2 or 4.
        run: bytes of a run. The first `run` numbers lie in the lowest bits of a run's bytes, the next ones above them.
    """
    number_Gkr = in_groups(number_C.to(torch.uint8), 8 // bits, run)
    shift_k1 = torch.arange(0, 8, bits, dtype=torch.uint8, device=number_C.device)[:, None]
    # Sums of numbers that share no bit: the sum is their union.
    return (number_Gkr << shift_k1).sum(dim=-2, dtype=torch.uint8).flatten(-2)


def unpack_bits(byte_K: Tensor, bits: int, run: int) -> Tensor:
    """Return the numbers (..., K * 8 / bits) that `pack_bits` made bytes of; uint8."""
    byte_G1r = in_groups(byte_K, 1, run)
    shift_k1 = torch.arange(0, 8, bits, dtype=torch.uint8, device=byte_K.device)[:, None]
    number_Gkr: Tensor = (byte_G1r >> shift_k1) & (2**bits - 1)
    return number_Gkr.flatten(-3)


def pack_words(number_W: Tensor, size: int) -> Tensor:
    """Return the bytes (..., W * size) of whole numbers of `size` bytes each, the lowest byte first; uint8."""
    shift_s = torch.arange(0, 8 * size, 8, device=number_W.device)
    return ((number_W.to(torch.int64).unsqueeze(-1) >> shift_s) & 255).to(torch.uint8).flatten(-2)


def unpack_words(byte_K: Tensor, size: int) -> Tensor:
    """Return the whole numbers (..., K / size) of `size` bytes each; int64."""
    shift_s = torch.arange(0, 8 * size, 8, device=byte_K.device)
    return (in_groups(byte_K, size).to(torch.int64) << shift_s).sum(dim=-1)
