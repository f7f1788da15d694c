"""How the bytes of experts lie in files and come to lie in slots."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import InputError
from coterie.run.records import ALIGNMENT, Piece, Record, slot_bytes

FILES = [Path("a.bin"), Path("b.bin")]
PIECES = st.builds(
    lambda file, begin, num_bytes: Piece(file=file, begin=begin, num_bytes=num_bytes),
    st.sampled_from(FILES),
    st.integers(0, 12 * ALIGNMENT),
    st.integers(1, 3 * ALIGNMENT),
)
RECORDS = st.lists(PIECES, min_size=1, max_size=6).map(lambda pieces: Record(pieces=tuple(pieces)))


def piece(begin: int, num_bytes: int, file: Path = FILES[0]) -> Piece:
    return Piece(file=file, begin=begin, num_bytes=num_bytes)


@given(RECORDS)
def test_what_is_read_brings_every_byte_of_every_piece_to_its_offset(record):
    # In place of bytes, where they come from: a number for each byte of the two files.
    first = {FILES[0]: 0, FILES[1]: 10**6}
    slot = np.full(record.slot_bytes, -1)
    for each in record.ranges:
        assert each.begin % ALIGNMENT == each.offset % ALIGNMENT == each.num_bytes % ALIGNMENT == 0
        there = slot[each.offset : each.offset + each.num_bytes]
        assert (there == -1).all(), "two ranges in one place"
        there[:] = first[each.file] + each.begin + np.arange(each.num_bytes)
    for offset, each in zip(record.offsets, record.pieces, strict=True):
        assert (slot[offset : offset + each.num_bytes] == first[each.file] + np.arange(each.begin, each.end)).all()


@given(RECORDS)
def test_no_block_is_read_twice_and_none_in_vain(record):
    blocks = {
        (each.file, block)
        for each in record.pieces
        for block in range(each.begin // ALIGNMENT, (each.end - 1) // ALIGNMENT + 1)
    }
    assert record.slot_bytes == len(blocks) * ALIGNMENT
    # Ranges of one file do not touch: they would be one.
    ranges = sorted((each.file, each.begin, each.begin + each.num_bytes) for each in record.ranges)
    for (file, _, end), (other, begin, _) in itertools.pairwise(ranges):
        assert file != other or end < begin


def test_neighbours_are_one_read_in_whatever_order_they_are_wanted():
    record = Record(pieces=(piece(15_000, 5000), piece(5000, 5000), piece(10_000, 5000)))
    (only,) = record.ranges
    assert (only.begin, only.end, only.offset) == (4096, 20_000, 0)
    assert record.offsets == (15_000 - 4096, 5000 - 4096, 10_000 - 4096)
    assert record.num_bytes == 15_000
    assert record.slot_bytes == 4 * ALIGNMENT


def test_what_is_far_apart_or_in_other_files_is_read_apart():
    record = Record(pieces=(piece(0, 10), piece(3 * ALIGNMENT, 10), piece(0, 10, FILES[1])))
    assert [(each.file, each.begin, each.offset) for each in record.ranges] == [
        (FILES[0], 0, 0),
        (FILES[0], 3 * ALIGNMENT, ALIGNMENT),
        (FILES[1], 0, 2 * ALIGNMENT),
    ]
    assert slot_bytes([record, Record(pieces=(piece(0, 1),))]) == 3 * ALIGNMENT


@pytest.mark.parametrize(("begin", "num_bytes"), [(-1, 5), (0, 0), (7, -2)])
def test_a_range_that_is_none_is_refused(begin, num_bytes):
    with pytest.raises(InputError, match=rf"a.bin: .*{begin}.*{num_bytes}"):
        piece(begin, num_bytes)


def test_an_expert_without_pieces_is_refused():
    with pytest.raises(InputError, match="no pieces"):
        Record(pieces=())
