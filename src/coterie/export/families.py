"""What llama.cpp computes of each family that is known here: its architecture, what is fixed in it, what is rearranged.

This is the one file of the library, beside `coterie.testing.families`, that names families: GGUF does, and a graph
of llama.cpp has constants in it that no file can change. Facts are from llama.cpp's ``src/models/*.cpp`` (what is
computed, which tensors are read), its ``conversion`` folder (what keys mean, how weights are laid out) and the
modelling files of transformers; each family here was run in llama.cpp beside transformers (``tests/export``).
llama.cpp may well know a family that is not in the table, but nobody has compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from coterie.errors import InputError
from coterie.export.tensors import Take, Target
from coterie.model.disk.tensors import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A family in llama.cpp.

    Attributes:
        architecture: its name there.
        scores: what a router's scores are: a softmax or a sigmoid; None where the graph alone knows.
        normalised: whether weights of chosen experts are divided by their sum: always, never, or as the file says.
        can_tie: whether the head may be the embedding; else it has to be a tensor of its own.
        interleaved_positions: rotary positions turn neighbours there, and halves of a head in transformers.
        latent: keys and values come from a latent vector (MLA).
        grouped: groups of experts may be chosen first, by the sum of the two best scores in each.
        dense_first: leading layers may be dense.
        multipliers: embedding, attention, residual and logits are scaled.
        full_heads: heads together are as wide as the model.
        paired_experts: gate and up are one tensor, input axis first, their columns in turn.
        scaling: kinds of rotary positions that were compared, beside the plain one.
        fixed: config entries that only one value is right of.
    """

    architecture: str
    scores: Literal["softmax", "sigmoid"] | None = "softmax"
    normalised: bool | Literal["written"] = True
    can_tie: bool = True
    interleaved_positions: bool = False
    latent: bool = False
    grouped: bool = False
    dense_first: bool = False
    multipliers: bool = False
    full_heads: bool = False
    paired_experts: bool = False
    scaling: tuple[str, ...] = ("linear", "yarn")
    fixed: Mapping[str, Any] | None = None


#: Numbers of layers at which llama.cpp expects queries that come straight from the hidden state (V2 Lite).
_LAYERS_OF_DIRECT_QUERIES = (26, 27)
_GRANITE = Family(
    architecture="granitemoe", interleaved_positions=True, multipliers=True, full_heads=True, scaling=(),
    fixed={"attention_bias": False},
)  # fmt: skip

#: The families that are known, by the model type in config.json.
FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(architecture="qwen2moe", normalised=False, can_tie=False, full_heads=True),
    "qwen3_moe": Family(architecture="qwen3moe", fixed={"attention_bias": False}),
    "glm4_moe": Family(
        architecture="glm4moe", scores="sigmoid", normalised="written", dense_first=True, grouped=True, scaling=(),
    ),
    "deepseek_v2": Family(
        architecture="deepseek2", normalised=False, latent=True, dense_first=True, scaling=("yarn",),
        fixed={"attention_bias": False, "mlp_bias": False},
    ),
    "deepseek_v3": Family(
        architecture="deepseek2", scores="sigmoid", normalised="written", grouped=True, latent=True, dense_first=True,
        scaling=("yarn",), fixed={"attention_bias": False, "rope_interleave": True},
    ),
    "gpt_oss": Family(
        architecture="gpt-oss", scores=None, can_tie=False, paired_experts=True, scaling=("yarn",),
        fixed={"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    "mixtral": Family(architecture="llama", interleaved_positions=True),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "olmoe": Family(
        architecture="olmoe", normalised=False, can_tie=False, full_heads=True,
        fixed={"attention_bias": False, "clip_qkv": None},
    ),
}  # fmt: skip


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a config.json.

    Raises:
        InputError: it is not known.
    """
    name = str(config["model_type"])
    if name not in FAMILIES:
        raise InputError(
            f"{where} is a {name}, and whether llama.cpp computes that rightly is not known; known are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]


def head_width(config: PreTrainedConfig) -> int:
    """Return the width of an attention head."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def is_tied(config: PreTrainedConfig) -> bool:
    """Tell whether the head is the embedding."""
    return bool(getattr(config, "tie_word_embeddings", False))


