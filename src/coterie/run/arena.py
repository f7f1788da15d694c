"""Memory for experts: slots of one size, taken from the system once, at the start.

Whoever has an arena has the memory: the pages are touched when it is made, so a budget that does not fit shows before
the first token and not in the middle of an answer. The memory is private to the process and counts where limits count
it: `mmap` alone would give shared pages, which RLIMIT_DATA overlooks.

Readers fill `memory`, kernels see `slot`; here both are the same bytes. On a device with memory of its own, `memory`
would be a pinned page of the host and `slot` the place on the device that it is copied to.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from types import TracebackType

import torch

from coterie.errors import InputError, NotEnoughMemory
from coterie.run.records import ALIGNMENT

log = logging.getLogger(__name__)

#: Bytes of which slots begin at multiples: whole pages of memory, and whole blocks of a file.
SLOT_ALIGNMENT = max(mmap.PAGESIZE, ALIGNMENT)


class Arena:
    """Slots of memory, all of one size, page-aligned.

    A tensor of a slot is a view: it shows what the slot holds now, and keeps the memory from being given back.

    Attributes:
        num_slots: how many there are.
        slot_bytes: bytes of each, rounded up to whole pages.
        num_bytes: bytes of all of them.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        """Take the memory.

        Args:
            num_slots: how many slots, at least one.
            slot_bytes: bytes that each has to hold, at least one; rounded up to whole pages.

        Raises:
            InputError: there would be no slot, or nothing in it.
            NotEnoughMemory: the system refuses as much.
        """
        if num_slots < 1 or slot_bytes < 1:
            raise InputError(f"{num_slots} slots of {slot_bytes} bytes hold nothing; an expert needs one slot at least")
        self.num_slots = num_slots
        self.slot_bytes = -(-slot_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        self.num_bytes = self.num_slots * self.slot_bytes
        try:
            self._map: mmap.mmap | None = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise NotEnoughMemory(
                f"{num_slots} slots of {self.slot_bytes:,} bytes for experts are {self.num_bytes:,} bytes, which the "
                f"system refuses ({error}); take fewer slots, or raise the limit"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Reads past the page cache hold every page that they write to. Of large ones there are fewer: that halved
            # the processor time of reads, which were a tenth faster.
            with contextlib.suppress(OSError):  # a kernel without large pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(self._map)
        content = torch.frombuffer(self._map, dtype=torch.uint8)
        content[:: mmap.PAGESIZE] = 0
        self._slots = content.view(num_slots, self.slot_bytes).unbind()

    def slot(self, number: int) -> torch.Tensor:
        """Return what computes see of a slot: uint8 [slot_bytes], no copy."""
        return self._slots[number]

    def memory(self, number: int) -> memoryview:
        """Return what readers fill of a slot: [slot_bytes], no copy."""
        begin = number * self.slot_bytes
        return self._memory[begin : begin + self.slot_bytes]

    def close(self) -> None:
        """Give the memory back; where somebody still has a tensor of a slot, with the last of these."""
        if self._map is None:
            return
        # Not `mmap.close`: torch keeps the object but no lock on its buffer, and a tensor would show unmapped memory.
        mapped = weakref.ref(self._map)
        self._memory.release()
        self._map, self._slots = None, ()
        if mapped() is not None:
            log.debug(
                "%s bytes for experts are given back later: what shows slots is still in use", f"{self.num_bytes:,}"
            )

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
