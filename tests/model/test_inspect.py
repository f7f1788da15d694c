import json
import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.errors import ArchitectureMismatch, CorruptCheckpoint, Infeasible, InputError, NotACheckpoint, NotAMoE
from coterie.model.arch.inspect import PARTS, inspect
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tensors import DTYPE_BITS
from coterie.testing import tiny_families
from some import first


def header_only(folder, config, tensors):
    """Write a checkpoint whose header is right and whose bytes are a hole: any size in no space."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header, position = {}, 0
    for name, (dtype, *shape) in tensors.items():
        size = -(-math.prod(shape) * DTYPE_BITS[dtype] // 8)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + position)
    return folder


def attention(prefix, hidden, heads, kv_heads, head_dim, *, dtype="BF16", bias=False):
    widths = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
    tensors = {f"{prefix}.{name}.weight": (dtype, width, hidden) for name, width in widths.items()}
    tensors[f"{prefix}.o_proj.weight"] = (dtype, hidden, heads * head_dim)
    if bias:
        tensors |= {f"{prefix}.{name}.bias": (dtype, width) for name, width in (widths | {"o_proj": hidden}).items()}
    return tensors


def small(folder, extra=(), *, config=(), experts=4, width=6, hidden=10):
    """Write a header-only model of two layers with one tensor an expert, plus `extra`."""
    tensors = {"model.embed_tokens.weight": ("BF16", 50, hidden), "lm_head.weight": ("BF16", 50, hidden)}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = ("BF16", experts, hidden)
        for expert in range(experts):
            tensors[f"{block}.experts.{expert}.up_proj.weight"] = ("BF16", width, hidden)
            tensors[f"{block}.experts.{expert}.down_proj.weight"] = ("BF16", hidden, width)
    defaults = {
        "model_type": "made_up", "hidden_size": hidden, "num_hidden_layers": 2, "vocab_size": 50,
        "num_experts": experts, "num_experts_per_tok": 2,
    }  # fmt: skip
    return header_only(folder, defaults | dict(config), tensors | dict(extra))


#: Families of which every tensor has a well-known place: no towers, no mixing that has other names.
PLAIN = (
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "ernie4_5_moe",
    "glm4_moe",
    "granitemoe",
)

#: Weights of a MoE block that have a name outside of it on disk: a norm behind the experts.
OUTSIDE_ON_DISK = {"axk1": 32}


@pytest.mark.parametrize(
    "model_type", first(len(PLAIN), [*PLAIN, *(name for name in tiny_families() if name not in PLAIN)])
)
def test_agrees_with_the_model_that_transformers_builds(tiny, model_type):
    path = tiny(model_type)
    checkpoint = Checkpoint.open(path)
    truth = Architecture.of(checkpoint)
    text_config = truth.model.config.get_text_config()
    found = inspect(path)
    assert found.model_type == model_type
    assert found.expert_key == truth.expert_key
    assert found.layers == text_config.num_hidden_layers
    assert found.total.bytes == checkpoint.num_bytes
    # Tensors on disk are those of the model, in one layout or another.
    state = truth.model.state_dict(keep_vars=True)
    assert found.total.parameters == sum(
        tensor.numel() for tensor in {id(each): each for each in state.values()}.values()
    )
    assert len(found.moe_layers) == len(truth.layers)
    for mine, theirs in zip(found.moe_layers, truth.layers, strict=True):
        assert f".{mine.layer}" in theirs.block
        assert (mine.num_experts, mine.top_k) == (theirs.num_experts, theirs.top_k)
        assert (mine.width, mine.hidden_size) == (theirs.width, theirs.hidden_size)
        assert mine.router_rows == theirs.num_experts
        decoder_layer = re.match(rf".*?\.{mine.layer}(?=\.|$)", theirs.block)[0]
        scored = dict(theirs.router_tensors)
        inside = () if theirs.block == decoder_layer else (f"{theirs.block}.",)  # else the block is the whole layer
        sizes = {"router": 0, "experts": 0, "shared": 0}
        for name, tensor in truth.model.get_submodule(decoder_layer).state_dict(prefix=f"{decoder_layer}.").items():
            if name.startswith(f"{theirs.experts}."):
                sizes["experts"] += tensor.numel()
            elif name in scored or name.startswith(f"{theirs.router}."):
                sizes["router"] += tensor.numel()
            elif name.startswith(inside) or re.search(r"\.shared", name):
                sizes["shared"] += tensor.numel()
        sizes["shared"] -= OUTSIDE_ON_DISK.get(model_type, 0)
        assert {part: getattr(mine, part).parameters for part in sizes} == sizes
        # On disk a tensor may have another name, but as many of them know the experts.
        rows = sum(tensor.numel() // tensor.shape[scored[name]] for name, tensor in state.items() if name in scored)
        assert mine.row_bytes == 4 * rows
        assert set(mine.router_tensors) <= set(checkpoint.tensors)
    embeddings = truth.model.get_input_embeddings().weight.numel()
    assert found.parts["unused"].bytes == 0
    if model_type in PLAIN:
        assert found.parts["embeddings"].parameters == embeddings * (1 if found.tied_embeddings else 2)
        assert found.parts["other"].bytes == 0


def test_known_sizes_of_qwen3_30b_a3b(tmp_path):
    tensors = {"model.embed_tokens.weight": ("BF16", 151936, 2048), "lm_head.weight": ("BF16", 151936, 2048)}
    tensors["model.norm.weight"] = ("BF16", 2048)
    for layer in range(48):
        at = f"model.layers.{layer}"
        tensors |= attention(f"{at}.self_attn", 2048, 32, 4, 128)
        tensors |= {f"{at}.self_attn.{name}.weight": ("BF16", 128) for name in ("q_norm", "k_norm")}
        tensors |= {f"{at}.{name}.weight": ("BF16", 2048) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors[f"{at}.mlp.gate.weight"] = ("BF16", 128, 2048)
        for expert in range(128):
            tensors |= {
                f"{at}.mlp.experts.{expert}.{name}.weight": ("BF16", 768, 2048) for name in ("gate_proj", "up_proj")
            }
            tensors[f"{at}.mlp.experts.{expert}.down_proj.weight"] = ("BF16", 2048, 768)
    config = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
        "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4, "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }  # fmt: skip
    found = inspect(header_only(tmp_path / "model", config, tensors), budget="32GiB")
    # head_dim equals the number of experts here: norms of that length are no router.
    assert all(layer.router_tensors == (f"model.layers.{layer.layer}.mlp.gate.weight",) for layer in found.moe_layers)
    assert {(layer.num_experts, layer.top_k, layer.width, layer.hidden_size) for layer in found.moe_layers} == {
        (128, 8, 768, 2048)
    }
    assert found.total.parameters == 30_532_122_624  # as on the model's card: 30.5 B in total,
    assert found.active_parameters == 3_353_032_704  # 3.3 B activated,
    assert found.parts["embeddings"].parameters == 30_532_122_624 - 29_909_792_768  # and 29.9 B without embeddings
    assert found.total.bytes == found.estimates["bf16"] == 2 * found.total.parameters
    routed = found.parts["experts"].parameters
    assert routed == 48 * 128 * 3 * 768 * 2048
    assert found.estimates["int8"] == found.total.bytes - routed + routed // 128 * 4
    assert found.estimates["int4"] == found.total.bytes - routed * 3 // 2 + routed // 128 * 4
    assert found.file_bytes > found.total.bytes
    fit = found.budget
    assert fit is not None
    expert = found.moe_layers[0].experts.bytes // 128 + 2 * 2048
    assert fit.bytes == found.total.bytes - 48 * (128 - fit.experts) * expert <= 32 * 2**30 < fit.bytes + 48 * expert
    assert fit.keep == fit.experts / 128
    assert fit.feasible


@pytest.mark.parametrize("num_moe_layers", [2, pytest.param(58, marks=pytest.mark.slow)])  # 58: 92,000 tensors
def test_known_sizes_of_deepseek_v3_in_fp8_with_a_prediction_layer(tmp_path, num_moe_layers):
    num_layers = 3 + num_moe_layers

    def fp8(name, rows, columns):
        scale = ("F32", -(-rows // 128), -(-columns // 128))
        return {f"{name}.weight": ("F8_E4M3", rows, columns), f"{name}.weight_scale_inv": scale}

    def mlp(name, width):
        return (
            fp8(f"{name}.gate_proj", width, 7168)
            | fp8(f"{name}.up_proj", width, 7168)
            | fp8(f"{name}.down_proj", 7168, width)
        )

    vocabulary = ("BF16", 129280, 7168)
    tensors = {
        "model.embed_tokens.weight": vocabulary,
        "lm_head.weight": vocabulary,
        "model.norm.weight": ("BF16", 7168),
    }
    for layer in range(num_layers + 1):
        at = f"model.layers.{layer}"
        tensors |= fp8(f"{at}.self_attn.q_a_proj", 1536, 7168) | fp8(f"{at}.self_attn.q_b_proj", 24576, 1536)
        tensors |= fp8(f"{at}.self_attn.kv_a_proj_with_mqa", 576, 7168) | fp8(f"{at}.self_attn.kv_b_proj", 32768, 512)
        tensors |= fp8(f"{at}.self_attn.o_proj", 7168, 16384)
        norms = {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
        norms |= {"input_layernorm": 7168, "post_attention_layernorm": 7168}
        tensors |= {f"{at}.{name}.weight": ("BF16", width) for name, width in norms.items()}
        if layer < 3:
            tensors |= mlp(f"{at}.mlp", 18432)
            continue
        tensors[f"{at}.mlp.gate.weight"] = ("BF16", 256, 7168)
        tensors[f"{at}.mlp.gate.e_score_correction_bias"] = ("F32", 256)
        tensors |= mlp(f"{at}.mlp.shared_experts", 2048)
        for expert in range(256):
            tensors |= mlp(f"{at}.mlp.experts.{expert}", 2048)
    tensors |= {
        f"model.layers.{num_layers}.embed_tokens.weight": vocabulary,
        f"model.layers.{num_layers}.shared_head.head.weight": vocabulary,
    }
    tensors[f"model.layers.{num_layers}.eh_proj.weight"] = ("BF16", 7168, 14336)
    config = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": num_layers, "vocab_size": 129280,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1, "ep_size": 1,
        "topk_method": "noaux_tc", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    found = inspect(header_only(tmp_path / "model", config, tensors), budget=num_moe_layers * 5 * 10**9)
    assert [layer.layer for layer in found.moe_layers] == list(range(3, num_layers))
    assert found.layers == num_layers
    layer = found.moe_layers[0]
    assert (layer.num_experts, layer.top_k, layer.width, layer.hidden_size) == (256, 8, 2048, 7168)
    assert layer.router.parameters == 256 * 7168 + 256
    assert layer.shared.parameters == 3 * 2048 * 7168
    used = found.total.parameters - found.parts["unused"].parameters
    mixing = 1536 * 7168 + 24576 * 1536 + 576 * 7168 + 32768 * 512 + 7168 * 16384 + 1536 + 512 + 2 * 7168
    missing = 58 - num_moe_layers
    # 671 B in total on the model's card; scales are no parameters.
    assert used == 671_026_419_200 - missing * (257 * 3 * 2048 * 7168 + 256 * 7168 + 256 + mixing)
    # 37 B activated on the card; here with the input embedding of 0.9 B.
    active = found.active_parameters + missing * (9 * 3 * 2048 * 7168 + 256 * 7168 + 256 + mixing)
    assert round(active / 1e9, 1) == 37.6
    assert found.prediction == (f"model.layers.{num_layers}",)
    assert found.awkward == ()
    assert found.parts["unused"].parameters > 256 * layer.shared.parameters
    assert found.parts["dense"].parameters == 3 * 3 * 18432 * 7168
    assert layer.experts.bytes == 256 * 3 * (2048 * 7168 + 16 * 56 * 4)
    assert found.estimates["int4"] < found.total.bytes < found.estimates["bf16"]
    assert found.budget is not None
    assert found.budget.experts % 8 == 0  # the router has 8 groups of equal size


def test_known_sizes_of_gpt_oss_20b_in_mxfp4(tmp_path):
    tensors = {"model.embed_tokens.weight": ("BF16", 201088, 2880), "lm_head.weight": ("BF16", 201088, 2880)}
    tensors["model.norm.weight"] = ("BF16", 2880)
    for layer in range(24):
        at = f"model.layers.{layer}"
        tensors |= attention(f"{at}.self_attn", 2880, 64, 8, 64, bias=True)
        tensors[f"{at}.self_attn.sinks"] = ("BF16", 64)
        tensors |= {f"{at}.{name}.weight": ("BF16", 2880) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"{at}.mlp.router.weight": ("BF16", 32, 2880), f"{at}.mlp.router.bias": ("BF16", 32)}
        for name, rows in (("gate_up_proj", 5760), ("down_proj", 2880)):
            tensors[f"{at}.mlp.experts.{name}_blocks"] = ("U8", 32, rows, 90, 16)
            tensors[f"{at}.mlp.experts.{name}_scales"] = ("U8", 32, rows, 90)
            tensors[f"{at}.mlp.experts.{name}_bias"] = ("BF16", 32, rows)
    config = {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "vocab_size": 201088, "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    }  # fmt: skip
    found = inspect(header_only(tmp_path / "model", config, tensors))
    assert {(layer.num_experts, layer.top_k, layer.width, layer.hidden_size) for layer in found.moe_layers} == {
        (32, 4, 2880, 2880)
    }
    assert found.total.parameters == 20_914_757_184  # 20.9 B on the model's card
    # 3.6 B on the model's card, which leaves the input embedding out.
    assert round((found.active_parameters - 201088 * 2880) / 1e9, 2) == 3.61
    assert found.moe_layers[0].router_tensors == ("model.layers.0.mlp.router.weight", "model.layers.0.mlp.router.bias")
    assert all(layer.shared.bytes == 0 for layer in found.moe_layers)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_count_as_what_they_unpack_to(tmp_path, bits):
    tensors = {"model.layers.0.mlp.gate.weight": ("BF16", 4, 256)}
    for expert in range(4):
        for name, (rows, columns) in {"gate": (128, 256), "up": (128, 256), "down": (256, 128)}.items():
            at = f"model.layers.0.mlp.experts.{expert}.{name}_proj"
            tensors[f"{at}.weight_packed"] = ("I32", rows, columns * bits // 32)
            tensors[f"{at}.weight_scale"] = ("BF16", rows, columns // 32)
            tensors[f"{at}.weight_shape"] = ("I64", 2)
    groups = {"group_0": {"input_activations": {"num_bits": 16}, "weights": {"num_bits": bits, "group_size": 32}}}
    config = {
        "model_type": "made_up", "hidden_size": 256, "num_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 1,
        "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups},
    }  # fmt: skip
    [layer] = inspect(header_only(tmp_path / "model", config, tensors)).moe_layers
    assert layer.experts.parameters == 4 * 3 * 128 * 256
    assert (layer.width, layer.hidden_size) == (128, 256)


def test_shared_experts_in_a_list_are_not_routed(tmp_path):
    extra = {
        f"model.layers.{layer}.mlp.shared_experts.{expert}.up_proj.weight": ("BF16", 6, 10)
        for layer in range(2)
        for expert in range(4)  # as many as there are routed experts
    }
    found = inspect(small(tmp_path / "model", extra))
    assert [layer.shared.parameters for layer in found.moe_layers] == [4 * 60, 4 * 60]
    assert [layer.experts.parameters for layer in found.moe_layers] == [4 * 120, 4 * 120]


def test_convolutions_heads_and_norms_of_the_length_of_the_expert_axis_are_no_experts(tmp_path):
    extra = {
        "model.layers.0.linear_attn.conv1d.weight": ("BF16", 4, 1, 3),
        "model.layers.0.conv.weight": ("BF16", 4, 10, 3),
        "model.layers.1.self_attn.q_norm.weight": ("BF16", 4),
        "model.layers.1.self_attn.gate.weight": ("BF16", 4, 10),
        "model.layers.1.mlp.shared_expert.up_proj.weight": ("BF16", 4, 10),
        **{f"model.layers.1.self_attn.heads.{head}.weight": ("BF16", 2, 10) for head in range(4)},
        **{f"model.vision.blocks.{layer}.branch.{b}.weight": ("BF16", 6, 10) for layer in range(2) for b in range(4)},
    }
    found = inspect(small(tmp_path / "model", extra))
    assert [layer.router.parameters for layer in found.moe_layers] == [40, 40]
    assert [layer.experts.parameters for layer in found.moe_layers] == [480, 480]
    assert [layer.shared.parameters for layer in found.moe_layers] == [0, 40]
    assert found.parts["attention"].parameters == 12 + 120 + 40 + 80
    assert found.parts["other"].parameters == 2 * 4 * 60
    assert found.layers == 2


def test_a_balancing_bias_belongs_to_the_router_wherever_it_stands(tmp_path):
    extra = {
        "model.layers.0.mlp.experts.e_score_correction_bias": ("F32", 4),
        "model.layers.0.mlp.statics.bias": ("F32", 1, 4),
        "model.layers.1.moe.router.expert_bias": ("F32", 4),
    }
    first, second = inspect(small(tmp_path / "model", extra)).moe_layers
    assert first.router.parameters == 40 + 4 + 4
    assert second.router.parameters == 40 + 4
    assert (first.block, second.block) == ("model.layers.0.mlp", "model.layers.1.mlp")


def test_experts_without_that_name_beside_their_router(tmp_path):
    tensors = {}
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{block}.input_linear.weight"] = ("F32", 4, 12, 10)
        tensors[f"{block}.output_linear.weight"] = ("F32", 4, 10, 6)
        tensors[f"{block}.router.layer.weight"] = ("F32", 4, 10)
        tensors[f"model.layers.{layer}.shared_mlp.input_linear.weight"] = ("F32", 14, 10)
        tensors[f"model.layers.{layer}.mamba.conv1d.weight"] = ("F32", 4, 1, 3)
    config = {
        "model_type": "made_up",
        "hidden_size": 10,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    }
    for layer in inspect(header_only(tmp_path / "model", config, tensors)).moe_layers:
        assert layer.block == f"model.layers.{layer.layer}.block_sparse_moe"
        assert (layer.width, layer.hidden_size) == (6, 10)
        assert layer.experts.parameters == 4 * 180
        assert layer.router.parameters == 40
        assert layer.shared.parameters == 140


def test_a_router_beside_the_block_and_a_dense_part_beside_the_experts(tmp_path):
    tensors = {}
    for layer in range(2):
        at = f"model.language_model.layers.{layer}"
        tensors[f"{at}.experts.gate_up_proj"] = ("F32", 4, 12, 10)
        tensors[f"{at}.experts.down_proj"] = ("F32", 4, 10, 6)
        tensors |= {f"{at}.router.proj.weight": ("F32", 4, 10), f"{at}.router.per_expert_scale": ("F32", 4)}
        tensors |= {f"{at}.router.scale": ("F32", 10), f"{at}.mlp.up_proj.weight": ("F32", 14, 10)}
        tensors |= attention(f"{at}.self_attn", 10, 2, 1, 4, dtype="F32")
    text = {"hidden_size": 10, "num_experts": 4, "top_k_experts": 2, "num_hidden_layers": 2, "vocab_size": 50}
    vision = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"model_type": "made_up", "vision_config": vision, "text_config": text}
    found = inspect(header_only(tmp_path / "model", config, tensors))
    assert found.expert_key == ("text_config", "num_experts")
    for layer in found.moe_layers:
        assert layer.block == f"model.language_model.layers.{layer.layer}"
        assert (layer.top_k, layer.width, layer.hidden_size) == (2, 6, 10)
        assert layer.router.parameters == 40 + 4 + 10
        assert layer.row_bytes == 4 * (10 + 1), "the scale of the input belongs to no expert"
        assert layer.shared.parameters == 0
    assert found.parts["dense"].parameters == 2 * 140


def test_experts_of_a_narrower_input_than_the_router(tmp_path):
    extra = {}
    for layer in range(2):
        extra |= {f"model.layers.{layer}.mlp.down_to_latent.weight": ("BF16", 8, 10)}
        for expert in range(4):
            at = f"model.layers.{layer}.mlp.experts.{expert}"
            extra |= {f"{at}.up_proj.weight": ("BF16", 12, 8), f"{at}.down_proj.weight": ("BF16", 8, 12)}
    found = inspect(small(tmp_path / "model", extra, config={"moe_latent_size": 8}))
    assert {(layer.width, layer.hidden_size) for layer in found.moe_layers} == {(12, 8)}


@pytest.mark.parametrize(
    ("entries", "top_k"),
    [
        ({"num_experts_per_tok": 2, "top_k": 3}, 2),  # generation settings used to be in config.json
        ({"num_experts_per_tok": None, "top_k": 50, "moe_topk": 3}, 3),
        ({"num_experts_per_tok": None, "moe_k": 1}, 1),
        ({"num_experts_per_tok": None, "num_selected_experts": 3, "index_topk": 2}, 3),
        ({"num_experts_per_tok": None, "moe_topk": [2, 2]}, 2),
        ({"num_experts_per_tok": None, "top_k": 2, "topk_group": 3}, 2),
        ({"num_experts_per_tok": 2, "audio_config": {"num_experts_per_tok": 3}}, 2),
    ],
)
def test_chosen_experts_are_read_from_the_entry_that_means_them(tmp_path, entries, top_k):
    found = inspect(small(tmp_path / "model", config=entries))
    assert {layer.top_k for layer in found.moe_layers} == {top_k}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_experts_per_tok": None}, "does not say how many of the 4 experts a token chooses"),
        ({"num_experts_per_tok": 2, "num_experts_per_token": 3}, "num_experts_per_tok = 2, num_experts_per_token = 3"),
        ({"num_experts": 5}, "model.layers.0.mlp.experts holds 4 experts, but config.json says num_experts = 5"),
    ],
)
def test_contradictions_name_both_sides(tmp_path, entries, message):
    with pytest.raises(ArchitectureMismatch, match=message):
        inspect(small(tmp_path / "model", config=entries))


def test_a_missing_expert_is_named(tmp_path):
    path = small(tmp_path / "model")
    tensors = {name: (info.dtype, *info.shape) for name, info in Checkpoint.open(path).tensors.items()}
    tensors = {name: entry for name, entry in tensors.items() if "layers.1.mlp.experts.2." not in name}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(
        CorruptCheckpoint, match=r"layers\.1\.mlp\.experts holds 3 of the experts 0 to 3; expert 2 is missing"
    ):
        inspect(header_only(tmp_path / "other", config, tensors))


def test_a_dense_model_is_no_moe_and_the_message_says_what_was_seen(tmp_path):
    tensors = {"model.embed_tokens.weight": ("BF16", 50, 10)}
    for layer in range(3):
        tensors |= {f"model.layers.{layer}.mlp.up_proj.weight": ("BF16", 14, 10)}
    config = {"model_type": "llama", "hidden_size": 10, "num_hidden_layers": 3}
    path = header_only(tmp_path / "model", config, tensors)
    with pytest.raises(
        NotAMoE, match=r"\(llama\) has no routed experts: config\.json has no entry .* 4 tensors in 3 layers"
    ):
        inspect(path)
    (path / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}), encoding="utf-8")
    with pytest.raises(NotAMoE, match="num_local_experts = 8"):
        inspect(path)


def test_what_is_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(NotACheckpoint, match="does not exist"):
        inspect(tmp_path / "nothing")
    with pytest.raises(NotACheckpoint, match=r"config\.json"):
        inspect(tmp_path)


def test_a_truncated_file_is_said_so(tiny, tmp_path):
    path = Path(shutil.copytree(tiny(), tmp_path / "model"))
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        inspect(path)


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_a_budget_allows_what_a_plan_would_do(tiny, model_type):
    path = tiny(model_type)
    whole = Checkpoint.open(path).num_bytes
    for share in (1.2, 1.0, 0.93):
        limit = int(whole * share)
        fit = inspect(path, budget=limit).budget
        assert fit is not None
        assert fit.limit == limit
        made = plan(path, recipe="mergemoe", budget=str(limit))
        assert fit.feasible
        assert {size.num_experts for size in made.layers} == {fit.experts}
        assert made.predicted_bytes == fit.bytes <= limit


def test_a_budget_below_the_floor_names_the_floor(tiny):
    path = tiny()
    fit = inspect(path, budget="10KiB").budget
    assert fit is not None
    assert not fit.feasible
    assert (fit.experts, fit.keep, fit.smallest_experts) == (0, 0, 2)
    with pytest.raises(Infeasible):
        plan(path, recipe="mergemoe", budget="10KiB")
    assert plan(path, recipe="mergemoe", experts=2).predicted_bytes == fit.smallest
    between = inspect(path, budget=fit.smallest - 1).budget
    assert between is not None
    assert (between.experts, between.feasible) == (1, False)


def test_a_budget_that_is_no_amount_is_refused(tiny):
    with pytest.raises(InputError, match="12GiB or 12GB"):
        inspect(tiny(), budget="12G")


def test_a_mapped_result_has_fewer_experts_than_router_rows(tiny, text, tmp_path):
    made = compress(
        tiny(), tmp_path / "out", keep=0.5, recipe="mergemoe", router="map", text=text, tokens=256, seq_len=64
    )
    before, after = inspect(tiny()), inspect(made.out)
    for old, new in zip(before.moe_layers, after.moe_layers, strict=True):
        assert (new.num_experts, new.router_rows, new.top_k) == (4, 8, 2)
        assert new.router == old.router
        assert 2 * new.experts.parameters == old.experts.parameters
    assert after.active_parameters == before.active_parameters
    (made.out / "coterie.json").unlink()
    with pytest.raises(ArchitectureMismatch, match=r"holds 4 experts, but config\.json says num_experts = 8"):
        inspect(made.out)


def test_json_is_plain_and_adds_up(tiny):
    found = inspect(tiny("qwen2_moe"), budget="200KiB")
    content = json.loads(json.dumps(found.to_json()))
    assert content["expert_key"] == "num_experts"
    assert list(content["parts"]) == list(PARTS)
    for measure in ("parameters", "bytes"):
        assert sum(part[measure] for part in content["parts"].values()) == content["total"][measure]
        assert sum(layer["experts"][measure] for layer in content["moe_layers"]) == content["parts"]["experts"][measure]
    assert content["moe_layers"][1]["router_tensors"] == ["model.layers.1.mlp.gate.weight"]
    assert content["budget"]["limit"] == 200 * 1024
    assert sum(content["bytes_by_dtype"].values()) == content["total"]["bytes"]


def test_nothing_heavy_is_imported(tmp_path):
    path = small(tmp_path / "model")
    code = f"""
import sys
from coterie.model.arch.inspect import inspect
inspect({str(path)!r}, budget="1GiB")
print({{"torch", "transformers", "numpy", "safetensors"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_prediction_layers_and_awkward_shapes_are_shown(tiny, tmp_path):
    copy = shutil.copytree(tiny("glm4_moe"), tmp_path / "model")
    tensors = load_file(copy / "model.safetensors")
    tensors |= {"mtp.fc.weight": torch.zeros(2, 2), "model.layers.3.eh_proj.weight": torch.zeros(2, 2)}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert inspect(copy).prediction == ("model.layers.3", "mtp")
    said = CliRunner().invoke(app, ["inspect", str(copy), "--budget", "230KiB"]).stdout
    assert "prediction layers (MTP), run by other programs: model.layers.3, mtp\n" in said
    assert "note: width 24 is no multiple of 256, as K-quants want it" in said
    assert inspect(tiny("glm4_moe")).prediction == ()
    fit = inspect(copy, budget="230KiB").budget
    assert fit.experts % 8
    assert f"{fit.experts} experts cannot be shared out evenly" in said
    assert "--multiple-of" in said
