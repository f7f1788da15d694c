"""A cache of keys and values layer by layer: what it holds, copied, cut back, taken apart and put together again.

A layer that forgets (a window, a state of linear attention) cannot be cut back once it has. What a layer of a type that
is not known here holds is left alone: it is copied whole, and never cut back or taken apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from coterie.run.kv import Int8Layer, WindowLayer, ZipLayer

#: Layers that keep all tokens, each as it is or rounded by itself.
_TOKENS = (DynamicLayer, DynamicIndexedLayer, DummyLayer, Int8Layer)

#: Layers that keep all tokens.
_WHOLE = (*_TOKENS, ZipLayer)

#: Layers that can be taken apart and put together again.
_KNOWN = (
    *_WHOLE, WindowLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)  # fmt: skip

#: What is no part of what a layer holds.
_ASIDE = frozenset({"device", "dtype", "indexer_device", "indexer_dtype", "_sliding_window_tensor"})


def layer_tokens(layer: object) -> int | None:
    """Return how many tokens a layer has seen; None where it does not count them."""
    return int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else None


def cache_tokens(cache: Cache) -> int:
    """Return how many tokens have passed all layers; 0 where none counts them."""
    return min((tokens for layer in cache.layers if (tokens := layer_tokens(layer)) is not None), default=0)


def is_whole(layer: object) -> bool:
    """Return whether a layer keeps all tokens, so that it can always be cut back."""
    return type(layer) in _WHOLE


def can_cut(layer: object) -> bool:
    """Return whether a layer can be cut back to any number of tokens."""
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.cumulative_length < layer.sliding_window)
    return layer.is_croppable if isinstance(layer, WindowLayer) else is_whole(layer)


def can_cut_exactly(layer: Any) -> bool:
    """Return whether a layer that may have been interrupted can be cut back, and has then the bits that it had."""
    if not can_cut(layer) or isinstance(layer, ZipLayer):
        return False
    tensors = dict(_tensors(layer))
    indexed = tensors.pop("indexer_keys", None)  # (B, S, D)
    tensors.pop("indexer_position_ids", None)
    lengths = {tensor.shape[-2] for tensor in tensors.values() if tensor.dim() > 1}
    return len(lengths | ({indexed.shape[1]} if indexed is not None else set())) <= 1


def cut(cache: Cache, tokens: int) -> None:
    """Cut a cache back to its first tokens; all of its layers can be."""
    for layer in cache.layers:
        cut_layer(layer, tokens)


def cut_layer(layer: Any, tokens: int) -> None:
    """Cut a layer back to its first tokens, and give back the memory of the others; it can be."""
    beyond = (layer_tokens(layer) or 0) - tokens
    if beyond > 0:
        layer.crop(-beyond)
        _compact(layer)


def copy_of(cache: Cache, tokens: int) -> Cache:
    """Return a copy of the first tokens of a cache, with memory of its own; all of its layers can be cut."""
    twin = copy.copy(cache)
    twin.layers = []
    for layer in cache.layers:
        twin.layers.append(copy.deepcopy(layer))
        cut_layer(twin.layers[-1], tokens)
    return twin


def compact(cache: Cache) -> None:
    """Give back memory that a cache has and does not use, layer by layer."""
    for layer in cache.layers:
        _compact(layer)


def num_bytes(cache: Cache) -> int:
    """Return the bytes of memory that a cache has."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for layer in cache.layers
        for _, tensor in _tensors(layer)
        if (storage := tensor.untyped_storage()).nbytes()
    }
    return sum(storages.values())


def is_known(cache: Cache) -> bool:
    """Return whether a cache can be taken apart."""
    return all(type(layer) in _KNOWN for layer in cache.layers)


def parts_of(layer: object) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """Return what a layer that is known holds: tensors by name, and numbers by name."""
    numbers = {name: value for name, value in _entries(layer) if value is None or isinstance(value, int)}
    return dict(_tensors(layer)), numbers


def put_together(layer: Any, tensors: Mapping[str, Tensor], numbers: Mapping[str, int | None]) -> None:
    """Let a new layer hold what another one held.

    Raises:
        ValueError: what is given is not what a layer of this type holds.
    """
    known = dict(_entries(layer))
    strange = sorted({*tensors, *numbers} ^ known.keys())
    if strange:
        raise ValueError(f"{type(layer).__name__} holds no {strange[0]}, or it is missing")
    for name, value in {**tensors, **numbers}.items():
        _set(layer, name, value)
        owner = name.partition(".")[0]
        if isinstance(value, Tensor):
            prefix = "indexer_" if owner.startswith("indexer") else ""
            setattr(layer, f"{prefix}device", value.device)
            setattr(layer, f"{prefix}dtype", value.dtype)


def common(first_S: Tensor, second_S: Tensor) -> int:
    """Return how many ids two sequences begin with alike."""
    length = min(len(first_S), len(second_S))
    other = (first_S[:length] != second_S[:length]).nonzero()
    return int(other[0]) if len(other) else length


def _entries(layer: object) -> Iterator[tuple[str, object]]:
    """Yield what a layer holds, entries of tables one by one."""
    for name, value in vars(layer).items():
        if name in _ASIDE:
            continue
        if isinstance(value, dict):
            for key, entry in value.items():
                yield f"{name}.{key}", entry
        else:
            yield name, value


def _tensors(layer: object) -> Iterator[tuple[str, Tensor]]:
    for name, value in _entries(layer):
        if isinstance(value, Tensor):
            yield name, value


def _compact(layer: Any) -> None:
    for name, tensor in list(_tensors(layer)):
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            _set(layer, name, tensor.clone())


def _set(layer: object, name: str, value: object) -> None:
    """Set what `_entries` calls by a name."""
    owner, _, key = name.partition(".")
    if key:
        table = getattr(layer, owner)
        table[next(entry for entry in table if str(entry) == key)] = value
    else:
        setattr(layer, owner, value)
