"""A file of weights that is open for a long time: read past the page cache, and noticed when it changes."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

from coterie.errors import CorruptCheckpoint, ReadError
from coterie.run.records import round_down

log = logging.getLogger(__name__)

#: What a file system says that does not know reads past the page cache.
_REFUSALS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}

#: The flag for reads past the page cache; 0 where the system has none.
_DIRECT: int = getattr(os, "O_DIRECT", 0)


class WeightFile:
    """An open file. All methods may be called from several threads, but `close`.

    Attributes:
        path: where it lies.
        size: bytes of it when it was opened.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        """Open it.

        Args:
            path: where it lies.
            direct: past the page cache, where the file system can.

        Raises:
            CorruptCheckpoint: there is no such file.
            ReadError: it cannot be opened.
        """
        self.path = path
        self._lock = threading.Lock()
        self._descriptors: list[int] = []
        self._is_direct = False
        self._open(direct=direct and _DIRECT != 0)
        status = os.fstat(self._descriptors[-1])
        self.size = status.st_size
        self._identity = _identity(status)

    @property
    def is_direct(self) -> bool:
        """Reads go past the page cache."""
        return self._is_direct

    def _open(self, *, direct: bool) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | (_DIRECT if direct else 0))
        except FileNotFoundError:
            raise CorruptCheckpoint(f"{self.path}: is not there; fetch this file again") from None
        except OSError as error:
            if direct and error.errno in _REFUSALS:
                self._open(direct=False)
                return
            raise ReadError(f"{self.path}: cannot be opened ({error.strerror or error})") from error
        self._descriptors.append(descriptor)
        self._is_direct = direct

    def read(self, memory: memoryview, position: int, needed: int) -> tuple[int, int]:
        """Fill memory with bytes of the file.

        Interrupted and short reads go on; after an error of the disk (EIO) one more attempt is made.

        Args:
            memory: where to; begins at a multiple of the alignment, and its length is one.
            position: where the file is read from, a multiple of the alignment.
            needed: bytes that have to come; the file may end behind these.

        Returns:
            Bytes that came, at least as many as needed; and 1 where that took a second attempt, else 0.

        Raises:
            ReadError: the disk does not give them.
            CorruptCheckpoint: the file ends before.
        """
        count = retries = 0
        while count < needed:
            descriptor, is_direct = self._descriptors[-1], self._is_direct
            # A read past the page cache begins at a whole block, so one that came short begins at its last one again.
            begin = round_down(count) if is_direct else count
            try:
                reached = begin + self._read_at(descriptor, memory[begin:], position + begin)
            except InterruptedError:
                continue
            except OSError as error:
                where = f"bytes {position + begin:,} to {position + len(memory):,}"
                if is_direct and error.errno in _REFUSALS:
                    self._go_without_direct(descriptor)
                elif error.errno == errno.EIO and not retries:
                    retries = 1
                    log.warning("%s: %s cannot be read (%s); trying once more", self.path, where, error.strerror)
                else:
                    raise ReadError(
                        f"{self.path}: {where} cannot be read ({error.strerror or error}); look into the system's log "
                        "for errors of the disk"
                    ) from error
                continue
            if reached <= count:
                self.check()
                raise CorruptCheckpoint(
                    f"{self.path}: ends after {position + count:,} bytes, and {position + needed:,} are needed; fetch "
                    "this file again"
                )
            count = reached
        if not self._is_direct:
            self._forget(position, len(memory))
        return count, retries

    @staticmethod
    def _read_at(descriptor: int, memory: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [memory], position)
        content = os.pread(descriptor, len(memory), position)
        memory[: len(content)] = content
        return len(content)

    def _go_without_direct(self, descriptor: int) -> None:
        """Open it once more, for ordinary reads; another thread may have done so, and reads of others still go on."""
        with self._lock:
            if self._descriptors[-1] == descriptor:
                self._open(direct=False)

    def _forget(self, position: int, num_bytes: int) -> None:
        """Tell the system that it need not keep what was read."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptors[-1], position, num_bytes, os.POSIX_FADV_DONTNEED)

    def check(self) -> None:
        """Compare the file at its place with the one that was opened.

        Raises:
            CorruptCheckpoint: it was truncated, written to, replaced or removed.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise CorruptCheckpoint(
                f"{self.path}: was there when the model was opened, and no longer is ({error.strerror or error}); put "
                "it back and open the model again"
            ) from None
        identity = _identity(status)
        if identity == self._identity:
            return
        if status.st_size != self.size:
            change = f"had {self.size:,} bytes when the model was opened, and has {status.st_size:,} now"
        elif identity[:2] != self._identity[:2]:
            change = "was replaced by another file since the model was opened"
        else:
            change = "was written to since the model was opened"
        raise CorruptCheckpoint(f"{self.path}: {change}; open the model again")

    def close(self) -> None:
        """Close it; nothing may read from it any more."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
