"""What llama.cpp computes otherwise than transformers, of a family that it is known to have: told before any writing.

Facts are from llama.cpp's ``src/models/*.cpp`` and the modelling files of transformers; each was seen in llama.cpp
beside transformers (``tests/export``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from coterie.errors import InputError
from coterie.model.disk.gguf.families import Family
from coterie.model.disk.gguf.names import Heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Numbers of layers at which llama.cpp expects queries that come straight from the hidden state (V2 Lite).
_LAYERS_OF_DIRECT_QUERIES = (26, 27)


def head_width(config: PreTrainedConfig) -> int:
    """Return the width of an attention head."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def heads_of(config: PreTrainedConfig) -> Heads:
    """Return what cuts of attention matrices hang on."""
    return Heads(
        queries=config.num_attention_heads,
        keys=config.num_key_value_heads,
        latent_keys=getattr(config, "qk_nope_head_dim", None) or 0,
    )


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
    if family.equal_heads and config.num_key_value_heads != config.num_attention_heads:
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
    if family.slides:
        turns = ["sliding_attention", "full_attention"]
        if kinds != [turns[layer % 2] for layer in range(config.num_hidden_layers)]:
            yield f"its layers do not slide and attend to all in turn, as they do in {llama}"
    elif any(kind != "full_attention" for kind in kinds):
        yield f"some of its layers have {next(k for k in kinds if k != 'full_attention')}, and none has in {llama}"
    elif not kinds and window and window < config.max_position_embeddings:
        yield f"its attention reaches back {window} tokens (sliding_window), and to the first one in {llama}"


def _group_reasons(family: Family, config: PreTrainedConfig, llama: str) -> Iterator[str]:
    groups, chosen = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    if family.latent and not family.grouped:
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
    if share != 1.0 and not family.partial_positions:
        yield f"its partial_rotary_factor is {share}, and {llama} turns whole heads"
