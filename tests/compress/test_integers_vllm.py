"""Results in integers in a real vLLM: it predicts what transformers does with the weights that Coterie reads."""

import json
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.model.arch.load import load_model
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.testing import tiny_checkpoint
from vllm_runtime import needs_vllm, run_vllm

pytestmark = [pytest.mark.slow, needs_vllm]

#: Types of each layer's experts; linear modules have that of the first.
TYPES = {
    "four bits": ["INT4_G64"] * 4,
    "four bits by layer": ["INT4_G64", "INT4_G128", None, "INT4_G64"],
    "eight bits": ["INT8_G128"] * 4,
    "eight bits by layer": ["INT4_G64", "INT8_G64", None, "INT4_G128"],
}

#: Log-probabilities of tokens are off by at most the first, on average, and another model's by the second at least.
#:
#: Emulated, vLLM computes in float16: .002 to .0054 were measured, up to half of it since Coterie reads what is packed
#: as bfloat16 and vLLM multiplies it unrounded, and .035 from other models. With AMX it computes in bfloat16 (.010 to
#: .015 when emulated so) on inputs that are rounded to eight bits (.016 to .020 when that is done in transformers), so
#: .025 is expected; only the original, .12 away, is far enough then.
LIMITS = {"emulated": (0.012, 0.025), "vllm": (0.06, 0.1)}

amx = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="vLLM computes experts of four bits with AMX, which this CPU lacks"
)


class Made(NamedTuple):
    """The original and its results in integers, windows of text (N, T), and what transformers predicts for each."""

    folders: dict
    windows: list
    expected: dict


@pytest.fixture(scope="module")
def made(bundled, tmp_path_factory):
    model, folder = bundled / "qwen3_moe", tmp_path_factory.mktemp("vllm")
    tokenizer = load_tokenizer(model)
    texts = [(bundled / "text" / "test" / f"{name}.txt").read_text() for name in ("english_prose", "c", "german")]
    windows = [tokenizer(text[:2000])["input_ids"][:128] for text in texts]
    text = {"text": bundled / "text" / "calibration", "tokens": 512, "seq_len": 128}
    folders = {"original": model}
    for name, kinds in TYPES.items():
        decided = plan(model, type=kinds[0], recipe="nearest")
        types = dict(decided.types)
        for layer, kind in enumerate(kinds):
            for projection in ("gate", "up", "down"):
                types[f"model.layers.{layer}.mlp.experts.*.{projection}_proj.weight"] = kind
        types = {pattern: kind for pattern, kind in types.items() if kind is not None}
        folders[name] = compress(model, folder / name, plan=replace(decided, types=types), **text).out
    return Made(folders, windows, {name: predicted(each, windows) for name, each in folders.items()})


def predicted(folder, windows):
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(windows)).logits[:, :-1].double().log_softmax(-1)


def of_tokens(log_probs, windows):
    """Return those of the tokens that come, (N, T - 1)."""
    return log_probs.gather(2, torch.tensor(windows)[:, 1:, None])[..., 0]


@pytest.mark.parametrize("name", TYPES)
def test_vllm_predicts_what_transformers_does_with_the_same_weights(name, made, tmp_path):
    off = check_predictions(name, "emulated", made, tmp_path)
    if name == "eight bits":  # which are near to the original, .012 away
        assert off.pop("original") > 1.5 * off[name]
    assert sorted(off.values())[1] > LIMITS["emulated"][1]


@amx
@pytest.mark.parametrize("name", ["four bits", "four bits by layer"])
def test_so_do_the_kernels_of_vllm(name, made, tmp_path):
    off = check_predictions(name, "vllm", made, tmp_path)
    assert off["original"] > LIMITS["vllm"][1]


def check_predictions(name, experts, made, folder):
    """Compare what vLLM predicts for a result with what is expected of it; return how far off it is from all models."""
    found, printed = run_vllm(made.folders[name], made.windows, folder, experts)
    assert found is not None, printed[-4000:]
    said = of_tokens(found, made.windows)
    meant = {other: of_tokens(expected, made.windows) for other, expected in made.expected.items()}
    off = {other: float((said - each).abs().mean()) for other, each in meant.items()}
    near = LIMITS[experts][0]
    assert off[name] < near
    assert float((meant[name].mean() - said.mean()).exp()) == pytest.approx(1, abs=near / 2)  # of perplexities
    same = found.argmax(-1) == made.expected[name].argmax(-1)
    assert same.double().mean() > 1 - 2 * near
    return off


def test_eight_bits_are_for_gpus(made, tmp_path):
    """As docs/precision.md says: once this fails, it may say something better."""
    found, printed = run_vllm(made.folders["eight bits"], made.windows, tmp_path)
    assert found is None
    assert "Quant type (uint8b128) not supported by CPUWNA16" in printed


#: Other names on disk, shared experts and their gate, dense layers, sigmoids in routers; in widths that vLLM's kernels
#: for CPUs take. vLLM (0.32) never normalises what OLMoE's routers weigh their experts with, whatever config.json says.
FAMILIES = {
    "olmoe": {"intermediate_size": 64, "norm_topk_prob": False},
    "mixtral": {"intermediate_size": 64, "head_dim": 64, "sliding_window": None},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "norm_topk_prob": False},
    "glm4_moe": {"moe_intermediate_size": 64, "intermediate_size": 128},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_finds_the_matrices_of_other_families(family, text, tmp_path):
    model = tiny_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16, hidden_size=128, **FAMILIES[family])
    config = json.loads((model / "config.json").read_text())
    if family == "glm4_moe":  # as published models say; vLLM wants to be told
        (model / "config.json").write_text(json.dumps(config | {"head_dim": 64}))
    out = compress(model, tmp_path / "out", recipe="nearest", type="INT4", text=text, tokens=128, seq_len=32).out
    windows = torch.randint(1, config["vocab_size"], (4, 32)).tolist()
    found, printed = run_vllm(out, windows, tmp_path, "emulated")
    assert found is not None, printed[-4000:]
    said, *meant = (of_tokens(each, windows) for each in (found, predicted(out, windows), predicted(model, windows)))
    # Where a router of random weights takes the next best expert, a token is far off: the median is not.
    own, original = (float((said - each).abs().median()) for each in meant)
    assert own < 0.06 < 0.5 < original
