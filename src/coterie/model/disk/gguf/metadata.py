"""What the fields of a GGUF file say of a model, in the words of config.json; for both directions. No torch here.

Most fields are entries of a config under another name: one table, which `coterie.export.metadata` reads from left to
right and `config_of` from right to left. What a file does not say is what the model class has by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coterie.errors import CorruptCheckpoint, InputError
from coterie.model.disk.gguf.families import FAMILIES, Family
from coterie.model.disk.gguf.fields import GgufFields, shortest
from coterie.model.disk.gguf.names import is_known

#: Numbers that stand for what a router's scores are; ``llama_expert_gating_func_type`` in ``llama-hparams.h``.
SCORES = {"softmax": 1, "sigmoid": 2}

#: YaRN's boundaries where nothing says them.
BETA_FAST, BETA_SLOW = 32.0, 1.0

#: llama.cpp has the logarithm's factor 0.1 in this field, in the graph of MLA alone (its pull request 17945).
LOG_FACTOR = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """An entry of config.json and its field.

    Attributes:
        config: name of the entry; left out where it is None.
        key: name of the field, behind the architecture's.
        kind: how the field is stored.
        default: what a file means that lacks it; None where it has to be there.
    """

    config: str
    key: str
    kind: Literal["uint32", "float32", "bool"] = "uint32"
    default: int | float | bool | None = None


def _entries(*entries: tuple[Any, ...]) -> tuple[Entry, ...]:
    return tuple(Entry(**dict(zip(("config", "key", "kind", "default"), entry, strict=False))) for entry in entries)


_ALWAYS = _entries(
    ("num_hidden_layers", "block_count"),
    ("max_position_embeddings", "context_length"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "attention.head_count"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", "float32"),
    ("num_experts_per_tok", "expert_used_count"),
)
_HEADS = _entries(("num_key_value_heads", "attention.head_count_kv"))
_LATENT = _entries(
    ("kv_lora_rank", "attention.kv_lora_rank"),
    ("v_head_dim", "attention.value_length_mla"),
    ("qk_rope_head_dim", "rope.dimension_count"),
)
_DIRECT = _entries(("q_lora_rank", "attention.q_lora_rank"))
_WINDOW = _entries(("sliding_window", "attention.sliding_window"))
_MULTIPLIERS = _entries(
    ("attention_multiplier", "attention.scale", "float32"),
    ("embedding_multiplier", "embedding_scale", "float32"),
    ("residual_multiplier", "residual_scale", "float32"),
    ("logits_scaling", "logit_scale", "float32"),
)
_DENSE_FIRST = _entries(
    ("first_k_dense_replace", "leading_dense_block_count", "uint32", 0),
    ("n_shared_experts", "expert_shared_count", "uint32", 0),
    ("routed_scaling_factor", "expert_weights_scale", "float32", 1.0),
)
_NORMALISED = _entries(("norm_topk_prob", "expert_weights_norm", "bool", False))


def entries_of(family: Family, *, direct: bool = True) -> tuple[Entry, ...]:
    """Return the entries of a config that a file says field by field.

    Args:
        family: the family.
        direct: with the rank of queries, which those that come straight from the hidden state do not have.
    """
    return (
        *_ALWAYS,
        *(_LATENT if family.latent else _HEADS),
        *(_DIRECT if family.latent and direct else ()),
        *(_WINDOW if family.slides else ()),
        *(_MULTIPLIERS if family.multipliers else ()),
        *(_DENSE_FIRST if family.dense_first else ()),
        *(_NORMALISED if family.normalised == "written" else ()),
    )


def model_type_of(fields: GgufFields, names: Mapping[str, tuple[int, ...]]) -> str:
    """Return the model type of a file.

    Args:
        fields: its fields.
        names: shapes of its tensors, by name there.

    Raises:
        InputError: its architecture is not known, or it has no experts.
    """
    candidates = [name for name, family in FAMILIES.items() if family.architecture == fields.architecture]
    if not candidates:
        known = sorted({family.architecture for family in FAMILIES.values()})
        raise InputError(
            f"{fields.where} is of the architecture {fields.architecture[:40]!r}, and what its tensors are in "
            f"transformers is not known here; known are {', '.join(known)}. Take the checkpoint that it was made from"
        )
    if not any("_exps." in name for name in names):
        raise InputError(
            f"{fields.where} ({fields.architecture}) has no experts in stacks (ffn_gate_exps), so it is no "
            "Mixture-of-Experts model, or one of a llama.cpp before April 2024"
        )
    if len(candidates) == 1:
        return candidates[0]
    # Several families are one architecture there: what tells them apart is their router's scores, where a file says
    # them, and else which has a place for the most tensors.
    if "expert_gating_func" in fields:
        said = fields.whole("expert_gating_func")
        alike = [name for name in candidates if SCORES.get(FAMILIES[name].scores or "", said) == said]
        if not alike:
            raise fields.wrong("expert_gating_func", f"is {said}, which stands for no scores of this architecture")
        candidates = alike
    return max(candidates, key=lambda name: sum(is_known(FAMILIES[name], tensor) for tensor in names))


def config_of(fields: GgufFields, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Any]:
    """Return the config.json of a file.

    Args:
        fields: its fields.
        shapes: of its tensors, output axis first, by name there.
        dtype: number format of the model.

    Raises:
        InputError: its architecture, or what it does with positions, is not known.
        CorruptCheckpoint: a field is missing or cannot be, or a tensor that every model has.
    """
    name = model_type_of(fields, shapes)
    family = FAMILIES[name]
    config: dict[str, Any] = {"model_type": name, "architectures": [family.model_class], "dtype": dtype}
    if family.latent:
        config["q_lora_rank"] = None
    direct = "attention.q_lora_rank" in fields
    for entry in entries_of(family, direct=direct):
        config[entry.config] = _value(fields, entry)
    behind = fields.whole("nextn_predict_layers", 0)
    if not behind < config["num_hidden_layers"]:
        raise fields.wrong("nextn_predict_layers", f"is {behind}, of {config['num_hidden_layers']} layers")
    config["num_hidden_layers"] -= behind
    config["vocab_size"] = _shape(fields, shapes, "token_embd.weight", 2)[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config |= _from_shapes(family, fields, shapes)
    config |= _attention(family, fields, shapes, config)
    config["rope_parameters"] = _positions(family, fields, config)
    config |= {key: value for key, value in (family.fixed or {}).items() if value is not None}
    if isinstance(family.normalised, bool):
        config["norm_topk_prob"] = family.normalised
    if family.grouped:
        config["num_nextn_predict_layers"] = 0  # those behind are left out; the classes have one by default
    return config | _groups(family, fields) | _tokens(fields, config["vocab_size"])


def _value(fields: GgufFields, entry: Entry) -> Any:
    if entry.kind == "bool":
        return fields.truth(entry.key, None if entry.default is None else bool(entry.default))
    if entry.kind == "float32":
        return fields.number(entry.key, entry.default)
    return fields.whole(entry.key, None if entry.default is None else int(entry.default))


def _shape(fields: GgufFields, shapes: Mapping[str, tuple[int, ...]], end: str, axes: int) -> tuple[int, ...]:
    """Return the shape of the first tensor whose name ends so."""
    shape = next((shape for name, shape in shapes.items() if name == end or name.endswith(f".{end}")), ())
    if len(shape) != axes:
        raise CorruptCheckpoint(f"{fields.where}: {end} has the shape {list(shape)}, and should have {axes} axes")
    return shape


def _from_shapes(family: Family, fields: GgufFields, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return what fields may leave out and tensors say."""
    num_experts, width, _ = _shape(fields, shapes, "ffn_gate_exps.weight", 3)
    config = {family.experts: num_experts, family.expert_width: width}
    if family.shared_width is not None:
        config[family.shared_width] = _shape(fields, shapes, "ffn_up_shexp.weight", 2)[0]
    return config


