"""Where the bytes of an expert lie, and how they come to lie in a slot.

An expert is a record of pieces: its matrices, and scales where there are some, each a range of bytes of a weight file.
Files are read past the page cache where that is possible, and then a read begins and ends at whole blocks of
`ALIGNMENT` bytes, in the file and in memory. So a slot holds a little more than the expert: each range is rounded
outwards, and a piece begins somewhere in the first block of its range. Ranges that meet once rounded are one read,
which never reads more than both; in files as they are published the matrices of an expert are often neighbours, and the
expert is one read.

The layout of a slot follows from the record alone, however the bytes are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coterie.errors import InputError

#: An expert: its layer, and its number in it.
Key = tuple[int, int]

#: Bytes of which reads past the page cache begin and end at multiples: those of the blocks of all usual disks.
ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A range of bytes of a file: a matrix of an expert, or what belongs to one.

    Attributes:
        file: the file.
        begin: the first byte, from the beginning of the file.
        num_bytes: how many bytes it has, at least one.

    Raises:
        InputError: the range is empty or begins before the file.
    """

    file: Path
    begin: int
    num_bytes: int

    def __post_init__(self) -> None:
        if self.begin < 0 or self.num_bytes < 1:
            raise InputError(f"{self.file}: no range of bytes begins at {self.begin} and has {self.num_bytes} of them")

    @property
    def end(self) -> int:
        """The byte behind the last one."""
        return self.begin + self.num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """What is read in one go: some pieces of one file, rounded outwards to whole blocks.

    Attributes:
        file: the file.
        begin: where the read begins in it, a multiple of `ALIGNMENT`.
        end: the byte behind the last one that a piece needs; the file may end there, or within the last block.
        offset: where it begins in the slot, a multiple of `ALIGNMENT`.
    """

    file: Path
    begin: int
    end: int
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in a slot, a multiple of `ALIGNMENT`."""
        return round_up(self.end - self.begin)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Where the bytes of one expert lie.

    Attributes:
        pieces: its ranges of bytes, in the order in which whoever computes with them wants them; at least one.

    Raises:
        InputError: there is no piece.
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if not self.pieces:
            raise InputError("the record of an expert has no pieces; it needs those of its matrices")

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all pieces, without what is read beside them."""
        return sum(piece.num_bytes for piece in self.pieces)

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        """The reads that fill a slot, in the order of the slot: by file, and from the front of each."""
        ranges: list[Range] = []
        offset = 0
        for piece in sorted(self.pieces, key=lambda piece: (piece.file, piece.begin)):
            last = ranges[-1] if ranges else None
            begin, end = round_down(piece.begin), piece.end
            if last is not None and last.file == piece.file and begin <= round_up(last.end):
                begin, end, offset = last.begin, max(last.end, end), last.offset
                ranges.pop()
            ranges.append(Range(file=piece.file, begin=begin, end=end, offset=offset))
            offset += ranges[-1].num_bytes
        return tuple(ranges)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each piece begins in a slot, in the order of the pieces."""
        return tuple(self._offset(piece) for piece in self.pieces)

    def _offset(self, piece: Piece) -> int:
        for each in self.ranges:
            if each.file == piece.file and each.begin <= piece.begin < each.end:
                return each.offset + piece.begin - each.begin
        raise AssertionError("every piece lies in a range")

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes that a slot needs for it, a multiple of `ALIGNMENT`."""
        return sum(each.num_bytes for each in self.ranges)


def slot_bytes(records: Iterable[Record]) -> int:
    """Return how many bytes a slot needs to hold any of these records."""
    return max(record.slot_bytes for record in records)


def round_down(position: int) -> int:
    """Return the beginning of the block that holds a byte."""
    return position - position % ALIGNMENT


def round_up(position: int) -> int:
    """Return the first beginning of a block at or behind a byte."""
    return -(-position // ALIGNMENT) * ALIGNMENT
