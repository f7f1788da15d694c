"""The benchmarks run, what they make is what they say, and their checks see what they are for."""

import dataclasses
import hashlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture(scope="module")
def make_large(importable):
    return importlib.import_module("make_large")


@pytest.fixture(scope="module")
def memory(importable):
    return importlib.import_module("memory")


@pytest.fixture(scope="module")
def shape(make_large):
    return make_large.Shape(
        hidden_size=64, num_experts=16, top_k=4, expert_width=24, num_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=512,
    )  # fmt: skip


@pytest.fixture(scope="module")
def large(make_large, shape, tmp_path_factory):
    """A checkpoint of twelve small layers; its text is beside it."""
    out = tmp_path_factory.mktemp("large") / "model"
    make_large.make_large(out, layers=12, shape=shape)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_large_checkpoint_is_what_transformers_itself_would_save(large, make_large, shape, tmp_path):
    model, info = AutoModelForCausalLM.from_pretrained(large, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    found = {}
    for folder in (large, tmp_path / "saved"):
        found[folder] = {}
        for file in folder.glob("*.safetensors"):
            found[folder] |= load_file(file)
    ours, stock = found.values()
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in ours)
    assert sum(2 * tensor.numel() for tensor in ours.values()) == shape.num_bytes(12)
    assert len(list(large.glob("*.safetensors"))) == 12 + 1, "one file a layer, and one for the rest"
    assert len({tensor.float().sum().item() for name, tensor in ours.items() if "_proj" in name}) > 12 * 16 * 3, (
        "no two matrices are the same"
    )


def test_a_large_checkpoint_gives_finite_logits_and_varied_routing(large):
    model = AutoModelForCausalLM.from_pretrained(large, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(large)
    text = (large.parent / "model-text" / "prose.txt").read_text()
    ids = torch.tensor([tokenizer(text).input_ids[:512]])
    with torch.no_grad():
        found = model(input_ids=ids, output_router_logits=True)
    assert found.logits.isfinite().all()
    assert 0.5 < found.logits.std() < 5
    assert (found.logits.std(1) > 0.1).float().mean() > 0.99, "the logits depend on the token"
    for scores in found.router_logits:
        counts = scores.topk(4).indices.flatten().bincount(minlength=16)
        assert (counts > 0).sum() >= 12
        assert counts.max() < 0.95 * len(ids[0])
        assert 0.5 < scores.std() < 3


def test_the_size_of_a_large_checkpoint_is_what_was_asked_for(make_large):
    shape = make_large.Shape()
    layer = shape.num_bytes(1) - shape.num_bytes(0)
    assert 240e6 < layer < 280e6
    for gigabytes in (1, 4, 16):
        made = shape.num_bytes(shape.layers_in(gigabytes * 10**9))
        assert abs(made - gigabytes * 10**9) <= layer / 2
    with pytest.raises(ValueError, match="100 MiB is too little: a model of one layer has"):
        shape.layers_in(100 * 2**20)


def test_a_seed_always_gives_the_same_bytes_and_nothing_is_overwritten(large, make_large, shape, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        make_large.make_large(tmp_path / name, layers=12, shape=shape, seed=seed)
    assert digests(tmp_path / "a") == digests(large)
    differing = {name for name, digest in digests(tmp_path / "b").items() if digest != digests(large)[name]}
    assert differing == {file.name for file in large.glob("*.safetensors")}
    with pytest.raises(ValueError, match="exists"):
        make_large.make_large(tmp_path / "a", layers=1, shape=shape)


# The memory benchmark.


@pytest.mark.long
def test_a_measured_command_reads_the_model_once(memory, large, tmp_path):
    line = ["profile", str(large), str(tmp_path / "profile"), "--text", str(large.parent / "model-text")]
    took = memory.run_measured([*line, "--tokens", "512", "--seq-len", "64"], large, tmp_path)
    assert took["returncode"] == 0, took["message"]
    assert 100 * 2**20 < took["peak"] < 4 * 2**30
    assert took["seconds"] > 0
    if sys.platform == "linux":
        # A profile needs no output head; the rest it reads once.
        size = memory.weight_bytes(large)
        assert 0.8 * size < took["input_read"] <= 1.05 * size
        assert took["read"] >= took["input_read"]
        assert took["written"] >= (tmp_path / "profile" / "profile.json").stat().st_size


def test_a_command_that_fails_is_told(memory, large, tmp_path):
    took = memory.run_measured(["inspect", "nowhere/at/all"], large, tmp_path)
    assert took["returncode"] == 1
    assert "nowhere" in took["message"]


@pytest.fixture
def kept(memory):
    """Measurements that keep all promises."""
    common = {
        "seconds": 1.0, "forecast": 3 * 2**29, "written": 10, "stored": 10, "returncode": 0, "message": "",
        "result_bytes": 0, "peak": 2**30,
    }  # fmt: skip
    rows = []
    for size, num_bytes in (("4GB", 4 * 10**9), ("8GB", 8 * 10**9)):
        row = {"size": size, "model_bytes": num_bytes, "input_read": num_bytes, "read": 2 * num_bytes, **common}
        rows += [memory.Measured(command=command, **row) for command in ("profile", "evaluate")]
        made = {"written": num_bytes // 2, "result_bytes": num_bytes // 2}
        rows.append(memory.Measured(command="compress", **row | made))
    return rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak": 5 * 2**30, "forecast": 6 * 2**30}, "took 5.00 GiB of memory, more than 4.00 GiB"),
        ({"peak": 2**30 + 2**27}, "the peak of compress grows with the model: 1.00 GiB for 4GB, 1.12 GiB for 8GB"),
        (
            {"peak": 2**30 + 2**20, "forecast": 2 * 2**30},
            "announced 2.00 GiB, more than 1.6 times the 1.00",
        ),
        ({"forecast": 2**29}, "compress of 8GB took 1.00 GiB, but announced 512 MiB"),
        ({"forecast": None}, "compress of 8GB did not say how much memory"),
        ({"written": 5 * 10**9}, "wrote 4.66 GiB for a result of 3.73 GiB"),
        ({"input_read": 9 * 10**9}, "profile and compress of 8GB read the model 2.12 times"),
        ({"returncode": 1, "message": "error: no"}, "compress of 8GB failed with status 1: error: no"),
    ],
)
def test_every_broken_promise_is_seen(memory, kept, changes, message):
    assert memory.broken_promises(kept, 4 * 2**30) == []
    broken = memory.broken_promises([*kept[:-1], dataclasses.replace(kept[-1], **changes)], 4 * 2**30)
    assert message in "\n".join(broken)


def test_a_count_that_cannot_be_right_is_seen(memory, kept):
    rows = [dataclasses.replace(row, input_read=0) for row in kept]
    assert "the count cannot be right" in "\n".join(memory.broken_promises(rows, 4 * 2**30))


def test_what_the_system_does_not_tell_breaks_nothing(memory, kept):
    rows = [dataclasses.replace(row, input_read=None, read=None, written=None, stored=None) for row in kept]
    assert memory.broken_promises(rows, 4 * 2**30) == []
    assert memory.table(rows).count("| - | - | - |") == len(rows)


def test_the_table_has_a_row_for_each_measurement(memory, kept):
    lines = memory.table(kept).splitlines()
    assert len(lines) == 2 + len(kept)
    assert len({line.count("|") for line in lines}) == 1
    assert "| 4GB | 3.73 GiB | profile | 1.00 GiB | 1.50 GiB | 1.50 | 1.00 | 2.00 | 0.00 | 1 | 0.2 |" in lines


def test_the_peaks_of_a_compression_s_stages_are_shown(memory, kept):
    assert memory.stages_table(kept) == ""
    rows = [dataclasses.replace(kept[2], stages={"profile": 2**30, "train": 2**29})]
    assert memory.stages_table(rows).splitlines()[2:] == [
        "| 4GB | compress | profile | 1.00 GiB |", "| 4GB | compress | train | 512 MiB |"
    ]  # fmt: skip


def test_what_a_command_announces_is_found(memory, tmp_path):
    (tmp_path / "stdout").write_text("written to out\n")
    (tmp_path / "stderr").write_text("")
    assert memory.announced(tmp_path, tmp_path / "none") is None
    (tmp_path / "stderr").write_text("memory: at most 2.24 GiB (2.5 x 500 MiB (a layer) + 1.00 GiB)\n")
    assert memory.announced(tmp_path, tmp_path / "none") == int(2.24 * 2**30)
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "coterie-run.json").write_text(json.dumps({"forecast_bytes": 12345}, indent=2))
    assert memory.announced(tmp_path, tmp_path / "result") == 12345