def check_config(family: Family, config: PreTrainedConfig, where: str) -> None:
    """Raise InputError where llama.cpp would compute something else than transformers does, and say what."""
    for reason in _reasons(family, config):
        raise InputError(f"{where} cannot be exported: {reason}")


def _reasons(family: Family, config: PreTrainedConfig) -> Iterator[str]:
    llama = f"llama.cpp's {family.architecture}"
    for key, value in (family.fixed or {}).items():
        said = getattr(config, key, value)
        if said != value:
            yield f"its {key} is {said!r}, and {llama} computes with {value!r}"
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        yield f"its experts have the activation {activation!r}, and {llama} computes with 'silu'"
    normalises = getattr(config, "norm_topk_prob", True)
    if isinstance(family.normalised, bool) and family.normalised != normalises and hasattr(config, "norm_topk_prob"):
        never = "divides weights of chosen experts by their sum"
        yield (f"its norm_topk_prob is {normalises}, and {llama} {'always' if family.normalised else 'never'} {never}")
    if is_tied(config) and not family.can_tie:
        yield f"its head is the embedding (tie_word_embeddings), and {llama} wants a head of its own"
    if family.full_heads and head_width(config) * config.num_attention_heads != config.hidden_size:
        yield (
            f"{config.num_attention_heads} heads of width {head_width(config)} are not as wide as the model, "
            f"{config.hidden_size}, which {llama} wants"
        )
    if family.architecture == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        yield f"it has {config.num_key_value_heads} heads of keys for {config.num_attention_heads}; {llama} has as many"
    yield from _layer_reasons(family, config, llama)
    yield from _group_reasons(family, config, llama)
    yield from _position_reasons(family, config, llama)


def _layer_reasons(family: Family, config: PreTrainedConfig, llama: str) -> Iterator[str]:
    if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
        yield f"some of its layers have no experts (mlp_only_layers, decoder_sparse_step), and all have in {llama}"
    if getattr(config, "moe_layer_freq", 1) != 1:
        yield f"its moe_layer_freq is {config.moe_layer_freq}, and 1 in {llama}"
    if family.latent and (config.q_lora_rank is None) != (config.num_hidden_layers in _LAYERS_OF_DIRECT_QUERIES):
        yield (
            f"its q_lora_rank is {config.q_lora_rank} and it has {config.num_hidden_layers} layers; {llama} takes "
            "models of 26 and 27 layers for those without one, and no others"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = list(getattr(config, "layer_types", None) or ())
    if family.architecture == "gpt-oss":
        turns = ["sliding_attention", "full_attention"]
        if kinds != [turns[layer % 2] for layer in range(config.num_hidden_layers)]:
            yield f"its layers do not slide and attend to all in turn, as they do in {llama}"
    elif any(kind != "full_attention" for kind in kinds):
        yield f"some of its layers have {next(k for k in kinds if k != 'full_attention')}, and none has in {llama}"
    elif not kinds and window and window < config.max_position_embeddings:
        yield f"its attention reaches back {window} tokens (sliding_window), and to the first one in {llama}"


def _group_reasons(family: Family, config: PreTrainedConfig, llama: str) -> Iterator[str]:
    groups, chosen = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    if family.architecture == "deepseek2" and not family.grouped:
        if config.topk_method == "group_limited_greedy" and chosen < groups:
            yield (
                f"it chooses {chosen} of {groups} groups of experts by the best score in each, and {llama} by the sum "
                "of the two best"
            )
        return
    if chosen < groups and not family.grouped:
        yield f"it chooses {chosen} of {groups} groups of experts first, and {llama} does not"


def _position_reasons(family: Family, config: PreTrainedConfig, llama: str) -> Iterator[str]:
    positions = dict(getattr(config, "rope_parameters", None) or {})
    kind = positions.get("rope_type", "default")
    if any(isinstance(value, Mapping) for value in positions.values()):
        yield f"its layers have different rotary positions, and all have the same in {llama}"
    elif kind != "default" and kind not in family.scaling:
        yield f"its rotary positions are {kind!r}, which was never compared with {llama}"
    elif kind == "yarn":
        scales = positions.get("mscale"), positions.get("mscale_all_dim")
        if family.latent and (scales[0] != scales[1] or not scales[0]):
            yield f"its mscale is {scales[0]} and its mscale_all_dim {scales[1]}, which are one number in {llama}"
        elif not family.latent and (scales != (None, None) or positions.get("attention_factor") is not None):
            yield f"its rotary positions set mscale or attention_factor, which was never compared with {llama}"
    share = positions.get("partial_rotary_factor", 1.0)
    if share != 1.0 and family.architecture != "glm4moe":
        yield f"its partial_rotary_factor is {share}, and {llama} turns whole heads"


# Where tensors go.

_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_FUSED = re.compile(r"model\.layers\.(\d+)\.(block_sparse_moe|shared_mlp)\.(input_linear|output_linear)\.weight")
_PAIRED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)(_bias)?")
_PROJECTIONS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def targets_of(
    family: Family, config: PreTrainedConfig, tensors: Mapping[str, TensorInfo]
) -> dict[str, tuple[Target, ...]]:
    """Return where each tensor on disk goes: nowhere for prediction layers, and for a head that is the embedding."""
    return {name: tuple(_targets(family, config, name, info)) for name, info in tensors.items()}


