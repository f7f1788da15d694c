"""The memory of a running model beside its weights, in llama.cpp: the cache of keys and values, and buffers.

What llama.cpp reserves follows from shapes alone. The cache has a cell for every token of the context of every
sequence, in steps of 256 cells; where a window is kept, as many as that and a micro-batch take (its
``llama-kv-cache*.cpp``). Buffers hold the activations of one micro-batch, the mask of attention, and the logits of one
token of every sequence; what is alive at once was read off what it reserves for many shapes (benchmarks/run_memory.py
compares). Attention is taken to be fused (flash attention), as it is unless it is turned off. The program itself, its
tokenizer and prompts that a server remembers are not counted. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coterie.amounts import format_bytes
from coterie.model.arch.cache import LayerCache, layer_caches
from coterie.model.arch.inspect import Headers
from coterie.model.arch.run_settings import Running
from coterie.model.arch.structure import nearest_entry

#: Bits of a number in the cache, scales counted.
_BITS = {"f16": 16.0, "q8_0": 8.5}
#: Tokens that are computed at once (``--ubatch-size``), and cells that are reserved together.
MICRO_BATCH, _CELLS = 512, 256
#: Hidden states of a token that are alive beside what experts, and what attention have: input, residuals, their norms.
_BESIDE_EXPERTS, _BESIDE_ATTENTION = 5, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMemory:
    """What a running model takes beside its weights.

    Attributes:
        running: how it runs.
        cache_bytes: keys and values, and states of linear attention.
        buffer_bytes: activations, masks, logits.
    """

    running: Running
    cache_bytes: int
    buffer_bytes: int

    @property
    def num_bytes(self) -> int:
        """Both."""
        return self.cache_bytes + self.buffer_bytes

    def sentence(self) -> str:
        """Say both, and how it runs."""
        running = self.running
        sequences = "one sequence" if running.batch == 1 else f"each of {running.batch} sequences"
        return (
            f"{format_bytes(self.cache_bytes)} for keys and values ({running.kv_type}, {running.context:,} tokens of "
            f"{sequences}), {format_bytes(self.buffer_bytes)} for buffers"
        )

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return {
            "context": self.running.context,
            "batch": self.running.batch,
            "kv_type": self.running.kv_type,
            "cache_bytes": self.cache_bytes,
            "buffer_bytes": self.buffer_bytes,
        }


def run_memory(headers: Headers, running: Running) -> RunMemory:
    """Return what a model takes beside its weights when it runs.

    Args:
        headers: of a checkpoint of plain numbers.
        running: how it runs.

    Raises:
        ArchitectureMismatch: what attention keeps is not known, see `coterie.model.arch.cache.layer_caches`.
        InputError: `running` is out of range.
    """
    running.check()
    caches = layer_caches(headers)
    return RunMemory(
        running=running,
        cache_bytes=sum(_cache_bytes(cache, running) for cache in caches),
        buffer_bytes=_buffer_bytes(headers, caches, running),
    )


def trained_context(headers: Headers) -> int | None:
    """Return how many tokens of context config.json says that the model is for; None where it does not."""
    return nearest_entry(headers.checkpoint.config, (), lambda key: key == "max_position_embeddings")


def _cells(tokens: int) -> int:
    return -(-tokens // _CELLS) * _CELLS


def _cells_of(cache: LayerCache, running: Running) -> int:
    """Return the tokens of a sequence that there is room for."""
    full = _cells(running.context)
    return full if cache.window is None else min(full, _cells(cache.window + _micro_batch(running)))


def _cache_bytes(cache: LayerCache, running: Running) -> int:
    of_token = (cache.key + cache.value) * _BITS[running.kv_type] / 8
    return running.batch * (int(_cells_of(cache, running) * of_token) + 4 * cache.state)


def _micro_batch(running: Running) -> int:
    return min(MICRO_BATCH, _cells(running.context) * running.batch)


def _buffer_bytes(headers: Headers, caches: Sequence[LayerCache], running: Running) -> int:
    config = headers.checkpoint.config
    hidden = max(layer.hidden_size for layer in headers.moe_layers)
    dense = nearest_entry(config, (), lambda key: key == "intermediate_size") or 0
    # Gate, up and their product of every chosen expert at once, or the outputs of all before they are added.
    widest = max(max(3 * layer.top_k * layer.width, layer.top_k * layer.hidden_size) for layer in headers.moe_layers)
    if len(headers.moe_layers) < headers.num_layers:
        widest = max(widest, 3 * dense)
    attention = max(cache.alive for cache in caches)
    activations = 4 * max(_BESIDE_EXPERTS * hidden + widest, _BESIDE_ATTENTION * hidden + attention)
    masks = 2 * sum({_cells_of(cache, running) for cache in caches if not cache.state})
    vocabulary = nearest_entry(config, (), lambda key: key == "vocab_size") or 0
    return _micro_batch(running) * (activations + masks) + 4 * running.batch * vocabulary
