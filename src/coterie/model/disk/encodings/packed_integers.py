"""Integers of 4 or 8 bits with a scale for each group of columns, row or matrix, as compressed-tensors stores them.

Numbers are signed. In words of 32 bits they stand along a row with half of their range added, and the zeros of groups
stand so along a column (compressed-tensors 0.17, ``compressors/pack_quantized``); in bytes they are as they are
(``compressors/naive_quantized``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.encodings import integers, scaled
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

_SCALE, _ZERO, _SHAPE, _GROUPS = "_scale", "_zero_point", "_shape", "_g_idx"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedIntegers:
    """A matrix of integers, and tensors of scales, zeros, groups and its shape beside it.

    Attributes:
        bits: 4, or 8.
        words: numbers are in words, and their shape is stored; else 8-bit integers.
        group: columns that share a scale; None where all of a row do.
        zeros: "none"; "words", one a group, packed along a column; "plain", 8-bit integers, as many as scales.
        index: the group of every column is stored; a -1 there means that they are in order.
        scales: format of the scales, one of `integers.SCALE_DTYPES`.
        shapes: format of the shape, "I64" or "I32".
        scale_shape: shape of the tensor of scales where it is not (rows, groups): one scale for all, or a list.
        dtype: format of what is unpacked.

    Raises:
        ValueError: no such encoding.
    """

    bits: int = 4
    words: bool = True
    group: int | None = 128
    zeros: str = "none"
    index: bool = False
    scales: str = "BF16"
    shapes: str = "I64"
    scale_shape: tuple[int, ...] | None = None
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if self.bits not in ((4, 8) if self.words else (8,)) or (self.group is not None and self.group < 1):
            raise ValueError(f"{self.bits} bits are in groups of {self.group}: no such encoding is known")
        if (
            self.shapes not in ("I64", "I32")
            or self.zeros not in ("none", "words", "plain")
            or self.scales not in integers.SCALE_DTYPES
        ):
            raise ValueError(f"zeros are {self.zeros!r} and scales {self.scales!r}: no such encoding is known")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Round a matrix (R, C) to the nearest numbers; scales of one for all are those of the largest row.

        Raises:
            UnsupportedDtype: a shape or a number that cannot be stored so.
        """
        import torch

        expected = self.stored(tuple(tensor.shape))
        rows, columns = tensor.shape
        half = 2.0 ** (self.bits - 1)
        one = expected[_SCALE][1] in ((), (1,), (1, 1)) and rows > 1
        value_PC = tensor.reshape(1, -1) if one else tensor
        code_PC, zero_PG, scale_PG = integers.rounded(
            value_PC, value_PC.shape[1] if one else self.group or columns, self.bits,
            zero=half if self.zeros == "none" else None,
        )  # fmt: skip
        code_RC = code_PC.reshape(rows, columns)
        if self.words:
            stored = {"": integers.words_of(code_RC, self.bits), _SHAPE: torch.tensor([rows, columns])}
            stored[_SHAPE] = stored[_SHAPE].to(getattr(torch, TORCH_NAMES[self.shapes]))
        else:
            stored = {"": (code_RC.to(torch.int16) - int(half)).to(torch.int8)}
        stored[_SCALE] = scale_PG.to(getattr(torch, TORCH_NAMES[self.scales])).reshape(expected[_SCALE][1])
        if self.zeros == "words":
            zero_GR = zero_PG.to(torch.uint8).T.contiguous()
            stored[_ZERO] = integers.words_of(zero_GR, self.bits).T.contiguous()
        elif self.zeros == "plain":
            stored[_ZERO] = (zero_PG - half).to(torch.int8).reshape(expected[_ZERO][1])
        if self.index:
            stored[_GROUPS] = integers.groups_in_order(columns, self.group or columns).to(torch.int32)
        return stored

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values (R, C).

        Raises:
            CorruptCheckpoint: scales are no finite numbers, columns are in no group, or another shape is stored.
            UnsupportedDtype: a value is too large for `dtype`.
        """
        import torch

        numbers, scale = stored[""], stored[_SCALE].to(torch.float32)
        scaled.check_scales(scale)
        rows, half = numbers.shape[0], 2.0 ** (self.bits - 1)
        scale_RG = scale.view(1, 1).expand(rows, 1) if scale.numel() == 1 else scale.view(rows, -1)
        groups = scale_RG.shape[1]
        columns = self._columns(numbers.shape[1], groups)
        if self.words and stored[_SHAPE].tolist() != [rows, columns]:
            raise CorruptCheckpoint(
                f"is {stored[_SHAPE].tolist()} as is stored beside it, and {[rows, columns]} as its words and scales "
                "are; use the full-precision checkpoint that it was made from"
            )
        zero_RG: Tensor | float = half
        if self.zeros == "words":
            code_GR = integers.codes_of(stored[_ZERO].T, self.bits)[:, :rows]
            zero_RG = code_GR.T.to(torch.float32)
        elif self.zeros == "plain":
            zero = stored[_ZERO].to(torch.float32) + half
            zero_RG = zero.view(1, 1).expand(rows, 1) if zero.numel() == 1 else zero.view(rows, -1)
        group_C = integers.groups_in_order(columns, self.group or columns)
        if self.index and bool((stored[_GROUPS] >= 0).all()):
            group_C = integers.checked_groups(stored[_GROUPS], groups)
        out_RC = torch.empty(rows, columns, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        band = max(1, scaled.BAND // columns)
        for start in range(0, rows, band):
            part = slice(start, start + band)
            if self.words:
                code_BC = integers.codes_of(numbers[part], self.bits)[:, :columns]
            else:
                code_BC = numbers[part].to(torch.int16) + int(half)
            zero_BG = zero_RG if isinstance(zero_RG, float) else zero_RG[part]
            integers.fill(out_RC[part], code_BC, zero_BG, scale_RG[part], group_C)
        return out_RC

    def _columns(self, extent: int, groups: int) -> int:
        """Return the columns of a matrix whose numbers and scales have these extents."""
        if not self.words:
            return extent
        capacity = extent * integers.WORD // self.bits
        return capacity if self.group is None else min(capacity, groups * self.group)

    def shape_of(self, numbers: tuple[int, ...], groups: int) -> tuple[int, int]:
        """Return the shape of a matrix whose numbers have this one, with as many groups in a row.

        The last word of a row may hold fewer numbers than it could; where no whole groups tell, that shows only as the
        matrix is unpacked.

        Raises:
            UnsupportedDtype: no matrix has.
        """
        if len(numbers) != 2 or min(*numbers, groups) < 1:
            raise UnsupportedDtype(f"{list(numbers)} are no numbers of a matrix")
        shape = numbers[0], self._columns(numbers[1], groups)
        if self.stored(shape)[""][1] != numbers or groups != -(-shape[1] // (self.group or shape[1])):
            raise UnsupportedDtype(f"{list(numbers)} with {groups} scales a row are no groups of {self.group} columns")
        return shape

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return formats and shapes of numbers, scales and what else is beside them.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        if len(shape) != 2 or min(shape) < 1:
            raise UnsupportedDtype(f"{list(shape)} cannot be stored in {self.bits} bits: that takes a matrix")
        rows, columns = shape
        groups = -(-columns // (self.group or columns))
        if self._columns(integers.num_words(columns, self.bits) if self.words else columns, groups) != columns:
            raise UnsupportedDtype(
                f"{list(shape)} cannot be stored in {self.bits} bits: rows leave room in their last word, and no whole "
                "groups tell how much"
            )
        scales = (rows, groups) if self.scale_shape is None else self.scale_shape
        stored: dict[str, tuple[str, tuple[int, ...]]] = {"": ("I8", shape)}
        if self.words:
            stored = {"": ("I32", (rows, integers.num_words(columns, self.bits))), _SHAPE: (self.shapes, (2,))}
        stored[_SCALE] = (self.scales, scales)
        if self.zeros == "words":
            stored[_ZERO] = ("I32", (integers.num_words(rows, self.bits), groups))
        elif self.zeros == "plain":
            stored[_ZERO] = ("I8", scales)
        if self.index:
            stored[_GROUPS] = ("I32", (columns,))
        return stored

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of all that is stored of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that rows of a single matrix do not lie by themselves: zeros of several share a word."""
        return None

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {
            "encoding": "packed-integers", "bits": self.bits, "words": self.words, "group": self.group,
            "zeros": self.zeros, "index": self.index, "scales": self.scales, "shapes": self.shapes,
            "scale_shape": None if self.scale_shape is None else list(self.scale_shape), "dtype": self.dtype,
        }  # fmt: skip
