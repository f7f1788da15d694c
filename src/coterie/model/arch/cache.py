"""What attention keeps of a text while a model runs, layer by layer, as headers and config.json tell it.

Widths are those of the matrices that make keys and values; config.json says where only a window of the text is kept,
and how large the state of linear attention is. What is neither is refused: nothing is guessed by a family's name. No
torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.errors import ArchitectureMismatch
from coterie.model.arch.inspect import Headers
from coterie.model.arch.structure import nearest_entry
from coterie.model.disk.tensors import TensorInfo

#: Modules that make keys and values: one for each, both with the queries, or a latent vector of both (MLA, 2405.04434).
_KEY, _VALUE = re.compile(r"(^|\.)k_proj$"), re.compile(r"(^|\.)v_proj$")
_TOGETHER = re.compile(r"(^|\.)(qkv_proj|query_key_value)$")
_QUERY = re.compile(r"(^|\.)(q_proj|q_b_proj)$")
_LATENT = re.compile(r"(^|\.)kv_a_proj(_with_mqa)?$")
#: What keeps something else, or more: states, convolutions, and the keys of an index that chooses tokens.
_OTHER = re.compile(r"conv|mamba|ssm|A_log|linear_attn|indexer|compressor|decay|shift")

#: Entries of config.json that describe the state of gated linear attention (Gated DeltaNet, 2412.06464).
_STATE = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """What one decoder layer keeps.

    Attributes:
        layer: its number.
        key: numbers of a token's keys; of the latent vector, which values are made from too, where there is one.
        value: numbers of a token's values; 0 where they are made from the latent vector.
        alive: numbers of a token that attention has at once: queries, keys, values, and what it returns.
        window: tokens that are kept at most; None for all.
        state: numbers that are kept of the whole sequence, however long, in 32 bits.
    """

    layer: int
    key: int = 0
    value: int = 0
    alive: int = 0
    window: int | None = None
    state: int = 0


def layer_caches(headers: Headers) -> tuple[LayerCache, ...]:
    """Return what each decoder layer keeps, in order.

    Args:
        headers: of a checkpoint of plain numbers.

    Raises:
        ArchitectureMismatch: a layer keeps something that headers and config.json do not tell; names its tensors.
    """
    checkpoint = headers.checkpoint
    stacks = {block.stack for block in headers.blocks}
    by_layer: dict[int, dict[str, TensorInfo]] = {}
    for name, place in headers.places.items():
        if place is not None and place[0] in stacks and headers.part_of[name] != "unused":
            by_layer.setdefault(place[1], {})[".".join(place[2])] = checkpoint.tensors[name]
    kinds = _layer_types(checkpoint.config)
    return tuple(
        _of_layer(layer, tensors, kinds[layer] if layer < len(kinds) else None, headers)
        for layer, tensors in sorted(by_layer.items())
    )


def _of_layer(layer: int, tensors: Mapping[str, TensorInfo], kind: str | None, headers: Headers) -> LayerCache:
    config = headers.checkpoint.config
    rows = {
        name.removesuffix(".weight"): info.shape[0]
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    strange = sorted(name for name in tensors if _OTHER.search(name))
    if strange:
        sizes = [nearest_entry(config, (), key.__eq__) for key in _STATE]
        if kind == "linear_attention" and all(sizes) and not any(_KEY.search(name) for name in rows):
            key_heads, value_heads, key_dim, value_dim, kernel = (size or 0 for size in sizes)
            mixed = 2 * key_heads * key_dim + value_heads * value_dim
            return LayerCache(layer=layer, state=value_heads * key_dim * value_dim + (kernel - 1) * mixed)
        raise _unknown(headers, layer, strange)
    window = None
    if kind == "sliding_attention":
        window = nearest_entry(config, (), lambda key: key in ("sliding_window", "sliding_window_size"))
    heads = nearest_entry(config, (), lambda key: key == "num_attention_heads")
    latent, queries = _only(rows, _LATENT), _only(rows, _QUERY)
    rank = nearest_entry(config, (), lambda key: key == "kv_lora_rank")
    if latent is not None and heads and rank:
        # Queries meet the latent vector itself: they are there as made, as wide as it, and as it returns them.
        return LayerCache(layer=layer, key=latent, alive=heads * (latent + rank) + (queries or 0), window=window)
    key, value = _only(rows, _KEY), _only(rows, _VALUE)
    if key is not None:
        value = value or key  # where values have no matrix of their own they are the keys
        return LayerCache(layer=layer, key=key, value=value, alive=2 * (queries or key) + key + value, window=window)
    together, groups = _only(rows, _TOGETHER), nearest_entry(config, (), lambda key: key == "num_key_value_heads")
    if together is not None and heads:
        groups = groups or heads
        width, left = divmod(together, heads + 2 * groups)
        if not left:
            alive = 2 * width * (heads + groups)
            return LayerCache(layer=layer, key=groups * width, value=groups * width, alive=alive, window=window)
    raise _unknown(headers, layer, sorted(name for name in tensors if name.endswith("weight"))[:4])


def _only(rows: Mapping[str, int], pattern: re.Pattern[str]) -> int | None:
    """Return the rows of the one matrix of a name; None where there is none, or several."""
    listed = [count for name, count in rows.items() if pattern.search(name)]
    return listed[0] if len(listed) == 1 else None


def _layer_types(config: Mapping[str, Any]) -> Sequence[str]:
    """Return what config.json calls the attention of each layer, if it does."""
    for content in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        kinds = content.get("layer_types")
        if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds):
            return kinds
    return ()


def _unknown(headers: Headers, layer: int, names: Sequence[str]) -> ArchitectureMismatch:
    return ArchitectureMismatch(
        f"{headers.checkpoint.path} ({headers.checkpoint.config['model_type']}): what layer {layer} keeps of a text "
        f"is not known (it has {', '.join(names[:4]) or 'no attention'}), so neither is the memory that it takes; give "
        "the bytes of the weights: --budget without --budget-for memory"
    )
