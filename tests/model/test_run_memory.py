"""The memory of a running model beside its weights, as transformers and llama.cpp have it, or a refusal."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import coterie
from coterie.errors import ArchitectureMismatch, InputError
from coterie.model.arch.cache import layer_caches
from coterie.model.arch.inspect import read_headers
from coterie.model.arch.run_memory import run_memory, trained_context
from coterie.model.arch.run_settings import Running
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.quiet import quiet
from coterie.testing import tiny_checkpoint, tiny_families
from some import first

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

#: Families of which nobody can tell, or not from headers: states, convolutions, indices, and whatever else is kept.
REFUSED = {
    "axk2", "bailing_hybrid", "deepseek_v32", "dots3_note_text", "glm5_next", "glm_moe_dsa", "granitemoehybrid",
    "hy_v4", "inkling2_text", "inkling_text", "jamba", "kimi_linear", "lfm2_moe", "minimax", "mistral_large4",
    "nemotron_h", "qwen4_exp_text", "zaya",
}  # fmt: skip


def headers_of(model):
    return read_headers(Checkpoint.open(model))


def kept_by_transformers(model, tokens):
    """Return the numbers that stock transformers keeps of a text in each layer, as keys and as values."""
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            cache = loaded(torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    return [(layer.keys.numel(), layer.values.numel()) for layer in cache.layers]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral", "gemma4_text"])
def test_keys_and_values_are_as_many_as_transformers_keeps(tiny, model_type):
    path, tokens = tiny(model_type), 3
    mine = [(tokens * each.key, tokens * each.value) for each in layer_caches(headers_of(path))]
    assert mine == kept_by_transformers(path, tokens)


@pytest.mark.families
@pytest.mark.parametrize("model_type", tiny_families())
def test_of_every_family_it_is_known_or_refused(tiny, model_type):
    headers = headers_of(tiny(model_type))
    if model_type in REFUSED:
        with pytest.raises(ArchitectureMismatch, match="what layer"):
            layer_caches(headers)
        return
    caches = layer_caches(headers)
    assert [each.layer for each in caches] == list(range(headers.num_layers))
    assert all(each.key or each.state for each in caches)


def test_a_window_is_not_kept_longer_than_it_is(tiny):
    headers = headers_of(tiny("gpt_oss"))
    windows = [each.window for each in layer_caches(headers)]
    config = json.loads((tiny("gpt_oss") / "config.json").read_text(encoding="utf-8"))
    assert [window is not None for window in windows] == [kind == "sliding_attention" for kind in config["layer_types"]]
    long, longer = (run_memory(headers, Running(context=context)).cache_bytes for context in (4096, 8192))
    of_token = sum(2 * (each.key + each.value) for each in layer_caches(headers) if each.window is None)
    assert longer - long == 4096 * of_token


def test_a_latent_vector_is_kept_once(tiny):
    config = json.loads((tiny("deepseek_v3") / "config.json").read_text(encoding="utf-8"))
    for each in layer_caches(headers_of(tiny("deepseek_v3"))):
        assert (each.key, each.value) == (config["kv_lora_rank"] + config["qk_rope_head_dim"], 0)


def test_states_of_linear_attention_do_not_grow_with_the_text(tiny):
    headers = headers_of(tiny("qwen3_next"))
    [state, full] = layer_caches(headers)
    config = json.loads((tiny("qwen3_next") / "config.json").read_text(encoding="utf-8"))
    heads, keys, values = (config[f"linear_{name}"] for name in ("num_value_heads", "key_head_dim", "value_head_dim"))
    mixed = 2 * config["linear_num_key_heads"] * keys + heads * values
    assert state.state == heads * keys * values + (config["linear_conv_kernel_dim"] - 1) * mixed
    assert (state.key, full.state) == (0, 0)
    one, two = (run_memory(headers, Running(context=1024, batch=batch)).cache_bytes for batch in (1, 2))
    assert two == 2 * one == 2 * (4 * state.state + 1024 * 2 * (full.key + full.value))


def test_sequences_and_types_of_numbers_scale_the_cache(tiny):
    headers = headers_of(tiny("qwen3_moe"))
    one = run_memory(headers, Running(context=1024)).cache_bytes
    assert one == 1024 * 2 * sum(each.key + each.value for each in layer_caches(headers))
    assert run_memory(headers, Running(context=1000)).cache_bytes == one  # cells come in steps of 256
    assert run_memory(headers, Running(context=1024, batch=3)).cache_bytes == 3 * one
    assert run_memory(headers, Running(context=1024, kv_type="q8_0")).cache_bytes == one * 34 // 64
    config = json.loads((tiny("qwen3_moe") / "config.json").read_text(encoding="utf-8"))
    assert trained_context(headers) == config["max_position_embeddings"]


@pytest.mark.parametrize("wrong", [{"context": 0}, {"batch": -1}, {"kv_type": "q1"}])
def test_what_nothing_can_run_is_refused(tiny, wrong):
    with pytest.raises(InputError, match=r"out of range|is none of"):
        run_memory(headers_of(tiny()), Running(**wrong))


#: Shapes that make different things the widest: experts, attention, the latent vector, a window.
SHAPES = {
    "experts": ("qwen3_moe", {"hidden_size": 256, "moe_intermediate_size": 256}),
    "attention": ("mixtral", {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 8, "sliding_window": None}),
    "latent": ("deepseek_v3", {}),
    "window": (
        "gpt_oss",
        {"hidden_size": 256, "intermediate_size": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", first(1, SHAPES))
def test_llama_cpp_reserves_what_is_foretold(name, tmp_path, monkeypatch):
    """The cache to the digits that are printed; buffers, of which more than shapes decides, within a tenth."""
    pytest.importorskip("xllamacpp", reason="llama.cpp comes with xllamacpp, which is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("run_memory")
    family, changes = SHAPES[name]
    model = tiny_checkpoint(tmp_path / "m", family, **changes)
    coterie.export(model, tmp_path / "m.gguf")
    for running in (Running(context=2048), Running(context=512, batch=4)):
        told = run_memory(headers_of(model), running)
        seen = benchmark.reserved(tmp_path / "m.gguf", running)
        assert told.cache_bytes == pytest.approx(seen["KV"], abs=0.02 * 2**20)  # it prints two digits of MiB, twice
        assert told.buffer_bytes == pytest.approx(seen["compute"] + seen["output"], rel=0.1)
