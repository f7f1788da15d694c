"""The header of a GGUF file: fields and places of tensors, read and checked against the file. No numpy, no torch.

The layout: ``docs/gguf.md`` of ggml. A file may be hostile: nothing is believed before it fits into the bytes that are
there, long lists are walked over and only read when they are asked for, and a file of any size takes a few milliseconds
and as many kilobytes. (The package gguf keeps an array for every token, and walks beyond the end of a damaged file.)
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.damage import check_no_pointer
from coterie.model.disk.encodings.ggml import SIZES
from coterie.model.disk.header import absence

MAGIC = b"GGUF"

#: What a number that stands for a type of tensors means, of those that are read; ``ggml_type`` in ``ggml.h``.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

#: Those that exist and are not read.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 40: "NVFP4",
}  # fmt: skip

#: Bytes of a plain number.
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}

#: How a field of each kind but texts and lists is packed; ``gguf_type`` in ``gguf.h``.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9

#: What is believed of counts and lengths; the largest vocabularies have some hundred thousand entries.
_LONGEST_LIST, _LONGEST_NAME, _MOST_FIELDS, _MOST_TENSORS, _MOST_AXES = 2**24, 2**16 - 1, 2**16, 2**20, 4
_ALIGNMENTS = tuple(2**power for power in range(17))


@dataclass(frozen=True, kw_only=True, slots=True)
class List:
    """A list in a header, that is not read yet.

    Attributes:
        path: the file.
        kind: number that stands for the kind of its entries.
        count: how many they are.
        begin: where they begin.
    """

    path: Path
    kind: int
    count: int
    begin: int

    def values(self) -> list[Any]:
        """Return the entries.

        Raises:
            CorruptCheckpoint: a text is no UTF-8, or the file was cut off meanwhile.
        """
        with _Bytes.of(self.path) as content:
            content.position = self.begin
            if self.kind == _TEXT:
                return [content.text() for _ in range(self.count)]
            return list(content.numbers(_FORMATS[self.kind], self.count))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        name: its name there.
        type: its type, a key of `PLAIN` or a block type of GGML.
        shape: its shape, output axis first, as in torch.
        shard: name of the file.
        begin: where its bytes begin in that file.
        end: where they end.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufHeader:
    """What the header of a file says.

    Attributes:
        path: the file.
        fields: values by name; those of a list are read when asked for.
        tensors: by name, in the order of the file.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        CorruptCheckpoint: it is cut off, says what cannot be, or is no GGUF file.
        UnsupportedDtype: a version, a byte order or a type that is not read.
    """
    if not path.is_file():
        raise CorruptCheckpoint(f"{path}: the file {absence(path)}; fetch this file again")
    check_no_pointer(path)
    with _Bytes.of(path) as content:
        if content.take(4) != MAGIC:
            raise content.wrong("it does not begin with GGUF, so it is no GGUF file")
        version = content.number("I")
        if version not in (2, 3):
            reason = "in the other byte order" if version and not version % 2**16 else f"of version {version}"
            raise UnsupportedDtype(f"{path} is a GGUF file {reason}; versions 2 and 3 in little endian are read")
        num_tensors = content.count("tensors", _MOST_TENSORS)
        num_fields = content.count("fields", _MOST_FIELDS)
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = content.name()
            if name in fields:
                raise content.wrong(f"the field {name!r} occurs twice")
            fields[name] = content.value(content.number("I"), name)
        entries = [_entry(content) for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in _ALIGNMENTS:
            raise content.wrong(f"general.alignment is {alignment!r}, which is no power of two")
        data = -(-content.position // alignment) * alignment
        return GgufHeader(path=path, fields=fields, tensors=_tensors(content, entries, data, alignment))


_Entry = tuple[str, tuple[int, ...], str, int]


def _entry(content: _Bytes) -> _Entry:
    name = content.name()
    num_axes = content.number("I")
    if num_axes > _MOST_AXES:
        raise content.wrong(f"tensor {name!r} has {num_axes} axes; a file has {_MOST_AXES} at most")
    shape = tuple(reversed(content.numbers("Q", num_axes)))
    number, offset = content.number("I"), content.number("Q")
    if number not in TYPES:
        kind = _OTHER_TYPES.get(number, f"type {number}")
        raise UnsupportedDtype(
            f"{content.path}: tensor {name!r} is stored as {kind}, which is not read; read are "
            f"{', '.join(TYPES.values())}. Take a file in another type"
        )
    return name, shape, TYPES[number], offset


def _tensors(content: _Bytes, entries: list[_Entry], data: int, alignment: int) -> dict[str, StoredTensor]:
    """Return the tensors, whose bytes lie behind byte `data`, checked against each other and the file."""
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise content.wrong(f"tensor {name!r} occurs twice")
        block, size = (1, PLAIN[kind]) if kind in PLAIN else SIZES[kind]
        if min(shape, default=1) < 1 or (kind not in PLAIN and (len(shape) < 2 or shape[-1] % block)):
            raise content.wrong(f"tensor {name!r} has the shape {list(shape)}, which {kind} cannot hold")
        begin, length = data + offset, math.prod(shape) // block * size
        if offset % alignment or begin + length > content.size:
            raise content.wrong(
                f"tensor {name!r} {list(shape)} in {kind} lies at bytes {begin} to {begin + length}, and the file has "
                f"{content.size}, in steps of {alignment}: it is cut off or damaged"
            )
        tensors[name] = StoredTensor(
            name=name, type=kind, shape=shape, shard=content.path.name, begin=begin, end=begin + length
        )
    last = None
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.begin):
        if last is not None and tensor.begin < last.end:
            raise content.wrong(f"tensors {last.name!r} and {tensor.name!r} lie upon each other")
        last = tensor
    return tensors


class _Bytes:
    """The bytes of a file and a place in them; nothing is read beyond their end."""

    def __init__(self, path: Path, size: int, content: mmap.mmap) -> None:
        self.path, self.size, self.position = path, size, 0
        self._content = content

    @classmethod
    def of(cls, path: Path) -> _Bytes:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < len(MAGIC) + 20:
                raise CorruptCheckpoint(f"{path}: only {size} bytes, too short for a GGUF file; fetch this file again")
            return cls(path, size, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))

    def __enter__(self) -> _Bytes:
        return self

    def __exit__(self, *error: object) -> None:
        self._content.close()

    def wrong(self, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.path}: {what}; fetch this file again")

    def take(self, count: int) -> bytes:
        self.skip(count)
        return self._content[self.position - count : self.position]

    def skip(self, count: int) -> None:
        if count > self.size - self.position:
            raise self.wrong(
                f"{count} bytes should follow at byte {self.position} of the header, and the file has {self.size}: it "
                "is cut off or damaged"
            )
        self.position += count

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{kind}")
        return layout.unpack(self.take(layout.size))

    def count(self, noun: str, most: int) -> int:
        count: int = self.number("Q")
        if count > most:
            raise self.wrong(f"it says that it has {count} {noun}, and at most {most} are believed")
        return count

    def name(self) -> str:
        begin, name = self.position, self.text(_LONGEST_NAME)
        if not name.isprintable() or not name:
            raise self.wrong(f"the name at byte {begin} of the header is {name[:40]!r}")
        return name

    def text(self, longest: int = 2**30) -> str:
        begin, length = self.position, self.number("Q")
        if length > longest:
            raise self.wrong(f"the text at byte {begin} of the header would have {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"the text at byte {begin} of the header is not UTF-8 ({error.reason})") from None

    def _skip_texts(self, count: int) -> None:
        """Walk over texts: a vocabulary has hundreds of thousands."""
        length, position, last = struct.Struct("<Q").unpack_from, self.position, self.size - 8
        for _ in range(count):
            if position > last:
                raise self.wrong(f"a list of {count} texts goes beyond its {self.size} bytes: it is cut off or damaged")
            position += 8 + length(self._content, position)[0]
        self.skip(position - self.position)

    def value(self, kind: int, name: str) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        if kind != _LIST:
            raise self.wrong(f"the field {name!r} is of the kind {kind}, which there is not")
        inner, count = self.number("I"), self.count(f"entries in {name}", _LONGEST_LIST)
        if inner != _TEXT and inner not in _FORMATS:
            raise self.wrong(f"the field {name!r} is a list of the kind {inner}, which is not read")
        whole = List(path=self.path, kind=inner, count=count, begin=self.position)
        if inner == _TEXT:
            self._skip_texts(count)
        else:
            self.skip(count * struct.calcsize(f"<{_FORMATS[inner]}"))
        return whole
