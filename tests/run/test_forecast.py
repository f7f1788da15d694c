"""Forecasts of runs: arithmetic against plain sums, probes on real files, and what is said where it does not fit."""

import itertools
import json
import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.errors import InputError
from coterie.model.arch.layers import MoELayer
from coterie.run import forecast as module
from coterie.run.engine import Runtime, Sampling
from coterie.run.forecast import Band, chunk_shares, first_token, forecast, hit_rate, token_parts, token_seconds
from coterie.run.prepare import prepare
from coterie.run.probe import ComputeSpeed, DiskSpeed, Stopwatch, count_operations, probe_compute, probe_disk
from coterie.run.rehearsal import Rehearsal, rehearse
from coterie.run.trace import RoutingTrace, record
from coterie.run.weight_file import WeightFile
from coterie.testing import tiny_checkpoint

FAST = {"disk_seconds": 0.1, "context": 128}
PROMPT = "def main():\n    print(1 + 2)\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("forecast") / "qwen3_moe", "qwen3_moe")


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    """Measure and replay what takes no time; what comes with the package is tested elsewhere."""
    monkeypatch.setattr("coterie.run.probe._PRODUCT_SECONDS", 0.01)
    traces = {str(seed): drawn_trace(seed=seed, tokens=100) for seed in range(3)}
    monkeypatch.setattr(module, "bundled_traces", lambda: traces)


def layer_of(top_k, num_experts=8):
    return MoELayer(
        index=0, block="b", experts="b.e", router=None, router_tensors=(), num_experts=num_experts, top_k=top_k,
        width=4, hidden_size=4,
    )  # fmt: skip


DISK = DiskSpeed(
    record_bytes=1000, seconds_of={1: 1.0, 2: 1.5, 4: 2.5}, num_reads=7, is_direct=True, file_system="ext4"
)
COMPUTE = ComputeSpeed(
    layer=0.4, layer_chunk=2.0, dense=0.2, dense_chunk=0.6, rest=0.1, expert_bytes=900, top_k=2, dense_bytes=500,
    load=1.0,
)  # fmt: skip


def test_reads_between_those_measured_are_on_a_line():
    assert [DISK.seconds(count) for count in (0, 0.5, 1, 3, 4, 8)] == [0, 0.5, 1.0, 2.0, 2.5, 5.0]
    assert (DISK.latency, DISK.bytes_per_second, DISK.in_memory) == (1.0, 1600.0, False)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_a_token_takes_what_all_cases_of_misses_take(rate):
    """Against a sum over every way in which each of two experts may be there or not."""
    parts = token_parts(DISK, COMPUTE, [layer_of(2), layer_of(2)], rate)
    read = at_once = 0.0
    for there in itertools.product([True, False], repeat=2):
        chance = math.prod(rate if each else 1 - rate for each in there)
        waiting = DISK.seconds(there.count(False))
        read += 2 * chance * waiting
        at_once += 2 * chance * min(waiting, 0.4 * there.count(True) / 2)
    assert parts == pytest.approx({"reading": read, "experts": 0.8, "rest": 0.3, "at once": at_once})
    band = token_seconds(parts)
    assert band.high == pytest.approx(read + 1.1)
    assert band.low == pytest.approx(max(read, 1.1))
    assert band.low <= band.expected <= band.high


