"""Which experts are in memory: asked for by layers, read when they are missing, kept as long as they are worth it.

    with residency.acquire(layer, experts) as leases:
        for lease in leases:                 # those in memory first, then as they arrive
            parts[lease.expert] = compute(lease)
    output = sum(parts[expert] for expert in experts)

A slot of the arena is free, or being read into, or ready. Whoever has a lease of an expert has it pinned: its slot
stays as it is until the lease is given back. Of what is not pinned the policy says what goes. What a layer asks for is
read at once; what is prefetched is read when lanes have nothing else to do, takes its slot only then, and makes nothing
go that is pinned, that the layer under way has asked for, or that was prefetched and is still to come.

A read that fails frees its slot and concerns those alone who asked for the expert while it was read: whoever asks next,
reads again.

One thread computes, and calls what is here; the lanes of the reader do the rest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.errors import InputError, NotEnoughMemory, ReadError
from coterie.run.arena import Arena
from coterie.run.policies import Policy, policy_named, shape_of
from coterie.run.reader import Read, Reader
from coterie.run.records import Key, Record, slot_bytes


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


class _Entry:
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

    def __init__(self, residency: Residency, layer: int, entries: Mapping[int, _Entry]) -> None:
        """Hold entries, which are pinned."""
        self.layer = layer
        self.experts = tuple(entries)
        self.hits = tuple(expert for expert, entry in entries.items() if entry.is_ready)
        self._residency = residency
        self._entries = dict(entries)

    def __getitem__(self, expert: int) -> Lease:
        """Return the lease of one expert; wait for it.

        Raises:
            KeyError: it was not asked for, or was given back.
            ReadError: it cannot be read.
            CorruptCheckpoint: its file is no longer what it was.
        """
        return self._residency._wait_for(self, [expert])

    def __iter__(self) -> Iterator[Lease]:
        """Yield the leases of all, those in memory first and then as they arrive.

        Raises:
            ReadError: one cannot be read.
            CorruptCheckpoint: its file is no longer what it was.
        """
        left = list(self.experts)
        while left:
            lease = self._residency._wait_for(self, left)
            left.remove(lease.expert)
            yield lease

    def __len__(self) -> int:
        return len(self.experts)

    def release(self) -> None:
        """Give all of them back; what was yielded must not be used any more. Once more does nothing."""
        self._residency.release(self)

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class Residency:
    """The experts that are in memory.

    Attributes:
        records: where the bytes of every expert lie.
        policy: says which expert goes.
    """

    def __init__(
        self, arena: Arena, reader: Reader, records: Mapping[Key, Record], policy: Policy | str = "decay"
    ) -> None:
        """Take over an arena and a reader, both of which `close` closes, and open the files of all records.

        Args:
            arena: slots, each large enough for any of the records.
            reader: reads them.
            records: where the bytes of every expert lie, one at least.
            policy: what every expert is worth, or the name of a policy.

        Raises:
            InputError: there are no records, or one does not fit into a slot.
            UnknownName: there is no such policy.
            CorruptCheckpoint: a file is missing, or ends before a piece does.
            ReadError: a file cannot be opened.
        """
        if not records:
            raise InputError("there are no records of experts; a model with routed experts has some")
        needed = slot_bytes(records.values())
        if needed > arena.slot_bytes:
            raise InputError(f"slots have {arena.slot_bytes:,} bytes, and an expert needs {needed:,} of them")
        reader.open(records.values())
        shape = shape_of(records)
        self.records = records
        self.policy = policy_named(policy, shape) if isinstance(policy, str) else policy
        self._arena, self._reader = arena, reader
        self._changed = threading.Condition()
        self._is_closed = False
        self._entries: dict[Key, _Entry] = {}
        self._queued: dict[Key, _Entry] = {}  # prefetches that have not begun and have no slot
        self._free = list(reversed(range(arena.num_slots)))
        self._num_pinned = 0  # entries with a pin
        self._may_go_LE = np.zeros(shape, dtype=bool)  # ready, and not pinned
        self._to_come_LE = np.zeros(shape, dtype=bool)  # prefetched, and its layer still to come
        self._is_starved = False  # a layer waits for a slot
        self._step = 0
        self._layer = -1
        self._asked: set[int] = set()  # by the layer under way
        self._counters = Counters()

    @property
    def counters(self) -> Counters:
        """What has happened so far: a copy."""
        with self._changed:
            return replace(self._counters)

    def ready(self, layer: int) -> NDArray[np.bool_]:
        """Return which experts of a layer are in memory and not in use, bool [experts]: a copy."""
        with self._changed:
            return np.array(self._may_go_LE[layer])

    def in_memory(self) -> dict[int, list[int]]:
        """Return for each layer which experts are in memory now, ascending."""
        layers: dict[int, list[int]] = {layer: [] for layer, _ in self.records}
        with self._changed:
            ready = sorted(key for key, entry in self._entries.items() if entry.is_ready)
        for layer, expert in ready:
            layers[layer].append(expert)
        return layers

    @property
    def step(self) -> int:
        """Number of the pass through the layers; another begins when a layer comes that has been, or asks again."""
        return self._step

    def acquire(self, layer: int, experts: Sequence[int]) -> Leases:
        """Ask for experts of a layer; reads of those that are missing are issued before this returns.

        Args:
            layer: the layer.
            experts: numbers of experts; one that is named twice counts once.

        Returns:
            The leases, which the caller gives back: by `with`, or `release`.

        Raises:
            InputError: there is no such expert.
            NotEnoughMemory: there are less slots than these experts and those that are pinned; see `waves`.
            ReadError: the reader is closed.
        """
        keys = self._keys(layer, experts)
        with self._changed:
            self._check_open()
            self._check_room(keys)
            self._note(layer, [expert for _, expert in keys])
            entries: dict[Key, _Entry] = {}
            try:
                for key in keys:
                    entry = self._entries.get(key)
                    if entry is not None:
                        self._join(entry)
                        entries[key] = entry
                missing = [key for key in keys if key not in entries]
                self._make_room(len(missing))
                for key in missing:
                    entries[key] = self._load(key)
            except BaseException:
                for entry in entries.values():
                    self._unpin(entry)
                raise
            return Leases(self, layer, {expert: entries[layer, expert] for _, expert in keys})

    def peek(self, layer: int, experts: Sequence[int]) -> Leases:
        """Return leases of those experts of a layer that are in memory; nothing is read, and nothing is counted."""
        with self._changed:
            entries = {expert: entry for expert in experts if (entry := self._entries.get((layer, expert))) is not None}
            ready = {expert: entry for expert, entry in entries.items() if entry.is_ready}
            for entry in ready.values():
                self._pin(entry)
            return Leases(self, layer, ready)

    def release(self, leases: Leases) -> None:
        """Give leases back; once more does nothing."""
        with self._changed:
            entries, leases._entries = leases._entries, {}
            for entry in entries.values():
                self._unpin(entry)

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """Say which experts a layer is likely to ask for, in place of what was said of it before and has not begun.

        Args:
            layer: the layer, which is still to come.
            experts: numbers of experts, the likeliest first.

        Returns:
            How many reads wait for a lane that has nothing else to do.

        Raises:
            InputError: there is no such expert.
            ReadError: the reader is closed.
        """
        keys = self._keys(layer, experts)
        with self._changed:
            self._check_open()
            self._unqueue(layer)
            missing = [key for key in keys if key not in self._entries]
            for key in missing:
                entry = _Entry(key, None)
                entry.read = self._reader.submit(
                    self.records[key],
                    partial(self._place, entry),
                    speculative=True,
                    when_over=partial(self._arrive, entry),
                )
                self._queued[key] = entry
            return len(missing)

    def waves(self, layer: int, experts: Sequence[int], size: int | None = None) -> list[tuple[int, ...]]:
        """Split experts into groups to ask for one after the other: those in memory first, before they have to go.

        Args:
            layer: the layer.
            experts: numbers of experts; one that is named twice counts once.
            size: experts of a group at most; by default half the slots, so that one group can be read while another is
                computed with.
        """
        size = size or max(1, self._arena.num_slots // 2)
        with self._changed:
            order = sorted(dict.fromkeys(experts), key=lambda expert: (layer, expert) not in self._entries)
        return [tuple(order[begin : begin + size]) for begin in range(0, len(order), size)]

    def close(self) -> None:
        """Wait for the lanes, fail what is still waited for, and give the memory back."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._reader.close()
        self._arena.close()

    def __enter__(self) -> Residency:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _keys(self, layer: int, experts: Sequence[int]) -> list[Key]:
        """Return experts of a layer, each once; raises InputError for one that there is not."""
        keys = [(layer, expert) for expert in dict.fromkeys(experts)]
        for key in keys:
            if key not in self.records:
                raise InputError(f"layer {layer} has no expert {key[1]}")
        return keys

    # All below is called with the lock, but what lanes and leases call, which takes it.

    def _check_open(self) -> None:
        if self._is_closed:
            raise ReadError("the experts are closed; nothing can be asked for any more")

    def _check_room(self, keys: Sequence[Key]) -> None:
        entries = (self._entries.get(key) for key in keys)
        pinned_already = sum(entry is not None and entry.pins > 0 for entry in entries)
        others = self._num_pinned - pinned_already
        if len(keys) + others > self._arena.num_slots:
            raise NotEnoughMemory(
                f"layer {keys[0][0]} asks for {len(keys)} experts at once, and {self._arena.num_slots} slots, of which "
                f"{others} are in use for others, do not hold them; ask for them in waves, or take more slots"
            )

    def _note(self, layer: int, experts: Sequence[int]) -> None:
        """Take note of who asks for what, and begin a new step where the last one is over."""
        is_again = layer == self._layer and not self._asked.isdisjoint(experts)
        if layer != self._layer or is_again:
            self._pass_by(self._layer)
            self._step += layer < self._layer or is_again
            self._layer, self._asked = layer, set()
        self._asked.update(experts)
        if experts:
            self.policy.touch(layer, experts, self._step)

    def _pass_by(self, layer: int) -> None:
        """Forget what was prefetched for a layer that is over."""
        if layer < 0:
            return
        self._unqueue(layer)
        self._counters.prefetches_wasted += int(self._to_come_LE[layer].sum())
        self._to_come_LE[layer] = False

    def _unqueue(self, layer: int) -> None:
        for key in [key for key in self._queued if key[0] == layer]:
            self._take_back(key)

    def _take_back(self, key: Key) -> None:
        """Drop a prefetch that has no slot yet; a lane that is about to ask for one gets none."""
        entry = self._queued.pop(key, None)
        if entry is not None and entry.read is not None:
            self._reader.cancel(entry.read)

    def _join(self, entry: _Entry) -> None:
        """Pin an expert that is in memory or on the way there."""
        self._counters.hits += entry.is_ready
        self._counters.misses += not entry.is_ready
        if self._to_come_LE[entry.key]:
            self._to_come_LE[entry.key] = False
            self._counters.prefetches_used += 1
        if not entry.is_ready and entry.read is not None:
            self._reader.promote(entry.read)
        self._pin(entry)

    def _pin(self, entry: _Entry) -> None:
        self._num_pinned += not entry.pins
        entry.pins += 1
        self._may_go_LE[entry.key] = False

    def _load(self, key: Key) -> _Entry:
        """Read an expert that is missing, pinned."""
        self._take_back(key)
        entry = _Entry(key, self._take_slot())
        assert entry.slot is not None
        try:
            entry.read = self._reader.submit(
                self.records[key], self._arena.memory(entry.slot), when_over=partial(self._arrive, entry)
            )
        except BaseException:
            self._free.append(entry.slot)
            raise
        self._counters.misses += 1
        self._entries[key] = entry
        self._num_pinned += 1
        entry.pins = 1
        return entry

    def _take_slot(self) -> int:
        """Return a slot for what is demanded, which exists; wait where all that may go is still being read."""
        while not self._free:
            self._make_room(1)
            if self._free:
                break
            self._is_starved = True
            try:
                self._changed.wait()
            finally:
                self._is_starved = False
            self._check_open()
        return self._free.pop()

    def _make_room(self, num_slots: int) -> None:
        """Free so many slots for what is demanded, or all that may go; what was prefetched and is to come goes last."""
        if len(self._free) < num_slots:
            self._evict(num_slots - len(self._free), self._may_go_LE & ~self._to_come_LE)
        if len(self._free) < num_slots:
            self._evict(num_slots - len(self._free), self._may_go_LE)

    def _evict(self, count: int, may_go_LE: NDArray[np.bool_]) -> None:
        """Free so many slots, or those of all that may go."""
        for key in self.policy.victims(may_go_LE, min(count, int(np.count_nonzero(may_go_LE)))):
            self._counters.evictions += 1
            self._counters.prefetches_wasted += bool(self._to_come_LE[key])
            self._drop(self._entries[key])

    def _drop(self, entry: _Entry) -> None:
        """Free the slot of an entry."""
        assert entry.slot is not None
        del self._entries[entry.key]
        self._may_go_LE[entry.key] = self._to_come_LE[entry.key] = False
        self._free.append(entry.slot)

    def _unpin(self, entry: _Entry) -> None:
        entry.pins -= 1
        if not entry.pins and entry.error is None:
            self._num_pinned -= 1
            self._may_go_LE[entry.key] = entry.is_ready
            self._changed.notify_all()

    def _place(self, entry: _Entry) -> memoryview | None:
        """Return memory for a prefetch that is about to begin, or None where it is not worth it. A lane calls this."""
        with self._changed:
            if self._queued.get(entry.key) is not entry:
                return None
            del self._queued[entry.key]
            if self._is_closed or self._is_starved:
                return None
            if not self._free:
                may_go_LE = self._may_go_LE & ~self._to_come_LE
                may_go_LE[self._layer, list(self._asked)] = False
                self._evict(1, may_go_LE)
                if not self._free:
                    return None
            entry.slot = self._free.pop()
            self._entries[entry.key] = entry
            self._to_come_LE[entry.key] = True
            self._counters.prefetches += 1
            return self._arena.memory(entry.slot)

    def _arrive(self, entry: _Entry, read: Read) -> None:
        """Take note that a read is over. A lane calls this, or who closes."""
        with self._changed:
            entry.read = None
            if entry.slot is None:
                if self._queued.get(entry.key) is entry:
                    del self._queued[entry.key]
                return
            if read.error is None:
                entry.is_ready = True
                self._may_go_LE[entry.key] = not entry.pins
                self._counters.num_bytes += read.record.num_bytes
            else:
                entry.error = read.error
                self._counters.failures += 1
                self._num_pinned -= entry.pins > 0
                self._drop(entry)
            self._changed.notify_all()

    def _wait_for(self, leases: Leases, experts: Sequence[int]) -> Lease:
        """Return the first of some experts that is in memory, or that comes there."""
        with self._changed:
            begun: float | None = None
            while True:
                self._check_open()
                entries = [leases._entries[expert] for expert in experts]
                over = next((entry for entry in entries if entry.is_ready or entry.error is not None), None)
                if over is not None:
                    break
                if begun is None:
                    begun = time.perf_counter()
                    self._counters.waits += 1
                self._changed.wait()
            if begun is not None:
                self._counters.wait_seconds += time.perf_counter() - begun
            if over.error is not None:
                raise over.error
            assert over.slot is not None
            record = self.records[over.key]
            return Lease(
                layer=leases.layer, expert=over.key[1], slot=over.slot, data=self._arena.slot(over.slot),
                offsets=record.offsets, record=record,
            )  # fmt: skip
