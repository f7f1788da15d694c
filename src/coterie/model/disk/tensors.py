"""One tensor as a header describes it: name, number format, shape, place, and how it is unpacked. No torch here."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

#: Bits of one element, by the name that safetensors gives the number format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip

#: Number formats of whole numbers.
WHOLE_NUMBERS = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})

#: The torch dtype of each number format, by its attribute name.
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "F64": "float64", "I64": "int64",
    "U64": "uint64", "C64": "complex64",
}  # fmt: skip

#: The number format of each torch dtype, by its attribute name.
DTYPE_NAMES = {attribute: name for name, attribute in TORCH_NAMES.items()}


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a number format, a key of `DTYPE_BITS`, and a shape take."""
    return -(-math.prod(shape) * DTYPE_BITS[dtype] // 8)


class Encoding(Protocol):
    """How a tensor is stored: as which tensors, in how many bytes; there and back (`coterie.model.disk.encodings`).

    A tensor becomes one or several stored tensors, told apart by a suffix, "" for the one that bears its name.
    Shapes are those of the tensor, not of what is stored. Sizes follow from shapes alone.
    """

    def pack(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what is stored of a tensor, by suffix; lossless for a tensor that was unpacked."""

    def unpack(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the tensor that stored ones, by suffix, are."""

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return number format and shape, as a header states them, of what is stored of a tensor, by suffix."""

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of all that is stored of a tensor."""

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say how some rows of a tensor along its first axis are stored by themselves.

        Args:
            shape: of the whole tensor.
            count: number of rows.

        Returns:
            The encoding of the rows alone, and the suffixes of what serves all rows; of everything else the same rows
            are theirs. None where rows do not lie by themselves.
        """

    def config(self) -> dict[str, Any]:
        """Return the JSON content that makes this encoding again (`coterie.model.disk.encodings.encoding_from`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """How a tensor that is not on disk as such is made from tensors that are.

    Attributes:
        encoding: how they are one.
        stored: what they are, by suffix.
    """

    encoding: Encoding
    stored: Mapping[str, TensorInfo]

    def slice_rows(self, shape: tuple[int, ...], start: int, stop: int) -> Packed | None:
        """Return how rows along the first axis are made from nothing but theirs; None where they cannot be.

        Args:
            shape: of the tensor.
            start: the first row.
            stop: the one behind the last.
        """
        rows = self.encoding.rows(shape, stop - start)
        if rows is None:
            return None
        encoding, shared = rows
        slices = {
            suffix: info if suffix in shared else info.slice_rows(start, stop) for suffix, info in self.stored.items()
        }
        stored = {suffix: info for suffix, info in slices.items() if info is not None}
        return Packed(encoding=encoding, stored=stored) if len(stored) == len(slices) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it.

    Attributes:
        name: its name on disk.
        dtype: its number format, a key of `DTYPE_BITS`.
        shape: its shape.
        shard: the file that holds it.
        begin: where its bytes begin in that file; 0 in a pickle and for a packed tensor.
        end: where they end; 0 in a pickle and for a packed tensor.
        packed: how to make it, and from what, when the files do not hold it as such.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int = 0
    end: int = 0
    packed: Packed | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that this number format and shape take."""
        return bytes_of(self.dtype, self.shape)

    def slice_rows(self, start: int, stop: int) -> TensorInfo | None:
        """Return rows from `start` to before `stop` along the first axis as a tensor of its own, in the same file.

        None where such rows do not lie by themselves: when they do not begin and end at whole bytes, or when what they
        are packed in ties them to other rows. Not for pickles, whose byte positions are not known.

        Raises:
            ValueError: the tensor has no first axis, or it has no such rows.
        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(
                f"{self.shard}: tensor {self.name!r} has shape {list(self.shape)}, so it has no rows {start} to {stop}"
            )
        shape = (stop - start, *self.shape[1:])
        if self.packed is not None:
            packed = self.packed.slice_rows(self.shape, start, stop)
            return None if packed is None else replace(self, shape=shape, packed=packed)
        bits = math.prod(self.shape[1:]) * DTYPE_BITS[self.dtype]
        if bits % 8:
            return None
        return replace(self, shape=shape, begin=self.begin + start * bits // 8, end=self.begin + stop * bits // 8)


def file_bytes(infos: Iterable[TensorInfo]) -> int:
    """Return the size of all weight files, in which tensors, or what they are made of, follow each other to the end."""
    ends: dict[str, int] = {}
    rest = list(infos)
    while rest:
        info = rest.pop()
        ends[info.shard] = max(info.end, ends.get(info.shard, 0))
        if info.packed is not None:
            rest += info.packed.stored.values()
    return sum(ends.values())
