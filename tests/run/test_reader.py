"""Reads of real files into slots: what arrives, in which order, and what happens when the disk does not play along."""

import errno
import os
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import CorruptCheckpoint, InputError, ReadError
from coterie.run.arena import Arena
from coterie.run.reader import Reader
from coterie.run.records import ALIGNMENT, Piece, Record
from experts_on_disk import Disk, bytes_of, expert_files, pieces_in, random_file, refuse_direct

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="reads past the page cache are those of Linux")


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


@contextmanager
def reading(record, **options):
    """Yield a reader, and a slot that has room for the record."""
    with Arena(1, record.slot_bytes) as arena, Reader(**options) as reader:
        yield reader, arena.memory(0)


@pytest.fixture
def record(tmp_path) -> Record:
    return next(iter(expert_files(tmp_path).values()))


@pytest.fixture
def large(tmp_path) -> Record:
    """A record of five blocks of the smallest size, which is read with lanes=1 in their order."""
    file = random_file(tmp_path / "large.bin", 6 * ALIGNMENT)
    return Record(pieces=(Piece(file=file, begin=100, num_bytes=5 * ALIGNMENT - 200),))


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """Files that do not end at a whole block."""
    folder = tmp_path_factory.mktemp("files")
    return [random_file(folder / f"{number}.bin", 100_000 + number, seed=number) for number in range(2)]


@pytest.mark.parametrize("direct", [True, False])
@settings(max_examples=25)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 90_000), st.integers(1, 30_000)), min_size=1, max_size=6),
    lanes=st.integers(1, 3),
    blocks=st.sampled_from([1, 2, 256]),
)
def test_every_byte_arrives(two_files, direct, ranges, lanes, blocks):
    pieces = [
        Piece(file=two_files[place % 2], begin=begin, num_bytes=min(num_bytes, 100_000 + place % 2 - begin))
        for place, (begin, num_bytes) in enumerate(ranges)
    ]
    record = Record(pieces=tuple(pieces))
    with reading(record, lanes=lanes, direct=direct, block_bytes=blocks * ALIGNMENT) as (reader, memory):
        reader.submit(record, memory).wait()
        assert pieces_in(memory, record) == bytes_of(record)
        counters = reader.counters
    assert counters.num_reads == 1
    assert record.slot_bytes - 2 * ALIGNMENT < counters.num_bytes <= record.slot_bytes
    assert counters.seconds > 0
    assert counters.busy_seconds > 0


def test_many_reads_at_once(tmp_path):
    records = list(expert_files(tmp_path, layers=4, experts=10).values())
    with Arena(40, max(each.slot_bytes for each in records)) as arena, Reader(3, block_bytes=ALIGNMENT) as reader:
        reader.open(records)
        over = []
        reads = [
            reader.submit(each, arena.memory(number), when_over=over.append) for number, each in enumerate(records)
        ]
        for number, read in enumerate(reads):
            read.wait()
            assert read.is_over
            assert pieces_in(arena.memory(number), read.record) == bytes_of(read.record)
    assert len(over) == len(set(map(id, over))) == 40


def flags_of(monkeypatch):
    """Note the flags with which files are opened, and what the system is told to forget."""
    opened, forgotten = [], []
    real_open, real_advise = os.open, os.posix_fadvise
    monkeypatch.setattr(os, "open", lambda path, flags, *more: opened.append(flags) or real_open(path, flags, *more))
    monkeypatch.setattr(
        os, "posix_fadvise", lambda *arguments: forgotten.append(arguments[1:]) or real_advise(*arguments)
    )
    return opened, forgotten


