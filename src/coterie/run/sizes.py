"""What text takes of memory while a model runs: keys and values of the context, and activations of a chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSize:
    """What a layer keeps of a text.

    Attributes:
        token: bytes of a token.
        wide: bytes of a token as attention sees it.
        window: tokens that are kept at most; None for all.
        fixed: bytes that are kept however long the text is.
        last: tokens at the end that are kept as attention sees them too, at most.
    """

    token: int
    wide: int
    window: int | None = None
    fixed: int = 0
    last: int = 0

    def num_bytes(self, tokens: int) -> int:
        """Return the bytes that are kept of so many tokens."""
        if not tokens:
            return 0
        return self.token * min(tokens, self.window or tokens) + self.wide * min(tokens, self.last) + self.fixed

    def seen(self, tokens: int, chunk: int) -> int:
        """Return the bytes that attention has at once, where so many of the tokens come together."""
        return self.wide * min(tokens, (self.window or tokens) + chunk) + self.fixed


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSize:
    """What keys and values take.

    Attributes:
        layers: each layer's.
    """

    layers: tuple[LayerSize, ...]

    def with_layers(self, layers: Mapping[int, LayerSize]) -> CacheSize:
        """Return the same with other sizes of some layers, by number."""
        return CacheSize(layers=tuple(layers.get(number, size) for number, size in enumerate(self.layers)))

    def num_bytes(self, tokens: int) -> int:
        """Return the bytes of keys and values of so many tokens."""
        return sum(layer.num_bytes(tokens) for layer in self.layers)

    def planned(self, context: int, chunk: int) -> int:
        """Return the bytes that are set aside for a whole context.

        A token more makes a new copy of those of a layer before the old one goes; what is kept in fewer bits is made
        wide, layer by layer, beside that.

        Args:
            context: tokens.
            chunk: tokens that come together.
        """
        copies = 2 * max((layer.seen(context, chunk) for layer in self.layers), default=0)
        unpacked = max((layer.seen(context, chunk) for layer in self.layers if layer.token < layer.wide), default=0)
        return self.num_bytes(context) + copies + unpacked


def cache_size(checkpoint: Checkpoint, model: PreTrainedModel) -> CacheSize:
    """Return what keys and values take; what is not known of a family is taken for as wide as the model.

    Args:
        checkpoint: the model, as a view in full precision.
        model: its meta model.
    """
    width = model.dtype.itemsize
    try:
        layers = [
            LayerSize(
                token=width * (cache.key + cache.value), wide=width * (cache.key + cache.value), window=cache.window,
                fixed=_WIDE * cache.state,
            )
            for cache in layer_caches(read_headers(checkpoint))
        ]  # fmt: skip
    except (ArchitectureMismatch, NotAMoE):
        config: Any = model.config.get_text_config()
        token = 2 * width * int(config.hidden_size)
        layers = [LayerSize(token=token, wide=token)] * int(config.num_hidden_layers)
    return CacheSize(layers=tuple(layers))


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
