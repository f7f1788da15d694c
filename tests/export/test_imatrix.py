"""Importance matrices, against loops in float64 over hooks of the whole stock model, and against llama.cpp's own."""

import json
import os
import shutil
import subprocess

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

import coterie
import llama_imatrix
from coterie.cli.main import app
from coterie.errors import InputError, NotEnoughMemory, OutputExists, ReloadMismatch
from coterie.export import imatrix, run
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile.text import CalibrationText, TextSettings
from export_cases import FAMILIES, RIGHT, WIDE

#: Few enough that some experts see no token.
TEXT = {"tokens": 192, "seq_len": 32}


def read(file):
    """Return {name: (sums (N, C), counts (N))} of a file, as llama.cpp reads it, and its fields."""
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32"}
    sums = {name.removesuffix(".in_sum2"): tensor.data for name, tensor in tensors.items() if name.endswith("in_sum2")}
    counts = {name.removesuffix(".counts"): tensor.data for name, tensor in tensors.items() if name.endswith("counts")}
    assert sums.keys() == counts.keys()
    assert len(tensors) == 2 * len(sums)
    content = {name: (sums[name], counts[name].reshape(-1)) for name in sums}
    return content, {name: field.contents() for name, field in reader.fields.items()}


def token_rows(folder, text, *, tokens, seq_len, on="all"):
    """Return the sequences that are read, and which of their tokens count."""
    settings = TextSettings(source=text, tokens=tokens, seq_len=seq_len, on=on)
    drawn = CalibrationText(Checkpoint.open(folder), settings).draw()
    ids = torch.cat(list(drawn.sequences.values()))
    return ids, torch.ones_like(ids) if drawn.counts is None else torch.cat(list(drawn.counts.values()))


