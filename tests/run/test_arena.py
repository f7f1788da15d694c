"""Memory for experts: slots, and a budget that is paid at the start."""

import gc
import logging
import mmap
import subprocess
import sys
import weakref

import pytest

from coterie.errors import InputError
from coterie.run.arena import SLOT_ALIGNMENT, Arena

MIB = 2**20


def test_slots_are_aligned_apart_and_seen_without_a_copy():
    with Arena(5, 10_000) as arena:
        assert arena.slot_bytes % SLOT_ALIGNMENT == 0
        assert 10_000 <= arena.slot_bytes < 10_000 + SLOT_ALIGNMENT
        assert arena.num_bytes == 5 * arena.slot_bytes
        for number in range(5):
            slot = arena.slot(number)
            assert slot.shape == (arena.slot_bytes,)
            assert slot.data_ptr() % mmap.PAGESIZE == 0
            assert not slot.any()
            arena.memory(number)[:] = bytes([number + 1]) * arena.slot_bytes
        for number in range(5):
            assert (arena.slot(number) == number + 1).all()
        assert len({arena.slot(number).data_ptr() for number in range(5)}) == 5
        del slot


@pytest.mark.parametrize(("num_slots", "slot_bytes"), [(0, 10), (10, 0), (-1, 10)])
def test_nothing_is_refused(num_slots, slot_bytes):
    with pytest.raises(InputError, match=f"{num_slots} slots of {slot_bytes} bytes"):
        Arena(num_slots, slot_bytes)


def test_memory_is_given_back_and_only_once(caplog):
    arena = Arena(2, 4096)
    mapped = weakref.ref(arena._map)
    with caplog.at_level(logging.DEBUG):
        arena.close()
        arena.close()
    assert mapped() is None
    assert not caplog.records


def test_a_tensor_that_is_still_used_stays_what_it_is(caplog):
    arena = Arena(2, 4096)
    arena.memory(1)[:3] = b"abc"
    slot = arena.slot(1)
    with caplog.at_level(logging.DEBUG):
        arena.close()
    gc.collect()
    assert bytes(slot[:3].tolist()) == b"abc"
    assert "8,192 bytes for experts are given back later" in caplog.text


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")
def test_it_counts_where_limits_count_it_and_is_paid_at_the_start():
    printed = run(f"""
import resource
from pathlib import Path
from coterie.errors import NotEnoughMemory
from coterie.run.arena import Arena

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

limit = status("VmData") + 200 * {MIB}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    Arena(4, 64 * {MIB})
except NotEnoughMemory as error:
    print(error)
before = status("RssAnon")
arena = Arena(2, 64 * {MIB})
print(status("RssAnon") - before)
""")
    refusal, paid = printed.splitlines()
    assert refusal.startswith("4 slots of 67,108,864 bytes for experts are 268,435,456 bytes, which the system refuses")
    assert 128 * MIB <= int(paid) < 132 * MIB
