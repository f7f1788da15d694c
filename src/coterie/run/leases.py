"""What whoever asks for experts gets: leases of them, one of each, pinned in memory until they are given back.

`coterie.run.residency` makes them, and knows what is behind them: an entry for each expert that has a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from coterie.run.reader import Read
from coterie.run.records import Key, Record


@dataclass(kw_only=True, slots=True)
class Counters:
    """What has happened so far.

    Attributes:
        hits: experts that were in memory when they were asked for.
        misses: experts that were not, those under way among them.
        evictions: experts that went to make room.
        num_bytes: bytes of experts that were read, demanded or not.
        waits: how many times whoever computes had to wait for an expert.
        wait_seconds: how long in all.
        prefetches: reads that were begun before they were asked for.
        prefetches_used: those of them that were asked for, in time or under way.
        prefetches_wasted: those whose layer came without asking for them, or that went before it came.
        failures: reads that failed.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_bytes: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    prefetches: int = 0
    prefetches_used: int = 0
    prefetches_wasted: int = 0
    failures: int = 0


class Entry:
    """An expert that has a slot, or is about to get one.

    Attributes:
        key: which one.
        slot: its slot; None as long as a prefetch has not begun.
        read: what fills the slot, until it is over.
        pins: leases of it.
        is_ready: the bytes are there.
        error: why they never will be.
    """

    __slots__ = ("error", "is_ready", "key", "pins", "read", "slot")

    def __init__(self, key: Key, slot: int | None) -> None:
        self.key = key
        self.slot = slot
        self.read: Read | None = None
        self.pins = 0
        self.is_ready = False
        self.error: Exception | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """An expert in memory, pinned until it is given back.

    Attributes:
        layer: its layer.
        expert: its number.
        slot: number of its slot.
        data: what the slot holds, uint8 [slot_bytes], no copy.
        offsets: where in it each piece of the record begins, in the order of the record.
        record: where it came from.
    """

    layer: int
    expert: int
    slot: int
    data: torch.Tensor
    offsets: tuple[int, ...]
    record: Record

    def piece(self, number: int) -> torch.Tensor:
        """Return the bytes of a piece of the record, uint8 [num_bytes], no copy.

        It is as aligned in memory as it is in its file: where a file has a matrix of bfloat16 at an odd byte, which no
        common writer does, `view` refuses and a copy is needed.
        """
        begin = self.offsets[number]
        return self.data[begin : begin + self.record.pieces[number].num_bytes]


class Leases:
    """What a layer has asked for: each expert once, whenever it is there. Made by `Residency.acquire`.

    Attributes:
        layer: the layer.
        experts: what it has asked for, each once, in the order of asking.
        hits: those of them that were in memory at that moment.
    """

    def __init__(
        self,
        layer: int,
        entries: Mapping[int, Entry],
        wait_for: Callable[[Leases, Sequence[int]], Lease],
        give_back: Callable[[Leases], None],
    ) -> None:
        """Hold entries, which are pinned.

        Args:
            layer: their layer.
            entries: by the number of the expert.
            wait_for: returns the first of some experts that is there.
            give_back: takes all of them back.
        """
        self.layer = layer
        self.experts = tuple(entries)
        self.hits = tuple(expert for expert, entry in entries.items() if entry.is_ready)
        self._wait_for, self._give_back = wait_for, give_back
        self._entries = dict(entries)

    def __getitem__(self, expert: int) -> Lease:
        """Return the lease of one expert; wait for it.

        Raises:
            KeyError: it was not asked for, or was given back.
            ReadError: it cannot be read.
            CorruptCheckpoint: its file is no longer what it was.
        """
        return self._wait_for(self, [expert])

    def __iter__(self) -> Iterator[Lease]:
        """Yield the leases of all, those in memory first and then as they arrive.

        Raises:
            ReadError: one cannot be read.
            CorruptCheckpoint: its file is no longer what it was.
        """
        left = list(self.experts)
        while left:
            lease = self._wait_for(self, left)
            left.remove(lease.expert)
            yield lease

    def __len__(self) -> int:
        return len(self.experts)

    def release(self) -> None:
        """Give all of them back; what was yielded must not be used any more. Once more does nothing."""
        self._give_back(self)

    def __enter__(self) -> Leases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
