"""Read experts from files into memory, in threads of their own.

    with Reader(lanes=2) as reader:
        reader.open(records)
        read = reader.submit(record, arena.memory(slot))
        ...                                  # compute something else
        read.wait()                          # the pieces are at record.offsets of the slot

Reads go past the page cache (O_DIRECT): whoever asks has a cache already, and that of the system would keep everything
a second time and take the processor for it. File systems that refuse get ordinary reads, after which the system is
told to forget the pages. Big reads are split into blocks, on which all lanes work: the first of several reads is done
first, and what is demanded waits for one block at most of what is only speculated on.

A file is what it was when it was opened, or nothing that was read from it counts: size, time of change and inode are
compared after each read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from coterie.errors import CorruptCheckpoint, InputError, ReadError
from coterie.run.records import ALIGNMENT, Record
from coterie.run.weight_file import WeightFile

log = logging.getLogger(__name__)

#: Bytes of the blocks into which reads are split: large enough for the disk, and soon over.
BLOCK_BYTES = 2**20

#: Where what is read goes: memory, or who says at the last moment where; None where it is no longer wanted.
Place = memoryview | Callable[[], memoryview | None]


@dataclass(kw_only=True, slots=True)
class ReaderCounters:
    """What a reader has done so far.

    Attributes:
        num_reads: records that were read.
        num_bytes: bytes that came from files, with what is read beside the records.
        seconds: time that lanes spent in reads, summed over lanes.
        busy_seconds: time in which one lane at least was in a read.
        retries: blocks that were read again after an error of the disk.
    """

    num_reads: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class _Block:
    """A part of a range: where it begins in its file and in the slot, bytes to ask for, and bytes that have to come."""

    file: Path
    begin: int
    offset: int
    num_bytes: int
    needed: int


class Read:
    """A record on its way into memory; made by `Reader.submit`.

    Attributes:
        record: what is read.
        error: why it could not be read, once that is known.
        is_cancelled: it never began, as it was no longer wanted.
    """

    def __init__(
        self, record: Record, place: Place, *, speculative: bool, when_over: Callable[[Read], None] | None
    ) -> None:
        """Be queued."""
        self.record = record
        self.error: Exception | None = None
        self.is_cancelled = False
        self._place: Place | None = place
        self._memory: memoryview | None = None
        self._speculative = speculative
        self._when_over = when_over
        self._blocks: deque[_Block] = deque()
        self._has_begun = False
        self._in_flight = 0
        self._over = threading.Event()

    @property
    def is_over(self) -> bool:
        """Nothing more happens: it was read, failed or was cancelled."""
        return self._over.is_set()

    def wait(self) -> None:
        """Wait until it is over.

        Raises:
            ReadError: the disk does not give the bytes.
            CorruptCheckpoint: a file is no longer what it was when it was opened.
        """
        self._over.wait()
        if self.error is not None:
            raise self.error


class Reader:
    """Threads that read records from files."""

    def __init__(self, lanes: int = 2, *, direct: bool = True, block_bytes: int = BLOCK_BYTES) -> None:
        """Start the threads.

        Args:
            lanes: how many; two are enough for most disks.
            direct: read past the page cache, where the file system can.
            block_bytes: bytes of the blocks into which reads are split, a multiple of `ALIGNMENT`.

        Raises:
            InputError: there would be no thread, or blocks are not whole blocks of a disk.
        """
        if lanes < 1:
            raise InputError(f"{lanes} lanes read nothing; take one at least")
        if block_bytes < ALIGNMENT or block_bytes % ALIGNMENT:
            raise InputError(f"blocks of {block_bytes} bytes cannot be read; take a multiple of {ALIGNMENT}")
        self._direct = direct
        self._block_bytes = block_bytes
        self._files: dict[Path, WeightFile] = {}
        self._files_lock = threading.Lock()
        self._has_told = False
        self._changed = threading.Condition()
        self._demanded: deque[Read] = deque()
        self._speculative: deque[Read] = deque()
        self._is_closed = False
        self._counters = ReaderCounters()
        self._num_busy = 0
        self._busy_since = 0.0
        self._lanes = [threading.Thread(target=self._run, name=f"reader-{n}", daemon=True) for n in range(lanes)]
        for lane in self._lanes:
            lane.start()

    @property
    def counters(self) -> ReaderCounters:
        """What was done so far: a copy."""
        with self._changed:
            return replace(self._counters)

    def open(self, records: Iterable[Record]) -> None:
        """Open the files of records, which is done by the first read otherwise.

        Args:
            records: what will be read.

        Raises:
            CorruptCheckpoint: a file is missing, or ends before a piece does.
            ReadError: a file cannot be opened.
        """
        for record in records:
            for piece in record.pieces:
                size = self._file(piece.file).size
                if piece.end > size:
                    raise CorruptCheckpoint(
                        f"{piece.file}: has {size:,} bytes, and an expert lies at bytes {piece.begin:,} to "
                        f"{piece.end:,}; fetch this file again"
                    )

    def submit(
        self,
        record: Record,
        place: Place,
        *,
        speculative: bool = False,
        when_over: Callable[[Read], None] | None = None,
    ) -> Read:
        """Queue a read.

        Args:
            record: what is read.
            place: memory that it fills, page-aligned, of `record.slot_bytes` at least; or what returns it when the read
                begins, or None where it is no longer wanted, which cancels it. That is called by a lane.
            speculative: lanes take it when nothing is demanded.
            when_over: called once, when it was read, failed or was cancelled by `place` or `close`; by a lane, or by
                whoever closes. It may submit and must not wait for reads.

        Returns:
            The read; the pieces are at `record.offsets` once it is over.

        Raises:
            ReadError: the reader is closed.
        """
        read = Read(record, place, speculative=speculative, when_over=when_over)
        read._blocks.extend(self._split(record))
        with self._changed:
            if self._is_closed:
                raise ReadError("the reader is closed; nothing can be read any more")
            (self._speculative if speculative else self._demanded).append(read)
            self._changed.notify_all()
        return read

    def cancel(self, read: Read) -> bool:
        """Take back a speculative read that has not begun; return whether it was taken back.

        `when_over` is not called: whoever cancels knows.
        """
        with self._changed:
            if read._has_begun or read not in self._speculative:
                return False
            self._speculative.remove(read)
            read.is_cancelled = True
            read._place = None
        read._over.set()
        return True

    def promote(self, read: Read) -> None:
        """Treat a speculative read as demanded from now on."""
        with self._changed:
            read._speculative = False
            if read in self._speculative:
                self._speculative.remove(read)
                self._demanded.append(read)

    def close(self) -> None:
        """Let lanes finish the blocks that they are at, fail all else, and close the files. Waits for the lanes."""
        with self._changed:
            self._is_closed = True
            left = [*self._demanded, *self._speculative]
            self._demanded.clear()
            self._speculative.clear()
            for read in left:
                read._blocks.clear()
                read.error = read.error or _closed()
            idle = [read for read in left if not read._in_flight]
            self._changed.notify_all()
        for read in idle:
            self._finish(read)
        for lane in self._lanes:
            lane.join()
        with self._files_lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _split(self, record: Record) -> Iterable[_Block]:
        for each in record.ranges:
            for start in range(0, each.num_bytes, self._block_bytes):
                num_bytes = min(self._block_bytes, each.num_bytes - start)
                begin = each.begin + start
                yield _Block(each.file, begin, each.offset + start, num_bytes, min(num_bytes, each.end - begin))

    def _file(self, path: Path) -> WeightFile:
        with self._files_lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = WeightFile(path, direct=self._direct)
            if self._direct and not file.is_direct and not self._has_told:
                self._has_told = True
                log.warning("%s: reads go through the page cache, as its file system refuses others (O_DIRECT)", path)
        return file

    def _run(self) -> None:
        """Work until the reader is closed: what a thread does."""
        while (work := self._next()) is not None:
            read, block = work
            if block is None:
                self._find_place(read)
            else:
                self._read(read, block)

    def _next(self) -> tuple[Read, _Block | None] | None:
        """Wait for something to do and take it: a block of a read, or a read without a place yet; None once closed."""
        with self._changed:
            while not self._is_closed:
                queue = self._demanded or self._speculative
                if not queue:
                    self._changed.wait()
                    continue
                read = queue[0]
                if not read._has_begun:
                    read._has_begun = True
                    if callable(read._place):
                        queue.popleft()  # nobody else takes it before it has a place
                        return read, None
                    read._memory = read._place
                block = read._blocks.popleft()
                if not read._blocks:
                    queue.popleft()
                read._in_flight += 1
                if not self._num_busy:
                    self._busy_since = time.perf_counter()
                self._num_busy += 1
                return read, block
        return None

    def _find_place(self, read: Read) -> None:
        """Ask where a read goes, and put it back to the front of its queue, or end it."""
        memory, error = None, None
        try:
            memory = read._place() if callable(read._place) else read._place
        except Exception as raised:  # a lane goes on, whatever one read does
            error = raised
        with self._changed:
            if memory is not None and not self._is_closed:
                read._memory = memory
                (self._speculative if read._speculative else self._demanded).appendleft(read)
                self._changed.notify_all()
                return
            if memory is not None:
                error = _closed()
            read.error, read.is_cancelled = error, error is None
        self._finish(read)

    def _read(self, read: Read, block: _Block) -> None:
        """Read a block; whoever reads the last one of a read ends it."""
        assert read._memory is not None
        begun = time.perf_counter()
        num_bytes = retries = 0
        error = None
        try:
            memory = read._memory[block.offset : block.offset + block.num_bytes]
            num_bytes, retries = self._file(block.file).read(memory, block.begin, block.needed)
        except Exception as raised:
            error = raised
        now = time.perf_counter()
        with self._changed:
            self._counters.num_bytes += num_bytes
            self._counters.retries += retries
            self._counters.seconds += now - begun
            self._num_busy -= 1
            if not self._num_busy:
                self._counters.busy_seconds += now - self._busy_since
            read._in_flight -= 1
            if error is not None:
                read.error = read.error or error
                if read._blocks:  # it is of no use any more, and others wait
                    read._blocks.clear()
                    (self._speculative if read._speculative else self._demanded).remove(read)
            is_last = not read._in_flight and not read._blocks
        if is_last:
            self._finish(read)

    def _finish(self, read: Read) -> None:
        """End a read: look whether its files are still the same, and say that it is over."""
        if read.error is None and not read.is_cancelled:
            try:
                for path in dict.fromkeys(each.file for each in read.record.ranges):
                    self._file(path).check()
                with self._changed:
                    self._counters.num_reads += 1
            except Exception as raised:
                read.error = raised
        # Whoever keeps the read does not keep the memory.
        read._memory = read._place = None
        read._over.set()
        if read._when_over is not None:
            try:
                read._when_over(read)
            except Exception:
                log.exception("what follows a read failed")


def _closed() -> ReadError:
    return ReadError("the reader was closed before an expert was read")
