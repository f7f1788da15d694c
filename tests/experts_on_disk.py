"""Files with the bytes of experts, their records, and disks that fail: what tests of the runtime share."""

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from coterie.run.records import Key, Piece, Record


def random_file(path: Path, num_bytes: int, seed: int = 0) -> Path:
    path.write_bytes(random.Random(seed).randbytes(num_bytes))
    return path


def expert_files(
    folder: Path, layers: int = 3, experts: int = 6, piece_bytes: int = 3001, num_files: int = 2
) -> dict[Key, Record]:
    """Write experts of three pieces each, neighbours in a file but for some bytes, and return their records."""
    records = {}
    for number in range(num_files):
        keys = [(layer, expert) for layer in range(layers) for expert in range(experts) if layer % num_files == number]
        begin = 777
        for key in keys:
            begins = [begin, begin + piece_bytes, begin + 2 * piece_bytes + 5]
            pieces = [Piece(file=folder / f"{number}.bin", begin=b, num_bytes=piece_bytes) for b in begins]
            records[key] = Record(pieces=(pieces[1], pieces[0], pieces[2]))
            begin = pieces[-1].end + 13
        random_file(folder / f"{number}.bin", begin, seed=number)
    return records


def bytes_of(record: Record) -> list[bytes]:
    """Return the bytes of every piece, read the plain way."""
    return [piece.file.read_bytes()[piece.begin : piece.end] for piece in record.pieces]


def pieces_in(memory: memoryview, record: Record) -> list[bytes]:
    """Return the bytes of every piece, as they lie in a slot."""
    pairs = zip(record.offsets, record.pieces, strict=True)
    return [bytes(memory[offset : offset + piece.num_bytes]) for offset, piece in pairs]


class Disk:
    """Stands before `os.preadv`: lets reads pass, or fail, or wait.

    Attributes:
        fault: called with the position and the number of bytes of every read; what it returns is what the read does:
            nothing special (None), fail with an errno (negative), or give so many bytes at most.
        positions: where reads began, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: Callable[[int, int], int | None] = lambda position, num_bytes: None
        self.positions: list[int] = []
        self._gate = threading.Event()
        self._gate.set()
        self._waiting = threading.Semaphore(0)
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self._preadv)

    def _preadv(self, descriptor: int, buffers: list[memoryview], position: int) -> int:
        (memory,) = buffers
        self.positions.append(position)
        if not self._gate.is_set():
            self._waiting.release()
            assert self._gate.wait(20)
        action = self.fault(position, len(memory))
        if action is not None and action < 0:
            raise OSError(-action, os.strerror(-action))
        return self._real(descriptor, [memory if action is None else memory[:action]], position)

    def stop(self) -> None:
        """Let reads wait from now on."""
        self._gate.clear()

    def wait_for_reads(self, count: int) -> None:
        """Wait until so many reads have come to a halt."""
        for _ in range(count):
            assert self._waiting.acquire(timeout=20)

    def go(self) -> None:
        """Let all go on."""
        self._gate.set()

    def fail(self, times: int = 10**9, number: int = errno.EIO) -> None:
        """Let so many reads fail, then none."""
        left = iter(range(times))
        self.fault = lambda position, num_bytes: None if next(left, None) is None else -number

    def heal(self) -> None:
        """Let no read fail any more."""
        self.fault = lambda position, num_bytes: None


def refuse_direct(monkeypatch: pytest.MonkeyPatch, refusals: list[str]) -> None:
    """Let the file system refuse reads past the page cache when a file is opened."""
    real = os.open

    def opened(path: str | os.PathLike[str], flags: int, *more: int, **options: int) -> int:
        if flags & os.O_DIRECT:
            refusals.append(os.fspath(path))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", opened)
