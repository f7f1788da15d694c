"""A budget for memory: what a run takes beside weights is put aside, said, and refused where nothing is left."""

import importlib
import json
import logging
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import coterie
from coterie.cli.main import app
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.dry_run import dry_run
from coterie.compress.memory_budget import memory_budget
from coterie.compress.prices import Prices
from coterie.compress.source import Source
from coterie.compress.ways import ways
from coterie.errors import ArchitectureMismatch, Infeasible, InputError
from coterie.model.arch.inspect import read_headers
from coterie.model.arch.run_memory import run_memory
from coterie.model.arch.run_settings import Running
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import bits_of
from coterie.testing import tiny_checkpoint

RUNNING = Running(context=1024)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen3_moe", moe_intermediate_size=64)


def beside(model, running=RUNNING):
    return run_memory(read_headers(Checkpoint.open(model)), running).num_bytes


def test_weights_get_what_the_run_leaves(model):
    found = memory_budget(model, "4MiB", RUNNING)
    assert found.weights == 4 * 2**20 - beside(model)
    assert found.growth == 0  # all of it is stored in 32 bits already
    assert found.content()["weights"] == found.weights
    said = found.sentence()
    assert "of 4.00 MiB in llama.cpp" in said
    assert "1,024 tokens of one sequence" in said
    assert "for buffers" in said


def test_what_is_no_matrix_grows_to_32_bits_in_a_file_for_llama_cpp(tmp_path):
    half = tiny_checkpoint(tmp_path / "m", "qwen3_moe", dtype=torch.bfloat16)
    small = [info for info in Checkpoint.open(half).tensors.values() if len(info.shape) < 2]
    routers = [info for name, info in Checkpoint.open(half).tensors.items() if name.endswith("mlp.gate.weight")]
    assert memory_budget(half, "4MiB", RUNNING).growth == 2 * sum(info.num_elements for info in small + routers)


def test_a_plan_a_run_and_what_it_would_be_have_the_same_budget(model, text_folder, tmp_path):
    total = beside(model) + 120_000
    made = plan(model, budget=total, running=RUNNING)
    assert made.predicted_bytes == plan(model, budget=120_000).predicted_bytes <= 120_000
    asked = {"budget": total, "running": RUNNING, "text": text_folder, "tokens": 128, "seq_len": 32, "effort": "fast"}
    assert dry_run(model, tmp_path / "dry", **asked).plan.predicted_bytes <= 120_000
    whole = compress(model, tmp_path / "out", **asked)
    assert whole.plan.predicted_bytes <= 120_000
    assert Checkpoint.open(whole.out).num_bytes == whole.plan.predicted_bytes
    listed = ways(model, total, running=RUNNING)
    assert (listed.limit, listed.memory.total) == (120_000, total)
    assert all(way.num_bytes <= 120_000 for way in listed.ways)


@pytest.mark.long
def test_what_llama_cpp_reserves_for_the_result_is_the_budget(text_folder, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp", reason="llama.cpp comes with xllamacpp, which is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    benchmark = importlib.import_module("run_memory")
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 4}
    model = tiny_checkpoint(tmp_path / "m", "qwen3_moe", dtype=torch.bfloat16, **wide)
    source = Source.open(model)
    # Nobody measured these: each bit less costs four times as much.
    damages = {
        weight.pattern: {kind: weight.num_elements * 4.0 ** -bits_of(kind) for kind in ("Q8_0", "Q5_0", "Q4_0")}
        for weight in source.weights
    }
    prices = Prices(
        damages=damages, model_digest=source.checkpoint.digest, text_digest="t", num_tokens=1, seq_len=1, seed=0,
        on="all",
    )  # fmt: skip
    running = Running(context=1024, batch=2, kv_type="q8_0")
    total = beside(model, running) + int(0.4 * Checkpoint.open(model).num_bytes)
    asked = {"budget": total, "running": running, "prices": prices, "text": text_folder, "tokens": 128, "seq_len": 32}
    made = compress(model, tmp_path / "out", effort="fast", **asked)
    coterie.export(made.out, tmp_path / "out.gguf")
    assert 0.95 * total <= sum(benchmark.reserved(tmp_path / "out.gguf", running).values()) <= 1.01 * total


def test_a_budget_that_the_run_takes_alone_is_refused_with_the_context_that_fits(model):
    least = ways(model, "1GiB").least_bytes
    longest = 3 * 1024
    total = beside(model, Running(context=longest)) + least
    with pytest.raises(Infeasible, match=rf"--context {longest} is the largest"):
        memory_budget(model, total, Running(context=64 * 1024))
    with pytest.raises(Infeasible, match="with any context"):
        memory_budget(model, "20KiB", RUNNING)


def test_a_longer_context_than_the_model_is_for_is_said(model, caplog):
    trained = json.loads((model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    with caplog.at_level(logging.WARNING):
        memory_budget(model, "1GiB", Running(context=trained))
        assert not caplog.records
        memory_budget(model, "1GiB", Running(context=trained + 1))
    assert f"is more than the {trained:,} that the model is for" in caplog.text


def test_what_nobody_can_tell_is_refused_before_anything_is_done(tiny, model, tmp_path):
    with pytest.raises(ArchitectureMismatch, match="what layer 0 keeps of a text is not known"):
        memory_budget(tiny("jamba"), "1GiB", RUNNING)
    with pytest.raises(InputError, match="give --budget"):
        plan(model, bits=6.0, running=RUNNING)
    with pytest.raises(InputError, match="reads no --target packed"):
        plan(model, budget="1GiB", running=RUNNING, target="packed")
    with pytest.raises(InputError, match="out of range"):
        plan(model, budget="1GiB", running=Running(context=0))


def run(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


def test_commands_say_all_three(model, tmp_path):
    total = beside(model, Running(context=1024, batch=2, kv_type="q8_0")) + 120_000
    options = ("--budget", total, "--budget-for", "memory", "--context", 1024, "--batch", 2, "--kv-type", "q8_0")
    for command in ("inspect", "plan"):
        said = run(command, model, *options)
        assert "for keys and values (q8_0, 1,024 tokens of each of 2 sequences)" in said
        content = json.loads(run(command, model, *options, "-q", "--json"))["ways"]
        assert (content["limit"], content["memory"]["weights"]) == (120_000, 120_000)
        assert content["memory"]["total"] == total
    shown = json.loads(run("inspect", model, *options, "-q", "--json"))
    assert shown["budget"]["limit"] == 120_000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--budget", "1GiB", "--context", 1024), "it is for --budget-for memory"),
        (("--budget-for", "memory", "--bits", 4), "which is not given"),
        (("--budget", "1GiB", "--budget-for", "memory", "--context", 0), "--context 0 is out of range"),
    ],
)
def test_half_of_it_is_refused(model, tmp_path, words, says):
    for command in (("plan", model), ("compress", model, tmp_path / "out")):
        done = CliRunner().invoke(app, [str(word) for word in (*command, *words)])
        assert done.exit_code != 0
        assert says in f"{done.output}{done.exception}"
    assert not (tmp_path / "out").exists()
