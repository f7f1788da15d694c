"""The table of families: a tiny config for every text MoE family of transformers whose experts Coterie can reach.

This is the one place of Coterie that names families. Most of a tiny config is the same for all: every key that a config
class has and that `_COMMON` knows is set from there. The table holds what is left.

Experts 8, top_k 2, hidden 32, expert width 24, dense width 40, shared width 56, vocabulary 272: no two axes of one
length, so no test can pass with two axes confused. Widths are multiples of 8, as grouped kernels want them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from coterie.errors import UnknownName

#: Token id of the end of text in every tiny tokenizer; the ids before it are the 256 bytes.
END_OF_TEXT_ID = 256

_MOE_WIDTH, _DENSE_WIDTH, _SHARED_WIDTH = 24, 40, 56

# Keys that mean the same wherever they occur.
_COMMON: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": END_OF_TEXT_ID,
    "sliding_window": 64,
    "norm_topk_prob": True,
    # The number of experts and of chosen ones, under all of their names.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "experts_per_token"), 2
    ),
    "n_group": 1, "num_expert_group": 1, "topk_group": 1,
    # Widths.
    "intermediate_size": _DENSE_WIDTH, "moe_intermediate_size": _MOE_WIDTH, "dense_intermediate_size": _DENSE_WIDTH,
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
         "shared_experts_intermediate_size"), _SHARED_WIDTH,
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    # Which layers are MoE layers: the first is dense where a family can have that.
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_nextn_predict_layers": 0, "num_mtp_layers": 0,
    # Latent, linear, convolutional and indexed attention.
    "q_lora_rank": 12, "kv_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12, "v_head_dim": 16,
    "linear_num_heads": 2, "linear_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 20,
    "index_n_heads": 2, "index_head_dim": 12, "index_topk": 16,
}  # fmt: skip

_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "mlp_layer_types")

# The same for the towers that see and hear; text never reaches them.
_TOWER: dict[str, Any] = {
    "hidden_size": 16, "d_model": 16, "depth": 1, "num_hidden_layers": 1, "encoder_layers": 1, "intermediate_size": 8,
    "encoder_ffn_dim": 8, "num_heads": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "encoder_attention_heads": 2, "out_hidden_size": 32, "output_dim": 32, "projection_intermediate_size": 8,
    "image_size": 8, "patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "num_mel_bins": 8, "downsample_hidden_size": 4, "max_source_positions": 16, "mlp_dim": 8, "output_channels": 16,
    "global_attn_indexes": [0], "window_size": 2, "vocab_size": 16, "max_position_embeddings": 16,
    "pos_emb_height": 4, "pos_emb_width": 4, "scale": 8, "hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1],
    "downsample_channels": [8, 8], "projector_hidden_size": 8,
}  # fmt: skip

# Layer patterns of hybrid families: both kinds of token mixing occur.
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_WIDER_HEADS_WHERE_FULL = _SLIDING_THEN_FULL | {"per_layer_config": {"1": {"head_dim": 8}}}
_RELATIVE_POSITIONS = {
    "rel_extent": 8, "d_rel": 4, "swa_head_dim": 16, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1,
    "sliding_window_size": 64,
}  # fmt: skip


def _rotary_sections(*sections: int) -> dict[str, Any]:
    """Return a config of rotary positions that share a head's width among time, height and width of an image."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": parameters}


#: What each family needs beside `_COMMON`. A dotted key reaches into a nested config.
TINY: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": {"n_group": 2},
    "axk2": {},
    "bailing_hybrid": {"num_expert_group": 2, "layer_group_size": 2, "head_dim": 16},
    "beam": {"n_group": 2},
    "cohere2_moe": {},
    "deepseek_ocr2": {},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2},
    "deepseek_v3": {"n_group": 2},
    "deepseek_v32": {},
    "deepseek_v4": {"num_hidden_layers": 2, "mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": _WIDER_HEADS_WHERE_FULL,
    "dots1": {},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 12, "swa_kv_lora_rank": 20,
        "head_dim": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 12, "swa_v_head_dim": 16,
    },
    "ernie4_5_moe": {},
    "ernie4_5_vl_moe": _rotary_sections(2, 2, 4) | {"moe_intermediate_size": [24, 16]},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {
        "num_hidden_layers": 3, "mlp_only_layers": [0],
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "gemma4_text": _WIDER_HEADS_WHERE_FULL | {
        "enable_moe_block": True, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 272,
    },
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm4v_moe": _rotary_sections(1, 1, 2),
    "glm5_next": {
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"], "qk_rope_head_dim": 0,
        "index_kpool": 4,
    },
    "glm_moe_dsa": {},
    "gpt_oss": {"max_position_embeddings": 131072},
    "granitemoe": {
        "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25, "logits_scaling": 1.5,
    },
    "granitemoe_swa": {},
    "granitemoehybrid": _LINEAR_THEN_FULL | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 12},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": _RELATIVE_POSITIONS | {"layer_types": ["hybrid_sliding", "hybrid"], "unpadded_vocab_size": 272},
    "inkling_text": _RELATIVE_POSITIONS | {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "logits_mup_width_multiplier": 1.0,
    },
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 12, "mamba_dt_rank": 4,
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mellum": _SLIDING_THEN_FULL | {"num_hidden_layers": 2, "mlp_layer_types": ["sparse", "sparse"]},
    "mimo_v2_flash": {},
    "minimax": {"block_size": 32},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mistral4": {},
    "mistral_large4": {},
    "mixtral": {},
    "muse_spark": {"moe_hidden_size": 20, "audio_config.num_hidden_layers": 4},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 12, "n_groups": 2,
    },
    "olmoe": {},
    "openai_privacy_filter": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": _LINEAR_THEN_FULL,
    "qwen3_moe": {},
    "qwen3_next": _LINEAR_THEN_FULL,
    "qwen3_omni_moe_thinker": {},
    "qwen3_vl_moe": {},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"], "hc_lowrank": 4, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 20, "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "solar_open": {},
    "unlimited_ocr": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 68},
}  # fmt: skip