def _attention(
    family: Family, fields: GgufFields, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    if heads < 1 or config.get("num_key_value_heads", 1) < 1:
        raise fields.wrong("attention.head_count", f"is {heads}, and head_count_kv {config.get('num_key_value_heads')}")
    if family.latent:
        whole = fields.whole("attention.key_length_mla") - config["qk_rope_head_dim"]
        if whole < 1:
            raise fields.wrong("attention.key_length_mla", "is less than the part that rotary positions turn")
        return {"qk_nope_head_dim": whole, "num_key_value_heads": heads}
    attention: dict[str, Any] = {}
    width = fields.whole("attention.key_length", config["hidden_size"] // heads)
    if not family.full_heads:
        attention["head_dim"] = width
    elif width * heads != config["hidden_size"]:
        raise fields.wrong("attention.key_length", f"is {width}, and {heads} heads should be as wide as the model")
    if "attention_bias" not in (family.fixed or {}) and family.partial_positions:
        attention["attention_bias"] = any(name.endswith("attn_q.bias") for name in shapes)
        attention["use_qk_norm"] = any(name.endswith("attn_q_norm.weight") for name in shapes)
    return attention


def _positions(family: Family, fields: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    kind = fields.text("rope.scaling.type", "none")
    positions: dict[str, Any] = {
        "rope_type": "default" if kind == "none" else kind,
        "rope_theta": fields.number("rope.freq_base", 10000.0),
    }
    if family.partial_positions:
        width = config["head_dim"]
        positions["partial_rotary_factor"] = shortest(fields.whole("rope.dimension_count", width) / max(width, 1))
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "alpha"):
        if f"rope.scaling.{key}" in fields:
            raise fields.wrong(f"rope.scaling.{key}", "is set, and what that is in transformers is not known here")
    if kind == "none":
        return positions
    if kind not in family.scaling:
        raise InputError(
            f"{fields.where}: its rotary positions are {kind[:40]!r}, and what {fields.architecture} makes of them was "
            "never compared with transformers"
        )
    positions["factor"] = fields.number("rope.scaling.factor")
    if kind == "yarn":
        positions["original_max_position_embeddings"] = fields.whole(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        positions["beta_fast"] = fields.number("rope.scaling.yarn_beta_fast", BETA_FAST)
        positions["beta_slow"] = fields.number("rope.scaling.yarn_beta_slow", BETA_SLOW)
        scale = fields.number("rope.scaling.yarn_log_multiplier", 0.0)
        if family.latent and scale:
            positions["mscale"] = positions["mscale_all_dim"] = shortest(scale / LOG_FACTOR)
        if family.slides:
            # No file says whether boundaries are rounded, and the models of this class were trained without.
            positions["truncate"] = False
    return positions


def _groups(family: Family, fields: GgufFields) -> dict[str, Any]:
    """Return how many groups of experts there are, and are chosen: none where a file says nothing."""
    if not family.dense_first:
        return {}
    groups = {
        "n_group": fields.whole("expert_group_count", 1),
        "topk_group": fields.whole("expert_group_used_count", 1),
    }
    if family.latent and not family.grouped:
        return groups | {"topk_method": "greedy" if groups["n_group"] <= 1 else "group_limited_greedy"}
    return groups


def _tokens(fields: GgufFields, num_tokens: int) -> dict[str, Any]:
    """Return the ids of special tokens."""
    keys = {name: f"tokenizer.ggml.{role}_token_id" for role, name in _ROLES.items()}
    ids = {name: fields.whole(key, most=2**32 - 1) for name, key in keys.items() if key in fields}
    return {name: token for name, token in ids.items() if token < num_tokens}  # the largest number stands for none


_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
