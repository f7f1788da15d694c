"""Outputs that are many go to files, so that the memory of a run does not grow with its text."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

#: Bytes of units' outputs that are held in memory in one stage; what comes after them goes to files.
SPILL_BYTES = 16 * 2**20

#: Bytes of outputs after which the C library is asked to give back memory: what computing them left behind is several
#: times as much.
TRIM_BYTES = 8 * 2**20

#: Tensors below this size are never worth a place in a file.
SMALL_BYTES = 64 * 2**10

#: Bytes of a file. Many tensors share one, since every mapped file takes one of the few that a process may have open.
FILE_BYTES = 64 * 2**20

#: Memory from this size on goes back to the system when it is let go of, and is never part of a heap that others fill
#: with holes.
OWN_BYTES = 2**22

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # from glibc's malloc.h


class Spill:
    """Keeps tensors in files that have no name, mapped into memory only while they are used.

    A file goes when the last of its tensors goes.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._maps: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()  # and where they begin
        self._last: mmap.mmap | None = None
        self._used = 0
        self._held = 0
        self._since_trim = 0

    def begin(self, *, hold: bool = True) -> None:
        """Begin to count anew what is held in memory; nothing is where what comes is kept for long."""
        self._held = 0 if hold else SPILL_BYTES

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a tensor of equal content on the CPU, in memory or, beyond the bound, in a file."""
        size = tensor.numel() * tensor.element_size()
        self._since_trim += size
        if size < SMALL_BYTES or self._held + size <= SPILL_BYTES:
            self._held += size if size >= SMALL_BYTES else 0
            return tensor.to("cpu")
        return self._in_file(tensor, size)

    def settle(self, tensor: Tensor) -> None:
        """Move what a tensor holds into a file, in place, where it is large and not in one yet.

        For what a job made itself, such as its mask, and keeps while all others are at work.
        """
        size = tensor.numel() * tensor.element_size()
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == size
        if size >= SMALL_BYTES and alone and tensor.device.type == "cpu" and not self._holds(tensor):
            self._since_trim += size
            tensor.data = self._in_file(tensor.detach(), size)

    def _holds(self, tensor: Tensor) -> bool:
        place = tensor.data_ptr()
        return any(begin <= place < begin + len(mapped) for mapped, begin in self._maps.items())

    def _in_file(self, tensor: Tensor, size: int) -> Tensor:
        mapped, start = self._place(size)
        kept = torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        kept.copy_(tensor)
        _forget_pages(mapped, start, size)
        return kept

    def _place(self, size: int) -> tuple[mmap.mmap, int]:
        """Return a file with room for `size` bytes, and where they begin in it."""
        if self._last is None or self._used + size > len(self._last):
            with tempfile.TemporaryFile(dir=self._folder) as file:
                length = max(FILE_BYTES, size)
                file.truncate(length)
                _claim(file.fileno(), length)
                self._last, self._used = mmap.mmap(file.fileno(), length), 0
            self._maps[self._last] = torch.frombuffer(self._last, dtype=torch.uint8).data_ptr()
        start = self._used
        self._used = -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        return self._last, start

    def release(self) -> None:
        """Let the system take the pages of all files out of memory; what is in them stays."""
        for mapped in self._maps:
            _forget_pages(mapped)
        # What batches leave behind in the C library's heap grows with the text where nobody trims it.
        if self._since_trim >= TRIM_BYTES:
            self._since_trim = 0
            trim_memory()


def trim_memory() -> None:
    """Give memory that was let go of back to the system, where the C library would keep it for later."""
    if (library := _c_library()) is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _claim(descriptor: int, length: int) -> None:
    """Claim the place on the disk; raises OSError when it is full, where writing to a mapped file ends the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise


@functools.cache
def share_heaps() -> None:
    """Let all threads share two of the C library's heaps, where each would get its own.

    What a heap keeps for later counts as memory in use, and there may be eight heaps for every core of the machine.
    """
    if (library := _c_library()) is not None and hasattr(library, "mallopt"):
        library.mallopt(_M_ARENA_MAX, 2)


@functools.cache
def keep_out_of_heaps() -> None:
    """Keep tensors from `OWN_BYTES` on out of the C library's heaps, from now on and in all of the process.

    By itself the library raises that bound to 32 MiB, and where gradients are computed, with tensors of many sizes, the
    holes between them then grow from layer to layer. It costs time, since the system clears every page anew.
    """
    if (library := _c_library()) is not None and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, OWN_BYTES)


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None


def _forget_pages(mapped: mmap.mmap, start: int = 0, size: int | None = None) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):  # where it is missing, the system decides by itself
        mapped.madvise(mmap.MADV_DONTNEED, start, len(mapped) - start if size is None else size)
