"""A prompt in pieces, and whether a model computes it so as it does at once: tried out, without its experts.

Attention looks at keys and values, wherever the pieces end. Layers with a state of the text (linear attention,
convolutions) have to go on from it, and code of some families does so for a single token only: several at once begin
anew, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

from coterie.errors import InputError
from coterie.model.arch.seam import intercepted
from coterie.model.quiet import quiet
from coterie.run.cache_layers import can_cut
from coterie.run.kv import KVFormat
from coterie.run.reuse import Running

#: Tokens of the text that is tried, and of its first piece.
_TOKENS, _FIRST = 12, 7

#: Difference of scores, as a share of the largest, above which they are others: far above rounding in 16 bits, and far
#: below what a state that is lost makes.
_MOST = 0.1


def has_cache(model: Any) -> bool:
    """Return whether a model keeps one sequence, in a cache that it can be given."""
    settings = getattr(model, "generation_config", None)
    if settings is None:  # it makes no text
        return False
    is_one = (settings.num_beams or 1) == 1 and (settings.num_return_sequences or 1) == 1
    return bool(is_one and settings.use_cache is not False and model._supports_default_dynamic_cache())


def new_cache(model: PreTrainedModel, how: KVFormat | None = None, plain: Iterable[int] = ()) -> Cache:
    """Return an empty cache as transformers makes it for a model, with some layers that keep less.

    Args:
        model: the model.
        how: what those keep.
        plain: their numbers, see `coterie.run.kv.plain_layers`.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if how is not None:
        for number in plain:
            cache.layers[number] = how.layer()
    return cache


class Reading:
    """How prompts pass a model.

    Attributes:
        has_cache: they leave keys and values in a cache that the model is given.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        """Try it out.

        Args:
            model: in memory but for its experts.
            chunk: tokens that pass at once, at most.
        """
        self.has_cache = has_cache(model)
        self._model: Any = model
        self._chunk = chunk
        self._goes_on = self.has_cache and goes_on(model)

    def begin(self, ids_1S: Tensor, running: Running | None) -> int | None:
        """Let the beginning of a prompt pass, where the rest cannot pass in the same way.

        Args:
            ids_1S: the prompt.
            running: keys and values of what is known of it; None where the model has a cache of its own.

        Returns:
            How many tokens of the rest pass at once; None for all of them.

        Raises:
            InputError: it is longer than what can pass.
        """
        length = ids_1S.shape[1]
        if running is None:
            if length > self._chunk:
                raise InputError(
                    f"the prompt has {length} tokens, and this model, which has a cache of its own, takes at most "
                    f"{self._chunk} at once; a larger chunk takes more memory"
                )
            return None
        known, chunk = running.reused, self._chunk
        if not self._goes_on:  # one token goes on after the other
            if not known and length > chunk:
                self._model(input_ids=ids_1S[:, :chunk], past_key_values=running.cache, use_cache=True)
                known = chunk
            chunk = 1 if known else chunk
        return chunk if length - known > chunk else None


def goes_on(model: PreTrainedModel) -> bool:
    """Return whether several tokens at once go on from those before them, as single tokens do.

    Args:
        model: in memory but for its experts, which are taken for none.
    """
    layers = new_cache(model).layers
    if all(can_cut(layer) or type(layer) is DynamicSlidingWindowLayer for layer in layers):
        return True
    rest = _TOKENS - _FIRST
    with quiet(), torch.no_grad(), intercepted(model, _nothing):
        at_once_V, one_by_one_V = _scores(model, (_FIRST, rest)), _scores(model, (_FIRST, *[1] * rest))
    return bool((at_once_V - one_by_one_V).abs().max() <= _MOST * one_by_one_V.abs().max())


def _nothing(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return torch.zeros_like(hidden_TD)


def _scores(model: Any, pieces: tuple[int, ...]) -> Tensor:
    """Return the scores (V) of the token behind a text that passes a model in pieces."""
    cache, begin = new_cache(model), 0
    ids_1S = torch.arange(_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    for length in pieces:
        output = model(input_ids=ids_1S[:, begin : begin + length], past_key_values=cache, use_cache=True)
        begin += length
    scores_V: Tensor = output.logits[0, -1].float()
    return scores_V