def test_reads_go_past_the_page_cache(record, monkeypatch, caplog):
    opened, forgotten = flags_of(monkeypatch)
    with reading(record) as (reader, memory):
        try:
            os.close(os.open(record.pieces[0].file, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            pytest.skip("the file system of the tests has no reads past the page cache")
        opened.clear()
        reader.submit(record, memory).wait()
    assert opened == [os.O_RDONLY | os.O_DIRECT]
    assert forgotten == []
    assert not caplog.records


def test_where_the_file_system_refuses_it_reads_and_forgets_and_says_so_once(tmp_path, monkeypatch, caplog):
    refusals = []
    refuse_direct(monkeypatch, refusals)
    _, forgotten = flags_of(monkeypatch)
    records = list(expert_files(tmp_path, num_files=2).values())
    with Arena(1, max(each.slot_bytes for each in records)) as arena, Reader(1) as reader:
        for record in records:
            reader.submit(record, arena.memory(0)).wait()
            assert pieces_in(arena.memory(0), record) == bytes_of(record)
    assert len(refusals) == 2
    assert forgotten[0] == (records[0].ranges[0].begin, records[0].slot_bytes, os.POSIX_FADV_DONTNEED)
    assert len(forgotten) == len(records)
    assert [line.getMessage().partition(":")[2] for line in caplog.records] == [
        " reads go through the page cache, as its file system refuses others (O_DIRECT)"
    ]


def test_where_the_file_system_refuses_at_the_first_read(record, disk, caplog):
    disk.fail(times=1, number=errno.EINVAL)
    with reading(record, lanes=1) as (reader, memory):
        for _ in range(2):
            reader.submit(record, memory).wait()
            assert pieces_in(memory, record) == bytes_of(record)
        assert reader.counters.retries == 0
    assert len(caplog.records) == 1
    assert len(disk.positions) == 3


def test_a_read_that_is_no_read_at_all_fails_at_last(record, disk):
    disk.fail(number=errno.EINVAL)
    with reading(record) as (reader, memory), pytest.raises(ReadError, match="Invalid argument"):
        reader.submit(record, memory).wait()


@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_go_on(large, disk, direct):
    disk.fault = lambda position, num_bytes: min(num_bytes, ALIGNMENT + (0 if direct else 100))
    with reading(large, direct=direct) as (reader, memory):
        reader.submit(large, memory).wait()
        assert pieces_in(memory, large) == bytes_of(large)
    assert len(disk.positions) == 5


def test_a_short_read_that_ends_within_a_block_begins_there_again(large, disk):
    # What a file system may do that reads past the page cache: the next read begins at a whole block.
    disk.fault = lambda position, num_bytes: min(num_bytes, ALIGNMENT + 512)
    with reading(large) as (reader, memory):
        reader.submit(large, memory).wait()
        assert pieces_in(memory, large) == bytes_of(large)
    assert all(position % ALIGNMENT == 0 for position in disk.positions)


def test_interrupted_reads_go_on(record, disk):
    disk.fail(times=3, number=errno.EINTR)
    with reading(record) as (reader, memory):
        reader.submit(record, memory).wait()
        assert pieces_in(memory, record) == bytes_of(record)
        assert reader.counters.retries == 0


def test_an_error_of_the_disk_is_tried_once_more(record, disk, caplog):
    disk.fail(times=1)
    with reading(record) as (reader, memory):
        reader.submit(record, memory).wait()
        assert pieces_in(memory, record) == bytes_of(record)
        assert reader.counters.retries == 1
    assert "trying once more" in caplog.text


def test_an_error_of_the_disk_that_stays_fails_this_read_and_no_other(record, disk):
    disk.fail(times=2)
    with reading(record) as (reader, memory):
        read = reader.submit(record, memory)
        with pytest.raises(
            ReadError, match=r"0.bin: bytes 0 to [\d,]+ cannot be read \(Input/output error\)"
        ) as raised:
            read.wait()
        assert isinstance(raised.value, OSError)
        reader.submit(record, memory).wait()
        assert pieces_in(memory, record) == bytes_of(record)
        assert reader.counters.num_reads == 1


def changed(record, change):
    """Read a record, change its file, read it again and return what that says."""
    with reading(record) as (reader, memory):
        reader.submit(record, memory).wait()
        change(record.pieces[0].file)
        with pytest.raises(CorruptCheckpoint, match=r"/0.bin: ") as raised:
            reader.submit(record, memory).wait()
    return str(raised.value)


def test_a_truncated_file_is_noticed(record):
    size = record.pieces[0].file.stat().st_size
    assert f"had {size:,} bytes when the model was opened, and has 100 now" in changed(
        record, lambda file: os.truncate(file, 100)
    )


def test_a_file_that_lost_its_end_is_noticed_by_who_reads_elsewhere(record):
    file = record.pieces[0].file
    assert "bytes when the model was opened" in changed(record, lambda _: os.truncate(file, file.stat().st_size - 1))


def test_a_replaced_file_is_noticed(record):
    def replace(file):
        other = file.with_suffix(".new")
        other.write_bytes(file.read_bytes())
        other.replace(file)

    assert "was replaced by another file" in changed(record, replace)


def test_a_file_that_is_written_to_is_noticed(record):
    def write(file):
        os.utime(file, ns=(0, 1))

    assert "was written to since" in changed(record, write)


def test_a_removed_file_is_noticed(record):
    assert "no longer is (No such file or directory)" in changed(record, lambda file: file.unlink())


def test_a_file_that_changes_while_it_is_read_does_not_count(record, disk):
    def fault(position, num_bytes):
        file = record.pieces[0].file
        os.utime(file, ns=(0, 1))

    disk.fault = fault
    with reading(record) as (reader, memory):
        reader.open([record])
        read = reader.submit(record, memory)
        with pytest.raises(CorruptCheckpoint, match="was written to since"):
            read.wait()


def test_what_is_not_there_is_refused_when_files_are_opened(record, tmp_path):
    missing = Record(pieces=(Piece(file=tmp_path / "none.bin", begin=0, num_bytes=1),))
    with Reader() as reader:
        with pytest.raises(CorruptCheckpoint, match=r"none.bin: is not there"):
            reader.open([record, missing])
        size = record.pieces[0].file.stat().st_size
        beyond = Record(pieces=(Piece(file=record.pieces[0].file, begin=size - 5, num_bytes=6),))
        with pytest.raises(CorruptCheckpoint, match=f"has {size:,} bytes, and an expert lies at .* to {size + 1:,}"):
            reader.open([beyond])
        with Arena(1, beyond.slot_bytes) as arena, pytest.raises(CorruptCheckpoint, match=f"ends after {size:,} bytes"):
            reader.submit(beyond, arena.memory(0)).wait()


def submitted(reader, arena, blocks, **options):
    """Queue reads of one block each, at these blocks of a file."""
    return [reader.submit(record, arena.memory(0), **options) for record in blocks]


@pytest.fixture
def blocks(tmp_path):
    """Records of one block each."""
    file = random_file(tmp_path / "blocks.bin", 10 * ALIGNMENT)
    return [Record(pieces=(Piece(file=file, begin=n * ALIGNMENT, num_bytes=ALIGNMENT),)) for n in range(10)]


def test_what_is_demanded_comes_first(blocks, disk):
    with Arena(1, ALIGNMENT) as arena, Reader(1) as reader:
        disk.stop()
        first = submitted(reader, arena, [blocks[0]])
        disk.wait_for_reads(1)
        reads = submitted(reader, arena, blocks[1:4], speculative=True) + submitted(reader, arena, blocks[4:6])
        reader.promote(reads[2])
        disk.go()
        for read in first + reads:
            read.wait()
    assert [position // ALIGNMENT for position in disk.positions] == [0, 4, 5, 3, 1, 2]


def test_what_is_speculated_on_gives_way_at_its_next_block(large, blocks, disk):
    with Arena(1, large.slot_bytes) as arena, Reader(1, block_bytes=ALIGNMENT) as reader:
        disk.stop()
        slow = reader.submit(large, arena.memory(0), speculative=True)
        disk.wait_for_reads(1)
        (read,) = submitted(reader, arena, blocks[9:])
        disk.go()
        slow.wait()
        read.wait()
    assert [position // ALIGNMENT for position in disk.positions] == [0, 9, 1, 2, 3, 4]


def test_what_has_not_begun_can_be_taken_back(blocks, disk):
    over = []
    with Arena(1, ALIGNMENT) as arena, Reader(1) as reader:
        disk.stop()
        begun, waiting = submitted(reader, arena, blocks[:2], speculative=True, when_over=over.append)
        disk.wait_for_reads(1)
        (demanded,) = submitted(reader, arena, [blocks[2]])
        assert not reader.cancel(begun)
        assert not reader.cancel(demanded)
        assert reader.cancel(waiting)
        assert waiting.is_cancelled
        assert not reader.cancel(waiting)
        disk.go()
        begun.wait()
        demanded.wait()
        waiting.wait()
        assert not begun.is_cancelled
    assert len(disk.positions) == 2
    assert over == [begun]


def test_a_read_asks_for_its_place_when_it_begins(blocks, disk):
    asked = []
    over = []
    with Arena(1, ALIGNMENT) as arena, Reader(1) as reader:

        def place(number, answer):
            asked.append(number)
            if isinstance(answer, Exception):
                raise answer
            return answer

        answers = [arena.memory(0), None, ValueError("no place")]
        disk.stop()
        submitted(reader, arena, blocks[:1])
        disk.wait_for_reads(1)
        reads = [
            reader.submit(block, lambda pair=pair: place(*pair), speculative=True, when_over=over.append)
            for block, pair in zip(blocks[1:], enumerate(answers), strict=False)
        ]
        assert asked == []
        disk.go()
        reads[0].wait()
        reads[1].wait()
        with pytest.raises(ValueError, match="no place"):
            reads[2].wait()
        assert [read.is_cancelled for read in reads] == [False, True, False]
    assert asked == [0, 1, 2]
    assert over == reads
    assert len(disk.positions) == 2


def test_a_failed_read_is_over_when_no_lane_is_at_it_any_more(large, disk):
    # Its memory is about to be used for something else.
    going_on = threading.Event()
    at_second = threading.Event()

    def fault(position, num_bytes):
        if position == 0:
            assert at_second.wait(20)
            return -errno.ENODEV
        at_second.set()
        assert going_on.wait(20)
        return None

    disk.fault = fault
    with reading(large, lanes=2, block_bytes=ALIGNMENT) as (reader, memory):
        read = reader.submit(large, memory)
        assert at_second.wait(20)
        assert not read._over.wait(0.05)
        going_on.set()
        with pytest.raises(ReadError, match="No such device"):
            read.wait()
    assert len(disk.positions) == 2, "what is left of it is not read"


def test_closing_waits_for_lanes_and_fails_what_is_left(large, blocks, disk):
    over = []
    arena = Arena(2, large.slot_bytes)
    reader = Reader(1, block_bytes=ALIGNMENT)
    disk.stop()
    begun = reader.submit(large, arena.memory(0), when_over=over.append)
    disk.wait_for_reads(1)
    waiting = submitted(reader, arena, blocks[:1], when_over=over.append)
    waiting += submitted(reader, arena, blocks[1:2], speculative=True, when_over=over.append)
    closing = threading.Thread(target=reader.close)
    closing.start()
    for read in waiting:
        with pytest.raises(ReadError, match="was closed before"):
            read.wait()
    assert not begun.is_over
    assert closing.is_alive()
    disk.go()
    closing.join(20)
    assert not closing.is_alive()
    with pytest.raises(ReadError, match="was closed before"):
        begun.wait()
    assert len(disk.positions) == 1
    assert sorted(map(id, over)) == sorted(map(id, [begun, *waiting]))
    assert not any(lane.is_alive() for lane in reader._lanes)
    with pytest.raises(ReadError, match="reader is closed"):
        submitted(reader, arena, blocks[:1])
    reader.close()
    arena.close()


def test_who_keeps_a_read_does_not_keep_its_memory(blocks):
    arena = Arena(1, ALIGNMENT)
    memory = weakref.ref(arena._map)
    with Reader(1) as reader:
        read = reader.submit(blocks[0], arena.memory(0))
        read.wait()
    arena.close()
    assert memory() is None
    assert read.is_over


def test_files_are_closed(record):
    def descriptors():
        return {link.resolve() for link in Path("/proc/self/fd").iterdir()}

    with reading(record) as (reader, memory):
        reader.submit(record, memory).wait()
        assert record.pieces[0].file in descriptors()
    assert record.pieces[0].file not in descriptors()


def test_what_follows_a_read_may_fail_without_stopping_the_lane(blocks, caplog):
    def follow(read):
        raise ValueError("oh")

    with Arena(1, ALIGNMENT) as arena, Reader(1) as reader:
        for block in blocks[:2]:
            reader.submit(block, arena.memory(0), when_over=follow).wait()
    assert "what follows a read failed" in caplog.text


@pytest.mark.parametrize(("options", "words"), [({"lanes": 0}, "0 lanes"), ({"block_bytes": 1000}, "blocks of 1000")])
def test_what_cannot_read_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Reader(**options)
