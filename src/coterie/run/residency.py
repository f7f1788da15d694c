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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from coterie.errors import InputError, NotEnoughMemory, ReadError
from coterie.run.arena import Arena
from coterie.run.leases import Counters, Entry, Lease, Leases
from coterie.run.policies import Policy, Tokens, policy_named, shape_of
from coterie.run.reader import Read, Reader
from coterie.run.records import Key, Record, slot_bytes
from coterie.run.replay import waves


class Residency:
    """The experts that are in memory.

    Attributes:
        records: where the bytes of every expert lie.
        policy: says which expert goes.
    """

    def __init__(
        self, arena: Arena, reader: Reader, records: Mapping[Key, Record], policy: Policy | str = "follow"
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
        self._entries: dict[Key, Entry] = {}
        self._queued: dict[Key, Entry] = {}  # prefetches that have not begun and have no slot
        self._free = list(reversed(range(arena.num_slots)))
        self._num_pinned = 0  # entries with a pin
        self._may_go_LE = np.zeros(shape, dtype=bool)  # ready, and not pinned
        self._to_come_LE = np.zeros(shape, dtype=bool)  # prefetched, and its layer still to come
        self._is_starved = False  # a layer waits for a slot
        self._step, self._num_tokens = 0, 1  # tokens before the pass, and in it
        self._layer = -1
        self._asked: set[int] = set()  # by the layer under way
        self._announced: set[int] = set()  # and what it has said that it will ask for
        self._counters = Counters()

    @property
    def counters(self) -> Counters:
        """What has happened so far: a copy."""
        with self._changed:
            return replace(self._counters)

    @property
    def prefetched(self) -> tuple[int, int]:
        """How many of the experts that were prefetched were of use, and of how many it is known."""
        used = self._counters.prefetches_used
        return used, used + self._counters.prefetches_wasted

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
        """Tokens before the pass through the layers; another begins when a layer comes that has been, or asks again."""
        return self._step

    def announce(self, layer: int, experts: Sequence[int], tokens: Tokens, num_tokens: int) -> None:
        """Say what a layer is about to ask for in a pass of several tokens, and which of them chose what.

        Without that, what is asked for counts as if one token had chosen it.

        Args:
            layer: the layer.
            experts: numbers of experts, each once, which `acquire` is called with next, in one wave or several.
            tokens: the places in the pass of the tokens that chose each of them.
            num_tokens: tokens of the pass.

        Raises:
            InputError: there is no such expert.
        """
        keys = self._keys(layer, experts)
        with self._changed:
            self._note(layer, [expert for _, expert in keys], tokens, num_tokens)
            self._announced = set(experts)

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
            if layer != self._layer or not self._announced.issuperset(experts):
                self._note(layer, [expert for _, expert in keys])
            self._announced.difference_update(experts)
            entries: dict[Key, Entry] = {}
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
            own = {expert: entries[layer, expert] for _, expert in keys}
            return Leases(layer, own, self._wait_for, self.release)

    def peek(self, layer: int, experts: Sequence[int]) -> Leases:
        """Return leases of those experts of a layer that are in memory; nothing is read, and nothing is counted."""
        with self._changed:
            entries = {expert: entry for expert in experts if (entry := self._entries.get((layer, expert))) is not None}
            ready = {expert: entry for expert, entry in entries.items() if entry.is_ready}
            for entry in ready.values():
                self._pin(entry)
            return Leases(layer, ready, self._wait_for, self.release)

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
                entry = Entry(key, None)
                entry.read = self._reader.submit(
                    self.records[key],
                    partial(self._place, entry),
                    speculative=True,
                    when_over=partial(self._arrive, entry),
                )
                self._queued[key] = entry
            return len(missing)

    def waves(self, layer: int, experts: Sequence[int]) -> list[list[int]]:
        """Return experts of a layer as groups to ask for one after the other; see `coterie.run.replay.waves`.

        Args:
            layer: the layer.
            experts: numbers of experts, each once.
        """
        if len(experts) <= self._arena.num_slots:
            return [list(experts)]
        with self._changed:
            in_memory = [(layer, expert) in self._entries for expert in experts]
        return waves(experts, in_memory, self._arena.num_slots)

    def close(self) -> None:
        """Wait for the lanes, fail what is still waited for, and give the memory back."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._reader.close()
        self._arena.close()

    def __enter__(self) -> Residency:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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

    def _note(self, layer: int, experts: Sequence[int], tokens: Tokens | None = None, num_tokens: int = 1) -> None:
        """Take note of who asks for what, and begin a new pass where the last one is over."""
        is_again = layer == self._layer and not self._asked.isdisjoint(experts)
        if layer != self._layer or is_again:
            self._pass_by(self._layer)
            if layer < self._layer or is_again:
                self._step += self._num_tokens
            self._layer, self._asked, self._announced = layer, set(), set()
        self._num_tokens = num_tokens
        self._asked.update(experts)
        if experts:
            self.policy.touch(layer, experts, self._step, tokens)

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

    def _join(self, entry: Entry) -> None:
        """Pin an expert that is in memory or on the way there."""
        self._counters.hits += entry.is_ready
        self._counters.misses += not entry.is_ready
        if self._to_come_LE[entry.key]:
            self._to_come_LE[entry.key] = False
            self._counters.prefetches_used += 1
        if not entry.is_ready and entry.read is not None:
            self._reader.promote(entry.read)
        self._pin(entry)

    def _pin(self, entry: Entry) -> None:
        self._num_pinned += not entry.pins
        entry.pins += 1
        self._may_go_LE[entry.key] = False

    def _load(self, key: Key) -> Entry:
        """Read an expert that is missing, pinned."""
        self._take_back(key)
        entry = Entry(key, self._take_slot())
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

    def _drop(self, entry: Entry) -> None:
        """Free the slot of an entry."""
        assert entry.slot is not None
        del self._entries[entry.key]
        self._may_go_LE[entry.key] = self._to_come_LE[entry.key] = False
        self._free.append(entry.slot)

    def _unpin(self, entry: Entry) -> None:
        entry.pins -= 1
        if not entry.pins and entry.error is None:
            self._num_pinned -= 1
            self._may_go_LE[entry.key] = entry.is_ready
            self._changed.notify_all()

    def _place(self, entry: Entry) -> memoryview | None:
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

    def _arrive(self, entry: Entry, read: Read) -> None:
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
                layer=leases.layer,
                expert=over.key[1],
                slot=over.slot,
                data=self._arena.slot(over.slot),
                offsets=record.offsets,
                record=record,
            )
