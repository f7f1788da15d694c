"""Integers of 4 bits in groups of columns, as AWQ's tools store them in the version "gemm": the matrix transposed.

A word holds one column's numbers of eight rows, from its lowest bits on of the rows 0, 2, 4, 6, 1, 3, 5, 7; zeros of
groups are packed alike (AutoAWQ, ``utils/packing_utils``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coterie.errors import UnsupportedDtype
from coterie.model.disk.encodings import integers, scaled
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

#: Rows of a word, from its lowest bits on; and where each row is.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(_ORDER.index(row) for row in range(8))

_BITS = 4
_SIZE = integers.WORD // _BITS

_ZEROS, _SCALES = "_zeros", "_scales"


@dataclass(frozen=True, kw_only=True, slots=True)
class Awq:
    """``qweight`` (C, R in words), ``qzeros`` (G, R in words) and ``scales`` (G, R) of a matrix (R, C).

    Attributes:
        group: columns that share a scale; None where all do.
        scales: format of the scales.
        dtype: format of what is unpacked.

    Raises:
        ValueError: no such encoding.
    """

    group: int | None = 128
    scales: str = "F16"
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if (self.group is not None and self.group < 1) or self.scales not in integers.SCALE_DTYPES:
            raise ValueError(f"scales are {self.scales!r} and groups {self.group} wide: no such encoding is known")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Round a matrix (R, C) to the nearest numbers.

        Raises:
            UnsupportedDtype: a shape or a number that cannot be stored so.
        """
        import torch

        self.stored(tuple(tensor.shape))
        code_RC, zero_RG, scale_RG = integers.rounded(tensor, self.group or tensor.shape[1], _BITS, zero=None)
        return {
            "": integers.words_of(_permuted(code_RC, _ORDER).T.contiguous(), _BITS),
            _ZEROS: integers.words_of(_permuted(zero_RG.to(torch.uint8), _ORDER).T.contiguous(), _BITS),
            _SCALES: scale_RG.T.contiguous().to(getattr(torch, TORCH_NAMES[self.scales])),
        }

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values (R, C).

        Raises:
            CorruptCheckpoint: scales are no finite numbers.
            UnsupportedDtype: a value is too large for `dtype`.
        """
        import torch

        word_CW, scale_RG = stored[""], stored[_SCALES].to(torch.float32).T
        scaled.check_scales(scale_RG)
        zero_RG = _permuted(integers.codes_of(stored[_ZEROS], _BITS).T, _PLACES).to(torch.float32)
        rows, columns = len(scale_RG), len(word_CW)
        group_C = integers.groups_in_order(columns, self.group or columns)
        out_RC = torch.empty(rows, columns, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        band = max(1, scaled.BAND // rows)
        for start in range(0, columns, band):
            part = slice(start, start + band)
            code_RB = _permuted(integers.codes_of(word_CW[part], _BITS).T, _PLACES)
            integers.fill(out_RC[:, part], code_RB, zero_RG, scale_RG, group_C[part])
        return out_RC

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return formats and shapes of numbers, zeros and scales.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        if len(shape) != 2 or min(shape) < 1 or shape[0] % _SIZE:
            raise UnsupportedDtype(
                f"{list(shape)} cannot be stored in {_BITS} bits: that takes a matrix, its rows a multiple of {_SIZE}"
            )
        rows, columns = shape
        groups = -(-columns // (self.group or columns))
        return {
            "": ("I32", (columns, rows // _SIZE)), _ZEROS: ("I32", (groups, rows // _SIZE)),
            _SCALES: (self.scales, (groups, rows)),
        }  # fmt: skip

    def shape_of(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a matrix whose numbers have this one."""
        return numbers[1] * _SIZE, numbers[0]

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of all that is stored of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that rows do not lie by themselves: the matrix is stored transposed."""
        return None

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {"encoding": "awq", "group": self.group, "scales": self.scales, "dtype": self.dtype}


def _permuted(code_RP: Tensor, places: tuple[int, ...]) -> Tensor:
    """Return codes with each eight rows in another order."""
    return code_RP.reshape(-1, _SIZE, code_RP.shape[1])[:, list(places)].flatten(0, 1)
