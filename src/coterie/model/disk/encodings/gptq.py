"""Integers of 2, 4 or 8 bits in groups of columns, as GPTQ's tools store them: the matrix transposed.

A word holds numbers of one row of the matrix, columns after each other; the zeros of a group are packed along its rows
(AutoGPTQ, ``nn_modules/qlinear``). In the format "gptq" one was subtracted from each zero, from whole words at once, so
that a zero of 0 borrows from its neighbour; adding to whole words gives back all of them (GPTQModel, ``utils/model``,
``convert_gptq_v1_to_v2_format``). In "gptq_v2" they are as they are.
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

#: Bits of a number. With 3, tools disagree about the zeros.
BITS = (2, 4, 8)

_ZEROS, _SCALES, _GROUPS = "_zeros", "_scales", "_g_idx"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq:
    """``qweight`` (C in words, R), ``qzeros`` (G, R in words), ``scales`` (G, R), ``g_idx`` (C) of a matrix (R, C).

    Attributes:
        bits: one of `BITS`.
        group: columns that share a scale; None where all do.
        offset: what was subtracted from the zeros, 0 or 1.
        index: the group of every column is stored.
        ordered: and it must say that columns are in order.
        scales: format of the scales.
        dtype: format of what is unpacked.

    Raises:
        ValueError: no such encoding.
    """

    bits: int = 4
    group: int | None = 128
    offset: int = 1
    index: bool = True
    ordered: bool = True
    scales: str = "F16"
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if self.bits not in BITS or (self.group is not None and self.group < 1) or self.offset not in (0, 1):
            raise ValueError(f"{self.bits} bits are in groups of {self.group}: no such encoding is known")
        if self.scales not in integers.SCALE_DTYPES:
            raise ValueError(f"scales are {self.scales!r}: no such encoding is known")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Round a matrix (R, C) to the nearest numbers, columns in order.

        Raises:
            UnsupportedDtype: a shape or a number that cannot be stored so.
        """
        import torch

        self.stored(tuple(tensor.shape))
        columns = tensor.shape[1]
        code_RC, zero_RG, scale_RG = integers.rounded(tensor, self.group or columns, self.bits, zero=None)
        zeros = integers.words_of(zero_RG.to(torch.uint8).T.contiguous(), self.bits)
        stored = {
            "": integers.words_of(code_RC, self.bits).T.contiguous(),
            _ZEROS: integers.added_to_codes(zeros, -self.offset, self.bits),
            _SCALES: scale_RG.T.contiguous().to(getattr(torch, TORCH_NAMES[self.scales])),
        }
        if self.index:
            stored[_GROUPS] = integers.groups_in_order(columns, self.group or columns).to(torch.int32)
        return stored

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values (R, C).

        Raises:
            CorruptCheckpoint: scales are no finite numbers, or columns are in no group or out of order.
            UnsupportedDtype: a value is too large for `dtype`.
        """
        import torch

        word_WR, scale_RG = stored[""], stored[_SCALES].to(torch.float32).T
        scaled.check_scales(scale_RG)
        zeros = integers.added_to_codes(stored[_ZEROS], self.offset, self.bits)
        zero_RG = integers.codes_of(zeros, self.bits).to(torch.float32).T
        (words, rows), size = word_WR.shape, integers.WORD // self.bits
        columns = words * size
        group_C = integers.groups_in_order(columns, self.group or columns)
        if self.index:
            stored_C = integers.checked_groups(stored[_GROUPS], scale_RG.shape[1])
            if self.ordered and not torch.equal(stored_C, group_C):
                raise CorruptCheckpoint(
                    "has columns out of order in g_idx, and config.json says desc_act = false and groups of "
                    f"{self.group}: correct config.json, or use the full-precision checkpoint that it was made from"
                )
            group_C = stored_C
        out_RC = torch.empty(rows, columns, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        band = max(1, scaled.BAND // (rows * size))
        for start in range(0, words, band):
            code_RB = integers.codes_of(word_WR[start : start + band].T, self.bits)
            part = slice(start * size, start * size + code_RB.shape[1])
            integers.fill(out_RC[:, part], code_RB, zero_RG, scale_RG, group_C[part])
        return out_RC

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return formats and shapes of numbers, zeros, scales and groups.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        size = integers.WORD // self.bits
        if len(shape) != 2 or min(shape) < 1 or shape[0] % size or shape[1] % size:
            raise UnsupportedDtype(
                f"{list(shape)} cannot be stored in {self.bits} bits: that takes a matrix, both axes a multiple of "
                f"{size}"
            )
        rows, columns = shape
        groups = -(-columns // (self.group or columns))
        stored = {
            "": ("I32", (columns // size, rows)), _ZEROS: ("I32", (groups, rows // size)),
            _SCALES: (self.scales, (groups, rows)),
        }  # fmt: skip
        return stored | ({_GROUPS: ("I32", (columns,))} if self.index else {})

    def shape_of(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a matrix whose numbers have this one."""
        return numbers[1], numbers[0] * integers.WORD // self.bits

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of all that is stored of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that rows do not lie by themselves: the matrix is stored transposed."""
        return None

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {
            "encoding": "gptq", "bits": self.bits, "group": self.group, "offset": self.offset, "index": self.index,
            "ordered": self.ordered, "scales": self.scales, "dtype": self.dtype,
        }  # fmt: skip
