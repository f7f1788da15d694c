"""Experts in memory: what a layer asks for, what is prefetched, what goes, and what a failing disk leaves behind."""

import gc
import random
import threading
import time
import weakref

import numpy as np
import pytest

from coterie.errors import CorruptCheckpoint, InputError, NotEnoughMemory, ReadError, UnknownName
from coterie.run.arena import Arena
from coterie.run.policies import POLICIES, Lru, policy_named
from coterie.run.reader import Reader
from coterie.run.records import ALIGNMENT, Piece, Record, slot_bytes
from coterie.run.replay import replay
from coterie.run.residency import Residency
from experts_on_disk import Disk, bytes_of, expert_files, pieces_in

LAYERS, EXPERTS = 3, 6


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def records(tmp_path):
    return expert_files(tmp_path, LAYERS, EXPERTS)


@pytest.fixture
def make(records):
    """Return a function that makes a residency of so many slots; all are closed in the end."""
    made = []

    def make(slots, policy="lru", lanes=1, block_bytes=2**20):
        reader = Reader(lanes, block_bytes=block_bytes)
        made.append(Residency(Arena(slots, slot_bytes(records.values())), reader, records, policy))
        return made[-1]

    yield make
    for residency in made:
        residency.close()


def settle(residency):
    """Wait until nothing is read any more."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with residency._changed:
            if not residency._queued and all(entry.is_ready for entry in residency._entries.values()):
                return
        time.sleep(0.001)
    raise AssertionError("reads do not end")


def resident(residency):
    settle(residency)
    return sorted(residency._entries)


def ask(residency, layer, *experts):
    """Ask for experts, look at their bytes, and give them back."""
    with residency.acquire(layer, experts) as leases:
        for lease in leases:
            assert [bytes(lease.piece(n).tolist()) for n in range(3)] == bytes_of(lease.record)


def check(residency, leases=()):
    """What holds whenever nobody is at it."""
    with residency._changed:
        entries = residency._entries
        slots = [entry.slot for entry in entries.values()]
        assert sorted([*slots, *residency._free]) == list(range(residency._arena.num_slots)), "lost, or taken twice"
        assert all(key == entry.key and entry.error is None for key, entry in entries.items())
        pins = {}
        for each in leases:
            for entry in each._entries.values():
                if entry.error is None:
                    assert entries[entry.key] is entry, "pinned, and gone"
                    pins[entry.key] = pins.get(entry.key, 0) + 1
        assert {key: entry.pins for key, entry in entries.items() if entry.pins} == pins
        assert residency._num_pinned == len(pins)
        may_go = {key for key, entry in entries.items() if entry.is_ready and not entry.pins}
        assert set(zip(*map(list, np.nonzero(residency._may_go_LE)), strict=True)) == may_go
        for key in zip(*map(list, np.nonzero(residency._to_come_LE)), strict=True):
            assert key in entries
            assert not entries[key].pins
        assert not residency._queued.keys() & entries.keys()


def test_what_is_in_memory_comes_first_and_the_rest_as_it_arrives(make, disk):
    residency = make(6)
    ask(residency, 0, 4, 2)
    disk.stop()
    with residency.acquire(0, [1, 2, 3, 4, 1]) as leases:
        assert len(leases) == 4
        assert leases.experts == (1, 2, 3, 4)
        assert leases.hits == (2, 4)
        disk.wait_for_reads(1)
        arrivals = iter(leases)
        assert [next(arrivals).expert, next(arrivals).expert] == [2, 4]
        assert leases[4].expert == 4
        disk.go()
        rest = list(arrivals)
        assert {lease.expert for lease in rest} == {1, 3}
        for lease in rest:
            assert (lease.layer, lease.data.shape) == (0, (residency._arena.slot_bytes,))
            assert [bytes(lease.piece(n).tolist()) for n in range(3)] == bytes_of(residency.records[0, lease.expert])
        check(residency, [leases])
    check(residency)
    counters = residency.counters
    assert (counters.hits, counters.misses, counters.evictions) == (2, 4, 0)
    assert counters.num_bytes == sum(residency.records[0, expert].num_bytes for expert in (4, 2, 1, 3))
    assert counters.waits >= 1
    assert counters.wait_seconds > 0


def test_an_expert_is_waited_for_by_its_number(make):
    residency = make(6)
    with residency.acquire(1, [5, 3, 0]) as leases:
        parts = {expert: leases[expert].slot for expert in leases.experts}
    assert list(parts) == [5, 3, 0]
    assert len(set(parts.values())) == 3


def test_the_policy_says_who_goes(make):
    residency = make(3, "lru")
    ask(residency, 0, 0, 1, 2)
    ask(residency, 0, 0)
    ask(residency, 1, 5)
    assert resident(residency) == [(0, 0), (0, 2), (1, 5)]
    ask(residency, 1, 4)
    assert resident(residency) == [(0, 0), (1, 4), (1, 5)]
    assert residency.counters.evictions == 2


def test_a_policy_of_ones_own(make, records):
    class Mine(Lru):
        def worth(self):
            return -super().worth()

    residency = make(2, Mine((LAYERS, EXPERTS)))
    ask(residency, 0, 0)
    ask(residency, 0, 1)
    ask(residency, 0, 2)
    assert resident(residency) == [(0, 0), (0, 2)], "the most recent one went"


def test_what_is_pinned_stays(make):
    residency = make(3)
    with residency.acquire(0, [0]) as first:
        data = first[0].data.clone()
        for expert in range(1, 6):
            ask(residency, 0, expert)
            check(residency, [first])
        assert (first[0].data == data).all()
        with residency.acquire(0, [0, 1]) as second:
            assert second[0].slot == first[0].slot
            second.release()
            check(residency, [first])
            with pytest.raises(KeyError):
                second[0]
    check(residency)


def test_more_than_there_are_slots_is_refused_and_nothing_is_pinned(make):
    residency = make(4)
    with pytest.raises(
        NotEnoughMemory, match=r"layer 2 asks for 5 experts at once, and 4 slots, of which 0 are in use"
    ):
        residency.acquire(2, range(5))
    with residency.acquire(1, [0, 1]) as leases:
        with pytest.raises(NotEnoughMemory, match=r"3 experts at once, and 4 slots, of which 2 are in use.* in waves"):
            residency.acquire(2, [0, 1, 2])
        check(residency, [leases])
        with residency.acquire(1, [0, 1, 2, 3]) as more:
            check(residency, [leases, more])
    check(residency)
    assert residency.counters.misses == 6, "two of them were under way"


def test_waves_take_what_is_in_memory_first_and_fit_two_at_a_time(make):
    residency = make(4)
    ask(residency, 0, 3, 5)
    waves = residency.waves(0, [0, 1, 2, 3, 4, 5])
    assert waves == [[3, 5], [0, 1], [2, 4]]
    residency.announce(0, range(6), [[0]] * 6, 1)
    before = None
    for wave in waves:
        leases = residency.acquire(0, wave)
        if before is not None:
            before.release()
        before = leases
        list(leases)
    before.release()
    assert residency.counters.hits == 2
    assert residency.step == 1, "the waves are one pass, after the one that asked for two"


def test_a_pass_of_several_tokens_is_as_many_steps_and_is_told_to_the_policy_once(make):
    calls = []

    class Heard(Lru):
        def touch(self, layer, experts, step, tokens=None):
            calls.append((layer, list(experts), step, tokens))
            super().touch(layer, experts, step, tokens)

    residency = make(3, Heard((LAYERS, EXPERTS)))
    for layer in (0, 1):
        residency.announce(layer, [0, 1, 4], [[0, 1], [2], [1, 2]], 3)
        ask(residency, layer, 4)
        ask(residency, layer, 0, 1)
    ask(residency, 0, 1)
    residency.announce(1, [2], [[1]], 2)
    ask(residency, 1, 2)
    ask(residency, 1, 2)  # again, without having been announced: the next pass, of one token
    assert calls == [
        (0, [0, 1, 4], 0, [[0, 1], [2], [1, 2]]), (1, [0, 1, 4], 0, [[0, 1], [2], [1, 2]]), (0, [1], 3, None),
        (1, [2], 3, [[1]]), (1, [2], 5, None),
    ]  # fmt: skip
    with pytest.raises(InputError, match="layer 1 has no expert 9"):
        residency.announce(1, [9], [[0]], 1)


def test_a_pass_is_over_when_a_layer_comes_again(make):
    residency = make(6)
    steps = []
    for layer, experts in [(0, [1]), (0, [2]), (1, [0]), (2, [0]), (0, [1]), (2, [3]), (2, [3]), (2, [4])]:
        ask(residency, layer, *experts)
        steps.append(residency.step)
    assert steps == [0, 0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", POLICIES)
def test_hits_are_those_of_the_replay(make, name):
    draw = random.Random(3)
    trace = [(step, layer, tuple(draw.sample(range(EXPERTS), 2))) for step in range(40) for layer in range(LAYERS)]
    residency = make(7, policy_named(name, (LAYERS, EXPERTS), trace), lanes=2)
    for step, layer, experts in trace:
        ask(residency, layer, *experts)
        assert residency.step == step
    assert residency.counters.hits == replay(trace, 7, name)
    assert residency.counters.hits + residency.counters.misses == 2 * len(trace)


def test_a_failed_read_concerns_who_asked_for_it_and_the_next_one_passes(make, disk, records):
    residency = make(4)
    ask(residency, 0, 0)
    with residency.acquire(0, [0]) as other:
        disk.fail()
        with residency.acquire(0, [0, 1, 2]) as leases:
            assert leases[0].expert == 0
            for expert in (1, 2):
                with pytest.raises(ReadError, match="Input/output error"):
                    leases[expert]
            with pytest.raises(ReadError, match="Input/output error"):
                list(leases)
            check(residency, [leases, other])
            disk.heal()
            ask(residency, 0, 1, 2)
            with pytest.raises(ReadError):
                leases[1]
        check(residency, [other])
        assert other[0].expert == 0
    check(residency)
    assert residency.counters.failures == 2
    ask(residency, 0, 0, 1, 2)
    assert residency.counters.hits == 2 + 2 + 1


def test_a_failed_read_that_is_given_back_before_it_fails(make, disk):
    residency = make(2)
    disk.stop()
    disk.fail()
    residency.acquire(0, [0, 1]).release()
    check(residency)
    disk.go()
    settle(residency)
    disk.heal()
    check(residency)
    assert resident(residency) == []
    ask(residency, 0, 0, 1)


def test_a_file_that_was_replaced_is_an_error_of_every_layer_that_needs_it(make, records):
    residency = make(2)
    ask(residency, 0, 0)
    file = records[0, 0].pieces[0].file
    file.write_bytes(file.read_bytes())
    with residency.acquire(0, [0, 1]) as leases:
        assert leases[0].expert == 0, "what was read before is still right"
        with pytest.raises(CorruptCheckpoint, match="was written to since"):
            leases[1]
    ask(residency, 1, 0)  # lies in the other file


def test_what_is_prefetched_is_there_when_its_layer_comes(make):
    residency = make(6)
    ask(residency, 0, 0)
    assert residency.prefetch(1, [1, 2, 2]) == 2
    assert resident(residency) == [(0, 0), (1, 1), (1, 2)]
    check(residency)
    with residency.acquire(1, [2, 3]) as leases:
        assert leases.hits == (2,)
        list(leases)
    ask(residency, 2, 0)
    counters = residency.counters
    assert (counters.prefetches, counters.prefetches_used, counters.prefetches_wasted) == (2, 1, 1)
    assert residency.prefetch(0, [0]) == 0, "it is in memory"


def test_what_is_prefetched_is_read_after_what_is_demanded(make, disk, records):
    residency = make(6)
    disk.stop()
    with residency.acquire(0, [0]) as leases:
        disk.wait_for_reads(1)
        residency.prefetch(1, [1])
        with residency.acquire(0, [5]) as more:
            assert (1, 1) not in residency._entries, "it has no slot yet"
            disk.go()
            list(leases)
            list(more)
    settle(residency)
    first, second, third = disk.positions
    assert [first, second, third] == [records[key].ranges[0].begin for key in [(0, 0), (0, 5), (1, 1)]]


def test_a_prefetch_that_has_not_begun_is_dropped_when_its_layer_is_over_or_said_anew(make, disk):
    residency = make(6)
    disk.stop()
    with residency.acquire(0, [0]) as leases:
        disk.wait_for_reads(1)
        residency.prefetch(1, [1, 2])
        residency.prefetch(1, [2, 3])
        residency.prefetch(2, [4])
        assert sorted(residency._queued) == [(1, 2), (1, 3), (2, 4)]
        with residency.acquire(1, [3]) as more:
            assert sorted(residency._queued) == [(1, 2), (2, 4)], "what is demanded is no prefetch"
            with residency.acquire(2, [0]) as last:
                assert sorted(residency._queued) == [(2, 4)]
                disk.go()
                for each in (leases, more, last):
                    list(each)
    settle(residency)
    assert resident(residency) == [(0, 0), (1, 3), (2, 0), (2, 4)]
    assert residency.counters.prefetches == 1


def test_a_prefetch_under_way_is_demanded(make, disk):
    residency = make(6, block_bytes=ALIGNMENT)
    disk.stop()
    residency.prefetch(1, [1, 2])
    disk.wait_for_reads(1)
    with residency.acquire(1, [1]) as leases:
        assert leases.hits == ()
        assert not residency._entries[1, 1].read._speculative
        disk.go()
        assert leases[1].expert == 1
    counters = residency.counters
    assert (counters.misses, counters.prefetches_used) == (1, 1)
    check(residency)


def test_a_prefetch_gets_no_slot_once_it_was_taken_back_or_a_layer_waits_for_one(make, disk):
    # A lane asks for the slot of a prefetch without holding anything: much may have happened since it took the read.
    residency = make(6)
    disk.stop()
    with residency.acquire(0, [0]) as leases:
        disk.wait_for_reads(1)
        residency.prefetch(1, [1, 2])
        demanded, waiting = residency._queued.values()
        with residency.acquire(1, [1]) as more:
            assert residency._place(demanded) is None
            residency._is_starved = True
            assert residency._place(waiting) is None
            residency._is_starved = False
            check(residency, [leases, more])
            disk.go()
            list(more)
    settle(residency)
    assert resident(residency) == [(0, 0), (1, 1)]


def test_a_failed_prefetch_is_nobodys_error_and_one_that_is_demanded_is(make, disk):
    residency = make(3)
    disk.fail()
    residency.prefetch(1, [1])
    settle(residency)
    assert residency.counters.failures == 1
    disk.heal()
    ask(residency, 1, 1)
    disk.stop()
    residency.prefetch(2, [2])
    disk.wait_for_reads(1)
    with residency.acquire(2, [2]) as leases:
        disk.fail()
        disk.go()
        with pytest.raises(ReadError):
            leases[2]
    disk.heal()
    check(residency)
    ask(residency, 2, 2)


def test_a_prefetch_makes_nothing_go_that_is_needed(make):
    residency = make(4)
    ask(residency, 0, 0)
    with residency.acquire(1, [1]):  # pinned
        residency.prefetch(2, [2])  # still to come
        settle(residency)
        ask(residency, 1, 3)  # of the layer under way
        residency.prefetch(2, [2, 4, 5])
        assert resident(residency) == [(1, 1), (1, 3), (2, 2), (2, 4)], "the first layer's went, and only that"
        check_counters = residency.counters
    assert (check_counters.prefetches, check_counters.evictions) == (2, 1)
    check(residency)


def test_what_is_demanded_takes_other_places_before_those_of_what_was_prefetched(make):
    residency = make(3)
    ask(residency, 0, 0, 1)
    residency.prefetch(1, [5])  # which the policy has never heard of
    settle(residency)
    ask(residency, 0, 2)
    assert resident(residency) == [(0, 1), (0, 2), (1, 5)]
    ask(residency, 1, 5)
    assert residency.counters.prefetches_used == 1


def test_what_is_demanded_may_take_the_place_of_what_was_prefetched(make):
    residency = make(2)
    residency.prefetch(1, [0, 1])
    settle(residency)
    ask(residency, 0, 0, 1)
    assert resident(residency) == [(0, 0), (0, 1)]
    assert residency.counters.prefetches_wasted == 2
    check(residency)


def test_a_layer_waits_where_all_slots_are_being_prefetched_into(make, disk):
    residency = make(2, lanes=2)
    disk.stop()
    residency.prefetch(1, [0, 1, 2])
    disk.wait_for_reads(2)
    threading.Timer(0.05, disk.go).start()
    ask(residency, 0, 3, 4)
    assert resident(residency)[:2] == [(0, 3), (0, 4)]
    check(residency)


def test_closing_fails_what_is_waited_for_and_gives_the_memory_back(make, disk):
    residency = make(4)
    ask(residency, 0, 0)
    memory = weakref.ref(residency._arena._map)
    disk.stop()
    leases = residency.acquire(0, [0, 1, 2])
    residency.prefetch(1, [0])
    disk.wait_for_reads(1)
    errors = []

    def wait():
        try:
            leases[2]
        except ReadError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    closing = threading.Thread(target=residency.close)
    closing.start()
    waiting.join(20)
    assert len(errors) == 1
    assert memory() is not None, "a lane still writes to it"
    disk.go()
    closing.join(20)
    assert not closing.is_alive()
    assert not any(lane.is_alive() for lane in residency._reader._lanes)
    gc.collect()
    assert memory() is None
    for call in (lambda: residency.acquire(0, [0]), lambda: residency.prefetch(0, [0]), lambda: leases[0]):
        with pytest.raises(ReadError, match="closed"):
            call()
    leases.release()
    residency.close()


def test_what_does_not_fit_or_is_not_there_is_refused_at_the_start(records, tmp_path):
    with Arena(2, ALIGNMENT) as arena, Reader(1) as reader:
        with pytest.raises(InputError, match=r"slots have 4,096 bytes, and an expert needs 16,384 of them"):
            Residency(arena, reader, records)
        with pytest.raises(InputError, match="no records"):
            Residency(arena, reader, {})
        missing = {(0, 0): Record(pieces=(Piece(file=tmp_path / "none.bin", begin=0, num_bytes=1),))}
        with pytest.raises(CorruptCheckpoint, match="is not there"):
            Residency(arena, reader, missing)
    with Arena(2, 2**20) as arena, Reader(1) as reader, pytest.raises(UnknownName, match="policy 'lruu'"):
        Residency(arena, reader, records, "lruu")


def test_an_unknown_expert_is_refused(make):
    residency = make(2)
    with pytest.raises(InputError, match="layer 1 has no expert 6"):
        residency.acquire(1, [0, 6])
    with pytest.raises(InputError, match="layer 3 has no expert 0"):
        residency.prefetch(3, [0])
    check(residency)
    assert residency.counters.misses == 0


def test_nothing_asked_for_is_nothing(make):
    residency = make(2)
    with residency.acquire(0, []) as leases:
        assert list(leases) == []
        assert leases.experts == ()


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_random_steps_on_a_disk_that_fails(make, disk, records, seed):
    draw = random.Random(seed)
    slots = draw.randint(3, 9)
    policy = draw.choice(["follow", "lru", "lfu", "decay", "lcu", "edgemoe"])
    residency = make(slots, policy, lanes=2, block_bytes=ALIGNMENT)
    expected = {key: bytes_of(record) for key, record in records.items()}
    chance = random.Random(seed + 100)
    rate = 0.0

    def fault(position, num_bytes):
        if chance.random() >= rate:
            return None
        return chance.choice([-5, -5, -4, ALIGNMENT])  # EIO, EINTR, short reads

    disk.fault = fault

    def look_at_all():
        with residency._changed:  # no slot changes hands, and lanes write to none that is ready
            for key, entry in residency._entries.items():
                if entry.is_ready:
                    assert pieces_in(residency._arena.memory(entry.slot), records[key]) == expected[key]

    held, layer, failures, asked = [], 0, 0, 0
    for number in range(1000):
        rate = 0.3 if draw.random() < 0.3 else rate * draw.choice([0, 1])
        action = draw.random()
        if action < 0.45:
            layer = (layer + draw.choice([0, 1, 1, 1])) % LAYERS
            experts = draw.sample(range(EXPERTS), draw.randint(1, 4))
            try:
                held.append(residency.acquire(layer, experts))
                asked += len(experts)
            except NotEnoughMemory:
                pinned = {entry.key for leases in held for entry in leases._entries.values() if entry.error is None}
                assert len(pinned | {(layer, expert) for expert in experts}) > slots
        elif action < 0.75 and held:
            leases = held.pop(draw.randrange(len(held)))
            with leases:
                seen = set()
                while len(seen) < len(leases):
                    try:
                        for lease in leases:
                            pieces = [bytes(lease.piece(number).numpy()) for number in range(3)]
                            assert pieces == expected[leases.layer, lease.expert]
                            seen.add(lease.expert)
                    except ReadError:
                        failures += 1
                        break
        elif action < 0.85 and held:
            held.pop(draw.randrange(len(held))).release()
        else:
            residency.prefetch(draw.randrange(LAYERS), draw.sample(range(EXPERTS), draw.randint(0, 3)))
        check(residency, held)
        if number % 25 == 0:
            look_at_all()
    rate = 0.0
    for leases in held:
        leases.release()
    settle(residency)
    check(residency)
    look_at_all()
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            ask(residency, layer, expert)
    counters = residency.counters
    assert counters.hits + counters.misses == asked + LAYERS * EXPERTS
    assert counters.prefetches_used + counters.prefetches_wasted <= counters.prefetches
    assert counters.failures > 0
    assert failures > 0
    assert counters.evictions > 100
    assert counters.prefetches_used > 0
    residency.close()
    with pytest.raises(ReadError):
        residency.acquire(0, [0])