def _targets(family: Family, config: PreTrainedConfig, name: str, info: TensorInfo) -> Iterator[Target]:
    layer = _LAYER.match(name)
    if (layer and int(layer[1]) >= config.num_hidden_layers) or (name == "lm_head.weight" and is_tied(config)):
        return
    if name.endswith("rotary_emb.inv_freq"):
        return  # older checkpoints have it; it follows from the config
    if match := _EXPERT.fullmatch(name):
        yield Target(name=f"blk.{match[1]}.ffn_{_PROJECTIONS[match[3]]}_exps.weight", expert=int(match[2]))
    elif match := _FUSED.fullmatch(name):
        kind = "exps" if match[2] == "block_sparse_moe" else "shexp"
        if match[3] == "output_linear":
            yield Target(name=f"blk.{match[1]}.ffn_down_{kind}.weight")
        else:
            half = info.shape[-2] // 2
            for projection, start in (("gate", 0), ("up", half)):
                take = Take(rows=tuple(range(start, start + half)))
                yield Target(name=f"blk.{match[1]}.ffn_{projection}_{kind}.weight", take=take)
    elif family.paired_experts and (match := _PAIRED.fullmatch(name)):
        kind, width = "bias" if match[3] else "weight", info.shape[-1]
        if match[2] == "down_proj":
            yield Target(name=f"blk.{match[1]}.ffn_down_exps.{kind}", take=Take(input_first=not match[3]))
        else:
            for projection, start in (("gate", 0), ("up", 1)):
                take = Take(input_first=not match[3], rows=tuple(range(start, width, 2)))
                yield Target(name=f"blk.{match[1]}.ffn_{projection}_exps.{kind}", take=take)
    elif family.latent and name.endswith(".self_attn.kv_b_proj.weight"):
        keys, values, heads = config.qk_nope_head_dim, config.v_head_dim, config.num_attention_heads
        stem = name.removesuffix("kv_b_proj.weight")
        take = Take(groups=heads, rows=tuple(range(keys)), turned=True, stacked=True)
        yield Target(name=f"{stem}k_b_proj.weight", take=take)
        take = Take(groups=heads, rows=tuple(range(keys, keys + values)), stacked=True)
        yield Target(name=f"{stem}v_b_proj.weight", take=take)
    elif family.interleaved_positions and (match := re.search(r"\.self_attn\.(q|k)_proj\.(weight|bias)$", name)):
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        half = info.shape[0] // heads // 2
        rows = tuple(row for pair in range(half) for row in (pair, half + pair))
        yield Target(name=name, take=Take(groups=heads, rows=rows))
    elif name.endswith(".e_score_correction_bias"):
        yield Target(name=f"{name.removesuffix('_bias')}.bias")
    elif name.endswith(".sinks"):
        yield Target(name=f"{name}.weight")
    else:
        yield Target(name=name)
