import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from coterie.evaluate import speed
from coterie.evaluate.speed import measure_speed, memory_bytes, memory_in_use, own_memory, peak_memory
from coterie.model.arch.load import load_model


class Clock:
    """Time that passes only when a stub model says so."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def model(self, name, seconds):
        times = iter(seconds)

        def forward(input_ids, use_cache):
            self.calls.append(name)
            self.now += next(times)
            return SimpleNamespace(logits=torch.zeros(1))

        forward.device = torch.device("cpu")
        return forward


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    return clock


IDS = torch.zeros(2, 6, dtype=torch.int64)


def test_speed_is_the_median_and_the_ratio_is_paired(clock):
    # The first pass of each is untimed. The machine slows down in round 3 for both, which the ratio does not see.
    model = clock.model("model", [99, 1, 2, 20])
    base = clock.model("base", [99, 2, 4, 40])
    found = measure_speed(model, IDS, base=base, rounds=3)
    assert found.tokens_per_second == pytest.approx(12 / 2)
    assert found.ratio == pytest.approx(2.0)
    assert found.rounds == 3


def test_model_and_base_alternate_and_swap_places(clock):
    measure_speed(clock.model("model", [1] * 4), IDS, base=clock.model("base", [1] * 4), rounds=3)
    assert clock.calls == ["model", "base", "model", "base", "base", "model", "model", "base"]


def test_without_a_base_there_is_no_ratio(clock):
    found = measure_speed(clock.model("model", [5, 3, 3, 3]), IDS, rounds=3)
    assert found.ratio is None
    assert found.tokens_per_second == pytest.approx(4.0)


def test_a_slow_model_is_measured_three_times_only(clock):
    found = measure_speed(clock.model("model", [50] * 26), IDS, seconds=20)
    assert found.rounds == 3


def test_memory_counts_parameters_and_buffers_and_ties_once():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("extra", torch.zeros(5, dtype=torch.float64))
    assert memory_bytes(model) == 4 * (12 + 3) + 8 * 5


def test_own_memory_changes_no_value_and_keeps_ties():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4, bias=False))
    shared = torch.randn(20)
    model[0].weight.data = shared[:12].view(3, 4)
    model[1].weight.data = shared[:12].view(3, 4)
    model.register_buffer("extra", shared[12:])
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    own_memory(model)
    after = [*model.parameters(), *model.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
    assert memory_bytes(model) == 4 * (12 + 3 + 8)
    assert all(tensor.untyped_storage().data_ptr() != shared.untyped_storage().data_ptr() for tensor in after)


def test_own_memory_changes_no_logit(base_path):
    model = load_model(base_path)
    ids_BS = torch.arange(12).view(2, 6)
    before = speed.logits_of(model, ids_BS)
    own_memory(model)
    assert torch.equal(speed.logits_of(model, ids_BS), before)


@pytest.mark.long
@pytest.mark.parametrize("kernel", [True, False])
def test_peak_memory_sees_what_is_gone_again(kernel, monkeypatch, tmp_path):
    if not kernel:
        monkeypatch.setattr(speed, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    device = torch.device("cpu")
    before = memory_in_use(device)
    kept = torch.ones(2**22)  # 16 MiB that stay
    with peak_memory(device, above=before) as peak:
        gone = torch.ones(2**24)  # 64 MiB that go
        time.sleep(0.1)
        del gone
    assert peak.num_bytes == pytest.approx(80 * 2**20, rel=0.2)
    with peak_memory(device, above=before) as later:
        time.sleep(0.02)
    assert later.num_bytes < 40 * 2**20
    assert kept[0] == 1


def test_a_failure_in_the_block_comes_through(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with pytest.raises(RuntimeError, match="inside"), peak_memory(torch.device("cpu"), above=0):
        raise RuntimeError("inside")


def test_on_cuda_the_peak_is_what_the_allocator_says(monkeypatch):
    said = []
    for name, answer in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 1000)):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, answer=answer: said.append(name) or answer)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: said.append("max_memory_allocated") or 1700)
    device = torch.device("cuda")
    before = memory_in_use(device)
    with peak_memory(device, above=before) as peak:
        said.append("block")
    assert peak.num_bytes == 700
    assert said[-4:] == ["reset_peak_memory_stats", "block", "synchronize", "max_memory_allocated"]
