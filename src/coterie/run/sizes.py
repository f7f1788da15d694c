"""What text takes of memory while a model runs: keys and values of the context, and activations of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch, NotAMoE
from coterie.model.arch.cache import layer_caches
from coterie.model.arch.inspect import read_headers
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.checkpoint import Checkpoint

#: Numbers of a token beside its experts' that exist at once, in units of the model's width.
_BESIDE = 24

#: Bytes of a number of an activation, and of one of a mask.
_WIDE = 4


def cache_bytes(checkpoint: Checkpoint, model: PreTrainedModel, context: int) -> int:
    """Return the bytes of keys and values of a whole context.

    A token more makes a new copy of those of a layer before the old one goes. What is not known of a family, or of a
    model without experts, is taken for keys and values as wide as the model.

    Args:
        checkpoint: the model, as a view in full precision.
        model: its meta model.
        context: tokens.
    """
    width = model.dtype.itemsize
    try:
        caches = layer_caches(read_headers(checkpoint))
        sizes = [
            width * (cache.key + cache.value) * min(context, cache.window or context) + _WIDE * cache.state
            for cache in caches
        ]
    except (ArchitectureMismatch, NotAMoE):
        config: Any = model.config.get_text_config()
        layers = int(config.num_hidden_layers)
        sizes = [2 * width * int(config.hidden_size) * context] * layers
    return sum(sizes) + 2 * max(sizes, default=0)


def buffer_bytes(
    model: PreTrainedModel, layers: Sequence[MoELayer], *, chunk: int, context: int, scored: int = 1
) -> int:
    """Return the bytes of what a chunk of the prompt has in memory while it passes a layer, and the head.

    Args:
        model: the meta model.
        layers: its MoE layers, if it has some.
        chunk: tokens of the chunk.
        context: tokens that they look at.
        scored: tokens of a pass whose scores are needed, over all sequences.
    """
    config: Any = model.config.get_text_config()
    hidden = max((layer.hidden_size for layer in layers), default=int(config.hidden_size))
    dense = int(getattr(config, "intermediate_size", 0) or 0)
    # All tokens of a chunk may choose the same expert; what experts put out is there until it is summed.
    inner = max((3 * layer.width + (3 + layer.top_k) * layer.hidden_size for layer in layers), default=0)
    numbers = _BESIDE * hidden + max(inner, 3 * dense)
    masks = 2 * chunk * context * _WIDE
    logits = 3 * scored * int(config.vocab_size) * _WIDE
    return chunk * numbers * _WIDE + masks + logits
