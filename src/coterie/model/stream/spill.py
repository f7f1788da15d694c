"""Outputs that are many go to files, so that the memory of a run does not grow with its text."""

from __future__ import annotations

import ctypes
import functools
import mmap
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

#: Bytes of units' outputs that are held in memory in one stage; what comes after them goes to files.
SPILL_BYTES = 16 * 2**20

#: Bytes of outputs after which the C library is asked to give back memory.
TRIM_BYTES = 64 * 2**20

#: Tensors below this size are never worth a file.
SMALL_BYTES = 64 * 2**10


class Spill:
    """Keeps tensors in files that have no name, mapped into memory only while they are used."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
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
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
        kept = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
        kept.copy_(tensor)
        self._maps.add(mapped)
        _forget_pages(mapped)
        return kept

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


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such handle
        return None


def _forget_pages(mapped: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):  # where it is missing, the system decides by itself
        mapped.madvise(mmap.MADV_DONTNEED)
