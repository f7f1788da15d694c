"""Keys and values that stay when a generation is over, for the next one whose prompt begins in the same way.

All that is kept, and the generation that runs, share the memory that the budget has for one whole context: what was
used longest ago goes when a text grows into it, to the disk where there is a store.

What is reused was computed in chunks of other lengths than a new prompt would be, so logits agree as far as sums in
another order do, and not bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.cache_utils import Cache

from coterie.run.cache_layers import (
    cache_tokens,
    can_cut,
    can_cut_exactly,
    common,
    compact,
    copy_of,
    cut,
    layer_tokens,
    num_bytes,
)
from coterie.run.sizes import CacheSize


class Store(Protocol):
    """Where sequences go that there is no memory for: a `coterie.run.session_store.SessionStore`."""

    def best(self, ids_S: Tensor) -> int:
        """Return how many of the first ids it could load keys and values for."""

    def load(self, ids_S: Tensor) -> tuple[Cache, int] | None:
        """Return them, and for how many tokens they are; None where that does not work."""

    def save(self, ids_S: Tensor, cache: Cache) -> None:
        """Keep a sequence, if there is room."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Kept:
    """A sequence that is kept.

    Attributes:
        ids_S: its tokens.
        cache: their keys and values.
        num_bytes: the memory that these take.
    """

    ids_S: Tensor
    cache: Cache
    num_bytes: int


class Running:
    """A generation on its way: its keys and values. Made by `KeptSequences.begin`, ended by `end`."""

    def __init__(self, kept: KeptSequences, cache: Cache, reused: int, ids_S: Tensor) -> None:
        """Begin.

        Args:
            kept: where it came from and where it goes.
            cache: keys and values.
            reused: tokens that are in it.
            ids_S: the prompt.
        """
        self.cache, self.reused = cache, reused
        self._kept, self._ids_S = kept, ids_S

    def grow(self, ids_S: Tensor) -> None:
        """Note all tokens so far, of which the last is not computed yet, and make room for its keys and values."""
        self._ids_S = ids_S
        self._kept.make_room(len(ids_S))

    def end(self, *, whole: bool) -> None:
        """Keep what was computed: tokens that have passed all layers.

        Args:
            whole: the generation has come to its end. Where it has not, some layers may have seen more than others;
                what cannot be cut back to the same number of tokens is forgotten.
        """
        tokens = min(cache_tokens(self.cache), len(self._ids_S))
        lengths = {layer_tokens(layer) for layer in self.cache.layers} - {None}
        layers, same = self.cache.layers, lengths == {tokens}
        is_sound = (whole and same) or all(map(can_cut_exactly, layers))
        if not tokens or not is_sound:
            return
        cut(self.cache, tokens)
        self._kept.keep(self._ids_S[:tokens], self.cache)


class Growing(StoppingCriteria):
    """Notes each token, and makes room for its keys and values."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Say that no token is the last one."""
        self._running.grow(input_ids[0])
        return torch.tensor([False], device=input_ids.device)


class KeptSequences:
    """The sequences that are kept in memory."""

    def __init__(
        self, size: CacheSize, context: int, new_cache: Callable[[], Cache], store: Store | None = None
    ) -> None:
        """Keep none yet.

        Args:
            size: what keys and values take.
            context: tokens whose keys and values there is memory for.
            new_cache: makes an empty cache.
            store: where sequences go that there is no memory for.
        """
        self._size, self._limit = size, size.num_bytes(context)
        self._new_cache, self._store = new_cache, store
        self._kept: list[_Kept] = []  # the one that was used last is the last one

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(kept.num_bytes for kept in self._kept)

    @property
    def sequences(self) -> Sequence[Tensor]:
        """Tokens of each sequence, the one that was used last at the end."""
        return [kept.ids_S for kept in self._kept]

    def begin(self, ids_S: Tensor) -> Running:
        """Return a generation that begins with as much of a prompt as is known, and at least one token left to compute.

        Args:
            ids_S: the prompt.
        """
        best, tokens = self._find(ids_S)
        if self._store is not None and self._store.best(ids_S) > tokens:
            self.make_room(len(ids_S))
            loaded = self._store.load(ids_S)
            if loaded is not None:
                return Running(self, *loaded, ids_S)
            best, tokens = self._find(ids_S)
        if best is None:
            self.make_room(len(ids_S))
            return Running(self, self._new_cache(), 0, ids_S)
        if tokens < len(best.ids_S):
            self.make_room(len(ids_S), but=best)
            if self.num_bytes + self._size.num_bytes(len(ids_S)) <= self._limit:
                return Running(self, copy_of(best.cache, tokens), tokens, ids_S)
            self._give_up(best)
            cut(best.cache, tokens)
        else:
            self._kept.remove(best)
        self.make_room(len(ids_S))
        return Running(self, best.cache, tokens, ids_S)

    def make_room(self, tokens: int, *, but: _Kept | None = None) -> None:
        """Let go what there is no room for beside a generation of so many tokens, first what was used longest ago.

        Args:
            tokens: of the generation.
            but: what stays nevertheless, with all that was used after it.
        """
        room = self._limit - self._size.num_bytes(tokens)
        while self.num_bytes > room and self._kept[0] is not but:
            self._give_up(self._kept[0])

    def keep(self, ids_S: Tensor, cache: Cache) -> None:
        """Keep a sequence, and others as far as there is room.

        Args:
            ids_S: its tokens, whose keys and values the cache has.
            cache: what it was computed with.
        """
        compact(cache)
        whole = all(map(can_cut, cache.layers))
        for kept in list(self._kept):
            length = len(kept.ids_S)
            if common(kept.ids_S, ids_S) == length and (whole or length == len(ids_S)):
                self._kept.remove(kept)
        self._kept.append(_Kept(ids_S=ids_S.clone(), cache=cache, num_bytes=num_bytes(cache)))
        self.make_room(0, but=self._kept[-1])  # for which there was room a moment ago

    def close(self) -> None:
        """Let all go, to the disk where there is a store."""
        while self._kept:
            self._give_up(self._kept[0])

    def _find(self, ids_S: Tensor) -> tuple[_Kept | None, int]:
        """Return what serves a prompt best, and how many of its tokens it serves; None where nothing does."""
        best = max(self._kept, key=lambda kept: _usable(kept, ids_S), default=None)
        tokens = 0 if best is None else _usable(best, ids_S)
        return (best, tokens) if tokens else (None, 0)

    def _give_up(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        if self._store is not None:
            self._store.save(kept.ids_S, kept.cache)


def _usable(kept: _Kept, ids_S: Tensor) -> int:
    """Return how many tokens of a kept sequence a prompt can begin with: one is left to compute, whatever is kept."""
    tokens = min(common(kept.ids_S, ids_S), len(ids_S) - 1)
    return tokens if tokens == len(kept.ids_S) or all(map(can_cut, kept.cache.layers)) else 0
