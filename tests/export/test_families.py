"""Every family that is known, in a real llama.cpp: it predicts what transformers predicts from the same weights."""

import pytest
import torch

from coterie import export
from coterie.errors import InputError
from coterie.testing import tiny_checkpoint
from export_cases import CASES, LATENT_YARN, LINEAR, RIGHT, YARN
from llama_runtime import llama, numbers, predicted, stock_predicted

#: Tokens of the test: more than a sliding window of the tiny models holds.
LENGTH = 100


def compare(checkpoint, file, *, within, **options):
    export(checkpoint, file, **options)
    ids = numbers(LENGTH)
    with llama(file) as server:
        found = predicted(server, ids, 272)
    expected = stock_predicted(checkpoint, ids)
    assert expected.max() - expected.min() > 4  # a prediction, and not of anything
    assert (found - expected).abs().max() < within


def test_the_file_predicts_what_the_checkpoint_predicts(tiny, tmp_path):
    compare(tiny("qwen3_moe"), tmp_path / "model.gguf", type="f32", within=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_known_family_is_predicted_alike(family, changes, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", family, **changes)
    compare(checkpoint, tmp_path / "model.gguf", type="f32", within=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_weights_in_sixteen_bits_are_predicted_alike(family, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16, **RIGHT.get(family, {}))
    # llama.cpp rounds what it multiplies such weights with, too.
    compare(checkpoint, tmp_path / "model.gguf", within=0.2)


@pytest.mark.long
def test_the_bundled_model_is_predicted_alike(bundled, tmp_path):
    file = tmp_path / "model.gguf"
    export(bundled / "glm4_moe", file, type="f32")
    ids = numbers(200, below=8192)
    with llama(file) as server:
        found = predicted(server, ids, 8192)
    expected = stock_predicted(bundled / "glm4_moe", ids)
    assert (found - expected).abs().max() < 1e-3


#: What llama.cpp computes otherwise, and the words that say so.
REFUSED = [
    ("olmoe", {"num_key_value_heads": 2}, "norm_topk_prob is True, and llama.cpp's olmoe never divides"),
    ("olmoe", {"norm_topk_prob": False}, "1 heads of keys for 2"),
    ("olmoe", RIGHT["olmoe"] | {"tie_word_embeddings": True}, "its head is the embedding"),
    ("olmoe", RIGHT["olmoe"] | {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("qwen2_moe", {}, "norm_topk_prob is True, and llama.cpp's qwen2moe never divides"),
    ("qwen3_moe", {"norm_topk_prob": False}, "llama.cpp's qwen3moe always divides"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "some of its layers have no experts"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias is True"),
    ("qwen3_moe", {"hidden_act": "gelu"}, "the activation 'gelu'"),
    ("qwen3_moe", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ("qwen3_moe", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "set mscale or attention_factor"),
    ("mixtral", {}, "reaches back 64 tokens"),
    ("deepseek_v2", {"norm_topk_prob": False}, "chooses 1 of 2 groups of experts by the best score"),
    ("deepseek_v2", {"topk_method": "greedy"}, "norm_topk_prob is True"),
    ("deepseek_v2", RIGHT["deepseek_v2"] | {"q_lora_rank": None}, "its q_lora_rank is None and it has 3 layers"),
    ("deepseek_v3", {"rope_parameters": LINEAR}, "'linear', which was never compared"),
    ("deepseek_v3", {"rope_parameters": LATENT_YARN | {"mscale": 0.5}}, "its mscale is 0.5 and its mscale_all_dim 1.0"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
    ("gpt_oss", {"layer_types": ["full_attention", "full_attention"]}, "do not slide and attend to all in turn"),
    ("jamba", {}, "is a jamba, and whether llama.cpp computes that rightly is not known; known are deepseek_v2"),
]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED, ids=[f"{f}-{w[:24]}" for f, _, w in REFUSED])
def test_what_llama_computes_otherwise_is_refused_before_anything_is_written(family, changes, words, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", family, **changes)
    with pytest.raises(InputError) as caught:
        export(checkpoint, tmp_path / "model.gguf")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_the_bundled_model_that_llama_computes_otherwise_is_refused(bundled, tmp_path):
    with pytest.raises(InputError, match="norm_topk_prob is True"):
        export(bundled / "model", tmp_path / "model.gguf")