def drawn_trace(seed=0, tokens=300, num_experts=16, top_k=2, layers=2):
    chosen = np.random.default_rng(seed).integers(0, num_experts // top_k, (tokens, layers, top_k))
    chosen = (chosen * top_k + np.arange(top_k)).astype(np.int16)
    return RoutingTrace(
        model="", name="noise", layers=tuple(range(layers)), num_experts=(num_experts,) * layers, chosen={"a": chosen}
    )


def test_what_chooses_at_random_hits_its_share():
    trace = drawn_trace()
    for share in (0.25, 0.5):
        assert hit_rate(trace, share, "lru", chunk=16) == pytest.approx(share, abs=0.06)
        assert hit_rate(trace, share, "belady", chunk=16) > share + 0.1
    assert hit_rate(trace, 1.0, "lru", chunk=16) == 1.0
    asked, missed = chunk_shares(trace, 0.25, 64, "decay")
    assert asked > 0.9  # 64 tokens of two experts each choose nearly all of 16
    assert 0.5 < missed <= asked


def test_what_a_pass_computes_is_counted(model):
    operations = count_operations(prepare(model, memory="64GiB", context=64).architecture.model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    size = config.get("head_dim") or width // config["num_attention_heads"]
    query, key = (config[f"num_{name}_heads"] * size for name in ("attention", "key_value"))
    expected = [
        (query, width),
        (key, width),
        (key, width),
        (width, query),
        (config["num_local_experts"], width),
    ] * layers
    assert operations.head == (config["vocab_size"], width)
    assert operations.products == Counter([*expected, operations.head])
    assert operations.num_small > 20 * layers


@pytest.mark.parametrize("family", ["qwen3_moe", *(
    pytest.param(family, marks=pytest.mark.long) for family in ("gpt_oss", "granitemoe", "deepseek_v3", "jamba")
)])  # fmt: skip
def test_probes_measure_what_a_run_does(family, tmp_path):
    prepared = prepare(tiny_checkpoint(tmp_path / family, family), memory="64GiB", context=64)
    disk = probe_disk(prepared.records, lanes=2, most=4, seconds=0.05)
    assert set(disk.seconds_of) <= {1, 2, 4}
    assert 1 in disk.seconds_of
    assert all(seconds > 0 for seconds in disk.seconds_of.values())
    assert disk.num_reads >= 3
    speed = probe_compute(prepared, chunk=32, room=2**22)
    assert min(speed.layer, speed.layer_chunk, speed.dense, speed.dense_chunk, speed.rest) > 0
    assert speed.load >= 1


def test_a_chunk_behind_the_first_waits_for_less():
    played = Rehearsal(token=1.0, num_tokens=3, hits=0.5, chunk=4.0, waiting=3.0)
    assert first_token(played, 1, 0.5) == Band(low=4.0, expected=4.0, high=4.0)
    band = first_token(played, 3, 0.5)
    assert (band.low, band.expected, band.high) == (4 + 2 * 1.0, 4 + 2 * 2.5, 12.0)


@pytest.mark.parametrize("family", ["qwen3_moe", *(
    pytest.param(family, marks=pytest.mark.long) for family in ("gpt_oss", "granitemoe", "deepseek_v3", "jamba")
)])  # fmt: skip
def test_a_rehearsal_takes_the_time_of_tokens_that_miss_so_many_experts(family, tmp_path, monkeypatch):
    """Misses are those that are asked for, and whoever waits for a slow disk is slow."""
    prepared = prepare(tiny_checkpoint(tmp_path / family, family), memory="64GiB", context=64, most_experts=6)
    reads = []
    read = WeightFile.read

    def slow(self, *arguments):
        reads.append(time.sleep(0.005))
        return read(self, *arguments)

    monkeypatch.setattr(WeightFile, "read", slow)
    how = {"chunk": 32, "asked": 1.0, "policy": "follow", "lanes": 1, "direct": True, "seconds": 0.2}
    few, many = (rehearse(prepared, rate=rate, **how) for rate in (0.9, 0.1))
    for each, rate in ((few, 0.9), (many, 0.1)):
        assert each.token > 0
        assert each.num_tokens >= 3
        assert each.hits == pytest.approx(rate, abs=0.25)
        assert 0.005 < each.waiting <= each.chunk
    count = sum(layer.num_experts for layer in prepared.architecture.layers)
    assert many.waiting > 0.5 * 0.005 * count, "all experts of all layers were read, or taken to be"


def test_a_rehearsal_of_many_slots_misses_as_many_as_of_few(model):
    """Also where there is room for more experts than a layer has, which must not all be of one layer."""
    for slots in (4, 8, 12):
        prepared = prepare(model, memory="64GiB", context=64, most_experts=slots)
        how = {"chunk": 32, "asked": 1.0, "policy": "follow", "lanes": 1, "direct": True, "seconds": 0.2}
        for rate in (0.3, 0.7):
            played = rehearse(prepared, rate=rate, **how)
            assert played.hits == pytest.approx(rate, abs=0.2), (slots, rate)


def test_a_stopwatch_counts_the_processor_and_not_what_is_waited_for():
    import time

    watch = Stopwatch()
    assert watch.seconds(lambda _: time.sleep(0.01), [0, 0]) < 0.005
    assert watch.load > 2


def test_a_model_that_does_not_fit_is_said_with_the_smallest_budget(model):
    said = forecast(model, memory="20MiB", **FAST)
    assert not said.fits
    assert said.smallest > 20 * 2**20
    assert said.own is None
    result = CliRunner().invoke(app, ["inspect", str(model), "--run", "--memory", "20MiB", "--context", "64"])
    assert result.exit_code == 0
    assert "does not fit into 20.0 MiB: " in result.stdout
    assert "is the smallest that works" in result.stdout


def test_hits_of_a_run_are_those_of_its_own_trace_replayed(model):
    """The prompt passes in chunks, then tokens one by one, as `generate` does; then the same is foretold."""
    with Runtime(model, memory="64GiB", context=128, most_experts=6) as runtime:
        trace = record(runtime, {"code": PROMPT * 2}, tokens=58)
    with Runtime(model, memory="64GiB", context=128, most_experts=6) as runtime, torch.no_grad():
        ids = runtime.ids(PROMPT * 2, template=False)
        half = ids.shape[1] // 2
        cache = runtime.model(ids[:, :half], use_cache=True).past_key_values
        before = runtime.residency.counters
        for token in range(half, ids.shape[1]):
            cache = runtime.model(ids[:, token : token + 1], use_cache=True, past_key_values=cache).past_key_values
        after = runtime.residency.counters
    assert trace.num_tokens == ids.shape[1]
    hits, misses = after.hits - before.hits, after.misses - before.misses
    said = forecast(model, memory="64GiB", most_experts=6, trace=trace, **FAST)
    assert said.hits.is_own
    assert said.hits.rate.expected == pytest.approx(hits / (hits + misses), abs=1e-9)
    assert said.hits.belady >= said.hits.rate.expected


def test_siblings_and_bands_are_in_order(model):
    said = forecast(model, memory="64GiB", most_experts=6, prompt_tokens=32, **FAST)
    names = [each.name for each in said.outlooks]
    assert names[:2] == ["as it is", "half of the experts"]
    for each in said.outlooks:
        band = each.tokens_per_second
        assert 0 < band.low <= band.expected <= band.high
    own, half = said.outlooks[:2]
    assert half.hit_rate >= own.hit_rate
    assert half.token_bytes <= own.token_bytes
    assert len(said.hits.traces) == 3
    assert said.hits.rate.low <= said.hits.rate.expected <= said.hits.rate.high
    assert isinstance(said.first_token, Band)
    json.dumps(said.to_json())


def test_what_cannot_be_is_said(model):
    with pytest.raises(InputError, match="a prompt of 128 tokens does not fit into a context of 128"):
        forecast(model, memory="1GiB", prompt_tokens=128, **FAST)
    with pytest.raises(InputError, match="the trace is of noise, which has 32 experts in 2 layers"):
        forecast(model, memory="64GiB", trace=drawn_trace(), prompt_tokens=8, **FAST)
    run = CliRunner().invoke
    for words, said in {
        ("--memory", "1GiB"): "it is for --run", ("--run", "--budget", "1GiB"): "it is not for --run",
    }.items():  # fmt: skip
        result = run(app, ["inspect", str(model), *words])
        assert result.exit_code == 2
        assert said in result.stderr


def test_a_trace_that_a_run_keeps_is_taken_by_inspect(model, tmp_path, monkeypatch):
    monkeypatch.setitem(forecast.__kwdefaults__, "disk_seconds", 0.1)
    file, run = tmp_path / "t.json", CliRunner().invoke
    limits = ["--memory", "64GiB", "--context", "128"]
    kept = run(app, ["run", str(model), PROMPT, "--max-tokens", "4", *limits, "--save-trace", str(file)])
    assert kept.exit_code == 0, kept.stderr
    told = run(app, ["inspect", str(model), "--run", "--trace", str(file), *limits, "--json"])
    assert told.exit_code == 0, told.stderr
    said = json.loads(told.stdout)
    assert said["hits"]["is_own"]
    assert said["fits"]
    told = run(app, ["inspect", str(model), "--run", "--trace", str(file), *limits])
    assert "its own routing" in told.stdout
    assert "first token" in told.stdout
    (tmp_path / "notes.json").write_text("{}", encoding="utf-8")
    for name, reason in {"t.txt": "a name that ends in .json", "notes.json": "exists and is no trace"}.items():
        refused = run(app, ["run", str(model), PROMPT, *limits, "--save-trace", str(tmp_path / name)])
        assert refused.exit_code != 0
        assert reason in refused.stderr


def test_the_prompt_of_a_greedy_run_is_the_same_with_ordinary_reads(model):
    texts = []
    for direct in (True, False):
        with Runtime(model, memory="64GiB", context=64, most_experts=3, direct=direct) as runtime:
            texts.append(runtime.generate(PROMPT, template=False, max_tokens=6, sampling=Sampling(temperature=0)).text)
    assert texts[0] == texts[1]