#: A family for each way to lay out experts and to route; what depends on no more than that is tested on them.
CORE_FAMILIES = (
    "olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "glm4_moe", "granitemoe",
)  # fmt: skip

#: Families whose routing weights are a softmax over all experts, not renormalised after the choice: there the weights
#: of the chosen change when others go.
SOFTMAX_OVER_ALL = ("deepseek_ocr2", "deepseek_v2", "jamba", "unlimited_ocr", "zaya")

#: Families whose config sizes the experts and other parts by one entry, so that experts cannot be narrower alone.
ONE_WIDTH = ("hunyuan_v1_moe", "inkling_text", "jamba")

#: Families whose routers cannot be run by themselves, so that nothing can be asked of them with fewer experts.
UNROUTABLE = ("gemma4_text",)

#: Families that cannot be compressed, and why. `tiny_checkpoint` makes them too, to show that the refusal is clear.
UNSUPPORTED: dict[str, str] = {
    "deepseek_v4": "its first MoE layers look experts up in a fixed table by token, which cannot follow",
    "diffusion_gemma": "one set of experts runs in two places, in the encoder and in the decoder",
    "ernie4_5_vl_moe": "each layer has a second set of experts for images, counted by the same config key",
}


def tiny_families() -> tuple[str, ...]:
    """Return the model types that Coterie can compress, each with a checkpoint that `tiny_checkpoint` can make."""
    return tuple(name for name in TINY if name not in UNSUPPORTED)


def check_known(names: Iterable[str]) -> None:
    """Raise UnknownName unless all of these are families of the table."""
    for name in names:
        if name not in TINY:
            raise UnknownName("tiny family", name, TINY)


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return the tiny config of a family.

    Args:
        model_type: a key of `TINY`.
        **changes: config keys to set; those of the text model where it is nested.

    Raises:
        UnknownName: a model type or config key that does not exist.
    """
    check_known([model_type])
    config_class: Any = CONFIG_MAPPING[model_type]
    parts: dict[str, Any] = getattr(config_class, "sub_configs", {})
    text_class = parts.get("text_config", config_class)
    for key in changes:
        if not hasattr(text_class(), key):
            raise UnknownName(f"config key of {model_type}", key, text_class().to_dict())
    own = {key: value for key, value in TINY[model_type].items() if "." not in key}
    text = _text_keys(text_class) | own | changes
    config: PreTrainedConfig
    if text_class is config_class:
        config = config_class(**text)
        return config
    defaults = config_class().to_dict()
    nested: dict[str, Any] = {name: _shrunk(defaults[name]) for name in parts.keys() - {"text_config"}}
    nested["text_config"] = text
    for key in TINY[model_type].keys() - own.keys():
        part, _, inner = key.partition(".")
        nested[part][inner] = TINY[model_type][key]
    tokens = {key: value for key, value in _COMMON.items() if key.endswith("_token_id")}
    outer = {key: value for key, value in (_TOWER | tokens).items() if key in defaults}
    config = config_class(**outer | nested)
    return config


def model_class(model_type: str) -> Any:
    """Return the stock class that a tiny checkpoint of a family is made with and loads with."""
    for table in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ):
        if model_type in table:
            return getattr(transformers, table[model_type])
    raise UnknownName("model class of", model_type, TINY)


def installed_families() -> dict[str, tuple[str, ...]]:
    """Return the families of the installed transformers whose experts go through the common interface.

    Returns:
        For each module of transformers with such experts, the model types that it defines.
    """
    models = Path(transformers.__file__).parent / "models"
    by_module: dict[str, tuple[str, ...]] = {}
    for file in sorted(models.glob("*/modeling_*.py")):
        if re.search(r"^@use_experts_implementation", file.read_text(encoding="utf-8"), re.MULTILINE):
            module = file.parent.name
            by_module[module] = tuple(name for name in CONFIG_MAPPING if model_type_to_module_name(name) == module)
    return by_module


def _text_keys(config_class: Any) -> dict[str, Any]:
    """Return what `_COMMON` says of the keys that a text config has."""
    defaults = config_class().to_dict()
    dense_first = any(key in defaults for key in _DENSE_FIRST)
    keys = {key: value for key, value in _COMMON.items() if key in defaults}
    keys["num_hidden_layers"] = 3 if dense_first else 2
    if "kv_lora_rank" in defaults:  # latent attention: as many keys as queries, and the width of a head follows
        keys["num_key_value_heads"] = keys["num_attention_heads"]
        keys.pop("head_dim", None)
    if "moe_intermediate_size" not in defaults:
        keys["intermediate_size"] = _MOE_WIDTH
    return keys


def _shrunk(defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a tower with the values of `_TOWER` wherever it has their keys."""
    # Lists with an entry a layer come anew from the number of layers.
    return {
        key: _shrunk(value) if isinstance(value, dict) else _TOWER.get(key, value)
        for key, value in defaults.items()
        if not str(key).endswith("layer_types")
    }