@pytest.mark.slow
def test_the_memory_benchmark_runs(memory, tmp_path, monkeypatch, capsys):
    line = ["memory.py", "--sizes", "2", "4", "--commands", "profile", "compress", "--tokens", "512"]
    monkeypatch.setattr(sys, "argv", [*line, "--work", str(tmp_path), "--json", str(tmp_path / "all.json")])
    memory.main()
    assert "All promises are kept." in capsys.readouterr().out
    assert len(json.loads((tmp_path / "all.json").read_text())["rows"]) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["all.json"], "checkpoints are removed"


# The overhead benchmark.


@pytest.mark.long
def test_the_overhead_benchmark_runs(importable, large):
    overhead = importlib.import_module("overhead")
    task = overhead.Task(
        name="tiny", model=large, text=large.parent / "model-text", tokens=512, seq_len=64, device="cpu"
    )
    assert sum(ids.numel() for ids in task.batches()) == 512
    tables = overhead.measure([task], 1, ["reap"]).splitlines()
    [row] = [line for line in tables if line.startswith("| tiny |")]
    assert row.count("x (") == 2
    [names] = [line for line in tables if line.startswith("| model, recipe |")]
    [stages] = [line for line in tables if line.startswith("| tiny, reap |")]
    assert {"compress", "total"} <= {cell.strip() for cell in names.split("|")}
    cells = [float(cell) for cell in stages.split("|")[2:-1]]
    assert cells[-1] == pytest.approx(sum(cells[:-1]), abs=0.05)


def test_ratios_are_of_neighbours_in_time(importable):
    overhead = importlib.import_module("overhead")
    task = overhead.Task(name="x", model=Path(), text=Path(), tokens=1, seq_len=1, device="cpu")
    times = {"text": [1.0, 1.0, 3.0], "load": [1.0, 1.0, 1.0], "forward": [2.0, 4.0, 8.0], "profile": [4.0, 9.0, 9.0]}
    row = overhead.overhead_row(task, times)
    assert row[:4] == ("x", "1.00 s (1.00 to 3.00)", "1.00 s (1.00 to 1.00)", "4.00 s (2.00 to 8.00)")
    assert row[5:] == ("1.00x (0.75 to 1.50)", "1.50x (0.75 to 2.00)")
