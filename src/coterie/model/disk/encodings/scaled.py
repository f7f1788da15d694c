"""Small numbers with one scale for each block of rows and columns: the arithmetic that several encodings share.

Arithmetic is float32, a band of rows at a time; only the result is in the number format that was chosen. Rounding is to
the nearest number, ties to even. A scale is the smallest at which no number of its block leaves the range of the
format: what is on such a grid already comes back exactly where scales are powers of two, or where a number of the block
is the largest of the format.

Legend: N matrices, R rows, C columns, c columns as stored, g and h blocks along rows and columns, B a band of rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.tensors import TORCH_NAMES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Elements that are computed at a time: 2 MiB in float32, a few times; the allocator keeps some.
BAND = 2**19

#: Scales that are exponents with a bias of 127 (E8M0; 255 is no number).
EXPONENTS = ("U8", "F8_E8M0")

#: What two 4-bit floats (E2M1) can be stored in, the first in the low half of a byte.
PAIRS = ("I8", "U8", "F4")

_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def grid_of(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Return the number of blocks along rows and columns; the last ones may be smaller."""
    return -(-rows // block[0]), -(-columns // block[1])


def unpack_matrices(
    bytes_NRc: Tensor, scale_Ngh: Tensor, block: tuple[int, int], numbers: str, out_NRC: Tensor
) -> None:
    """Fill `out_NRC` with numbers times their scales.

    Args:
        bytes_NRc: the stored numbers as bytes, uint8; c is C, or half of it for pairs of 4-bit floats.
        scale_Ngh: their scales, float32.
        block: rows and columns that share a scale.
        numbers: format of the stored numbers: an 8-bit float, or one of `PAIRS`.
        out_NRC: the result, in whatever format and order.

    Raises:
        UnsupportedDtype: a value is too large for float16.
    """
    import torch

    num_matrices, rows, columns = out_NRC.shape
    narrow = out_NRC.dtype == torch.float16
    value_of = _values_of_bytes(numbers)
    band = max(1, BAND // columns)
    for number in range(num_matrices):
        for start in range(0, rows, band):
            stop = min(start + band, rows)
            # A table is several times faster than torch's own conversion, and serves 4-bit pairs as well.
            places = bytes_NRc[number, start:stop].reshape(-1).to(torch.int32)
            values_BC = value_of.index_select(0, places).view(torch.float32).view(-1, columns)
            values_BC *= _spread(scale_Ngh[number], start, stop, block, columns)
            if narrow:
                check_narrow(values_BC)
            # Converted before it is transposed, which costs by the byte.
            out_NRC[number, start:stop] = values_BC.to(out_NRC.dtype)


def check_narrow(value_BC: Tensor) -> None:
    """Raise UnsupportedDtype where a value is too large for float16."""
    import torch

    if bool((value_BC.abs() > torch.finfo(torch.float16).max).any()):
        raise UnsupportedDtype(f"reaches {float(value_BC.abs().max()):.4g}, more than F16 can hold; choose BF16 or F32")


def check_scales(scale: Tensor) -> None:
    """Raise CorruptCheckpoint where scales are no finite numbers."""
    import torch

    wrong = scale.numel() - int(torch.isfinite(scale).sum())
    if wrong:
        raise CorruptCheckpoint(
            f"has {wrong} of {scale.numel()} scales that are no finite numbers: fetch the file again, or use the "
            "full-precision checkpoint that it was made from"
        )


def pack_matrices(
    value_NRC: Tensor, block: tuple[int, int], numbers: str, scales: str, *, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Round matrices to small numbers; return those as bytes (N, R, c), uint8, and their scales (N, g, h).

    Args:
        value_NRC: the values, in any floating format.
        block: rows and columns that share a scale.
        numbers: format of the stored numbers: an 8-bit float, or one of `PAIRS`.
        scales: format of the scales.
        shared: all matrices have the same scales, which come back as one matrix of them.

    Raises:
        UnsupportedDtype: a value is no finite number, or too large for the format of the scales.
    """
    import torch

    num_matrices, rows, columns = value_NRC.shape
    grid, band = grid_of(rows, columns, block), max(1, BAND // columns)
    largest_Ngh = torch.zeros(num_matrices, *grid)
    for number in range(num_matrices):
        for start in range(0, rows, band):
            stop = min(start + band, rows)
            part_BC = value_NRC[number, start:stop].to(torch.float32).abs()
            padded_BC = torch.nn.functional.pad(part_BC, (0, grid[1] * block[1] - columns))
            part_Bh = padded_BC.view(stop - start, grid[1], block[1]).amax(dim=2)
            row_B = torch.arange(start, stop) // block[0]
            largest_Ngh[number].scatter_reduce_(0, row_B[:, None].expand_as(part_Bh), part_Bh, "amax")
    if not bool(torch.isfinite(largest_Ngh).all()):
        raise UnsupportedDtype(f"holds numbers that are not finite, which cannot be stored as {numbers} with scales")
    if shared:
        largest_Ngh = largest_Ngh.amax(dim=0, keepdim=True)
    scale_Ngh = _scales_for(largest_Ngh, _largest(numbers), scales)
    factor_Ngh = scale_values(scale_Ngh).expand(num_matrices, -1, -1)
    bytes_NRc = torch.empty(num_matrices, rows, columns // (2 if numbers in PAIRS else 1), dtype=torch.uint8)
    for number in range(num_matrices):
        for start in range(0, rows, band):
            stop = min(start + band, rows)
            ratio_BC = value_NRC[number, start:stop].to(torch.float32)
            ratio_BC = ratio_BC / _spread(factor_Ngh[number], start, stop, block, columns)
            bytes_NRc[number, start:stop] = _nearest_bytes(ratio_BC, numbers)
    return bytes_NRc, scale_Ngh


def scale_values(scale: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents with a bias of 127, and 255 is no number (E8M0)."""
    import torch

    if scale.dtype.itemsize > 1:
        return scale.to(torch.float32)
    value_of = torch.exp2(torch.arange(256, dtype=torch.float64) - 127).to(torch.float32)
    value_of[255] = math.nan
    return value_of[scale.view(torch.uint8).to(torch.int32)]


def _spread(scale_gh: Tensor, start: int, stop: int, block: tuple[int, int], columns: int) -> Tensor:
    """Return the scale of every element of a band of rows."""
    import torch

    scale_Bh = scale_gh[torch.arange(start, stop) // block[0]]
    return scale_Bh.repeat_interleave(block[1], dim=1)[:, :columns]


def _scales_for(largest_Ngh: Tensor, limit: float, scales: str) -> Tensor:
    """Return the smallest scales that bring the largest numbers down to a limit; 1 where all numbers are zero."""
    import torch

    ratio_Ngh = largest_Ngh.double() / limit
    zero_Ngh = largest_Ngh == 0
    if scales in EXPONENTS:
        mantissa, exponent = torch.frexp(ratio_Ngh)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)  # itself a power of two
        codes = exponent.clamp(-127, 127).add(127).masked_fill(zero_Ngh, 127).to(torch.uint8)
        return codes.view(getattr(torch, TORCH_NAMES[scales]))
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[scales])
    scale_Ngh = ratio_Ngh.to(torch.float32).to(dtype)
    if not bool(torch.isfinite(scale_Ngh).all()):
        raise UnsupportedDtype(f"reaches {float(largest_Ngh.max()):.4g}, for which a scale in {scales} is too narrow")
    scale_Ngh = scale_Ngh.clamp(min=torch.finfo(dtype).smallest_normal)
    return scale_Ngh.masked_fill(zero_Ngh, 1.0)


def _largest(numbers: str) -> float:
    import torch

    return _FP4_MAGNITUDES[-1] if numbers in PAIRS else float(torch.finfo(getattr(torch, TORCH_NAMES[numbers])).max)


def _nearest_bytes(ratio_BC: Tensor, numbers: str) -> Tensor:
    """Return the bytes (B, c) of the nearest numbers, ties to even; what is beyond the largest becomes it."""
    import torch

    limit = _largest(numbers)
    if numbers not in PAIRS:
        near_BC = ratio_BC.clamp(-limit, limit).to(getattr(torch, TORCH_NAMES[numbers]))
        return near_BC.view(torch.uint8)
    magnitudes = torch.tensor(_FP4_MAGNITUDES)
    bounds = (magnitudes[1:] + magnitudes[:-1]) / 2
    # A number on a bound goes to the even code: up from an odd one, which a bound just below it does.
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros(()))
    codes_BC = torch.bucketize(ratio_BC.abs().contiguous(), bounds).to(torch.uint8)
    codes_BC |= torch.signbit(ratio_BC).to(torch.uint8) << 3
    return codes_BC[:, 0::2] | codes_BC[:, 1::2] << 4


def _values_of_bytes(numbers: str) -> Tensor:
    """Return, for each byte, the float32 value of the 8-bit float that it is; or, as one 64-bit entry, of the pair."""
    import torch

    if numbers not in PAIRS:
        return torch.arange(256, dtype=torch.uint8).view(getattr(torch, TORCH_NAMES[numbers])).to(torch.float32)
    magnitudes = torch.tensor(_FP4_MAGNITUDES)
    value_of = torch.cat((magnitudes, -magnitudes))
    byte = torch.arange(256)
    return torch.stack((value_of[byte & 15], value_of[byte >> 4]), dim=1).view(torch.int64).view(-1)