def received(folder, ids, names):
    """Return what modules of the stock model receive, (T, C) float64, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    seen = {name: [] for name in names}

    def hook(name):
        return lambda module, args: seen[name].append(tuple(arg.detach().clone() for arg in args))

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    return {name: [torch.cat([call[i].flatten(0, -2) for call in calls]) for i in range(len(calls[0]))]
            for name, calls in seen.items()}  # fmt: skip


def squares(input_TC):
    total = torch.zeros(input_TC.shape[-1], dtype=torch.float64)
    for input_C in input_TC:
        total += input_C**2
    return total


def close(found, expected):
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=1e-7)


def test_sums_are_those_of_a_loop_over_the_stock_model(tiny, text, tmp_path):
    folder = tiny("qwen3_moe")
    done = coterie.imatrix(folder, tmp_path / "imatrix.gguf", text=text, **TEXT)
    found, fields = read(tmp_path / "imatrix.gguf")
    ids, _ = token_rows(folder, text, **TEXT)
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["code", "prose"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (len(ids), 32)
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    names = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    layers = range(2)
    wanted = [f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in names.values()]
    seen = received(folder, ids, [*wanted, *(f"model.layers.{layer}.mlp.experts" for layer in layers)])
    unseen = 0
    for layer in layers:
        for name, module in names.items():
            sums, counts = found.pop(f"blk.{layer}.{name}.weight")
            close(sums[0], squares(seen[f"model.layers.{layer}.self_attn.{module}"][0]))
            assert counts.tolist() == [ids.numel()]
        hidden, index, _ = seen[f"model.layers.{layer}.mlp.experts"]
        stacks = {part: found.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up", "down")}
        for expert in range(8):
            chosen = hidden[(index == expert).any(-1)]
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up = (chosen @ weights[f"{prefix}.{part}_proj.weight"].T for part in ("gate", "up"))
            for part, (sums, counts) in stacks.items():
                close(sums[expert], squares(torch.nn.functional.silu(gate) * up if part == "down" else chosen))
                assert counts[expert] == len(chosen)
            unseen += len(chosen) == 0
    assert not found  # neither the router, nor embedding and head, which llama-imatrix leaves out too
    assert (done.unseen_experts, done.num_tokens, done.matrices) == (unseen, ids.numel(), 2 * 7)


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", *(pytest.param(f, marks=pytest.mark.long) for f in sorted(FAMILIES) if f != "deepseek_v3")],
)
def test_sums_are_those_of_llama_cpp_itself(family, tiny, text, tmp_path):
    folder = tiny(family, **RIGHT.get(family, {}))
    coterie.imatrix(folder, tmp_path / "imatrix.gguf", text=text, **TEXT)
    coterie.export(folder, tmp_path / "model.gguf", type="f32")
    theirs = llama_imatrix.received(tmp_path / "model.gguf", token_rows(folder, text, **TEXT)[0])
    ours, _ = read(tmp_path / "imatrix.gguf")
    # Routers it multiplies with too, and never rounds.
    assert {name for name in theirs if "ffn_gate_inp" not in name} == ours.keys()
    for name, (sums, counts) in ours.items():
        expected, expected_counts = theirs[name]
        np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5 * expected.max(), err_msg=name)
        # Stacks that are no experts have one number of tokens there as well; the helper counts by matrix.
        assert set(counts) == set(expected_counts), name


def test_only_tokens_of_answers_count(tiny, tmp_path):
    folder, places = tiny("qwen3_moe"), tmp_path / "text"
    places.mkdir()
    rows = [
        {"prompt": "What is it? " * 4, "completion": f"Some {word}, of course. " * 3} for word in ("tea", "sea") * 9
    ]
    (places / "asked.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    done = coterie.imatrix(folder, tmp_path / "imatrix.gguf", text=places, on="assistant", **TEXT)
    found, _ = read(tmp_path / "imatrix.gguf")
    ids, counts = token_rows(folder, places, on="assistant", **TEXT)
    name = "model.layers.1.self_attn.o_proj"
    [input_TC] = received(folder, ids, [name])[name]
    assert 0 < done.num_tokens == int(counts.sum()) < ids.numel()
    sums, number = found["blk.1.attn_output.weight"]
    close(sums[0], squares(input_TC[counts.flatten().bool()]))
    assert number.tolist() == [done.num_tokens]


def test_what_cannot_be_is_said_before_anything_is_measured(tiny, text, tmp_path, monkeypatch):
    file = tmp_path / "imatrix.gguf"
    with pytest.raises(InputError, match=r"is a jamba, and whether llama\.cpp computes that rightly is not known"):
        coterie.imatrix(tiny("jamba"), file, text=text, **TEXT)
    with pytest.raises(InputError, match=r"norm_topk_prob is True, and llama\.cpp's olmoe never divides"):
        coterie.imatrix(tiny("olmoe", num_key_value_heads=2), file, text=text, **TEXT)
    with pytest.raises(NotEnoughMemory, match=r"--max-memory allows 1\.00 MiB"):
        coterie.imatrix(tiny("qwen3_moe"), file, text=text, max_memory="1MiB", **TEXT)
    with pytest.raises(InputError, match="inside the text folder"):
        coterie.imatrix(tiny("qwen3_moe"), text / "imatrix.gguf", text=text, **TEXT)
    said = coterie.imatrix(tiny("qwen3_moe"), file, text=text, dry_run=True, **TEXT)
    assert (said.matrices, said.unseen_experts) == (14, None)
    assert not list(tmp_path.iterdir())
    file.write_bytes(b"mine")
    with pytest.raises(OutputExists):
        coterie.imatrix(tiny("qwen3_moe"), file, text=text, **TEXT)
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'coterie\[gguf\]'"):
        coterie.imatrix(tiny("qwen3_moe"), tmp_path / "other.gguf", text=text, **TEXT)


def test_a_run_that_fails_leaves_nothing_and_attention_as_it_was(tiny, text, tmp_path, monkeypatch):
    before = dict(ALL_ATTENTION_FUNCTIONS)

    def broken(path, outputs):
        raise ReloadMismatch("something else")

    monkeypatch.setattr(imatrix, "check_file", broken)
    with pytest.raises(ReloadMismatch):
        coterie.imatrix(tiny("deepseek_v3"), tmp_path / "imatrix.gguf", text=text, **TEXT)
    assert not list(tmp_path.iterdir())
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_the_command_tells_what_was_written_and_which_experts_no_token_chose(tiny, text, tmp_path):
    words = ["imatrix", tiny("qwen3_moe", num_local_experts=32), tmp_path / "i.gguf", "--text", text, "--tokens", 32]
    words += ["--seq-len", 16]
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--json")])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    found, _ = read(tmp_path / "i.gguf")
    zeros = sum(int((counts == 0).sum()) for name, (_, counts) in found.items() if "ffn_down" in name)
    assert said["unseen_experts"] == zeros > 0
    for name, (sums, counts) in found.items():
        assert not sums[counts == 0].any(), name
    assert said["num_bytes"] == sum(4 * (sums.size + counts.size) for sums, counts in found.values())


@pytest.mark.slow
def test_llama_quantize_takes_the_file(tiny, text, tmp_path):
    program = shutil.which(os.environ.get("LLAMA_QUANTIZE", "llama-quantize"))
    if program is None:
        pytest.skip("no llama-quantize on the path, and none named by LLAMA_QUANTIZE")
    folder = tiny("qwen3_moe", **WIDE)
    coterie.export(folder, tmp_path / "model.gguf", type="f32")
    coterie.imatrix(folder, tmp_path / "imatrix.gguf", text=text, **TEXT)
    line = [program, "--imatrix", "imatrix.gguf", "model.gguf", "small.gguf", "IQ2_XS", "1"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "loaded 14 importance matrix entries" in done.stdout + done.stderr
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    assert types["blk.0.ffn_up_exps.weight"] == "IQ2_XS"  # refused without an importance matrix
