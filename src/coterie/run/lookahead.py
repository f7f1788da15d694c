"""Guess which experts the next layer will choose, so that idle lanes read them before it asks.

The guess is what the next layer's router, with its biases and groups, makes of this layer's input: hidden states change
little from layer to layer (HOBBIT, arXiv 2411.01433, section 3.3). A guess costs no exactness: what was not guessed is read
when it is needed.

Legend: E experts, D model width, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.model.arch.layers import MoELayer
from coterie.run.residency import Residency

log = logging.getLogger(__name__)

#: Guesses after which it is looked at what they were worth, and the share of them that has to be used.
_ENOUGH, _WORTH = 256, 0.4


class Lookahead:
    """Reads ahead for the layer after the one that computes."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[MoELayer], residency: Residency, num_guesses: int
    ) -> None:
        """Look for the routers.

        Args:
            model: with its resident part.
            layers: its MoE layers, in the order in which they compute.
            residency: what reads.
            num_guesses: experts of a layer that are guessed, the likeliest; 0 for none.
        """
        self._residency, self._num_guesses = residency, num_guesses
        self._following: dict[int, tuple[MoELayer, Tensor, Callable[[Tensor], Tensor] | None]] = {}
        rows = router_rows(model, layers) if num_guesses else {}
        for before, layer in pairwise(layers):
            if layer.index in rows:
                row_ED = rows[layer.index]
                self._following[before.index] = (layer, row_ED, _choice_of(model, layer, row_ED.dtype))

    @property
    def is_on(self) -> bool:
        """Whether anything is read ahead."""
        return self._num_guesses > 0 and bool(self._following)

    @torch.no_grad()
    def look(self, layer: int, hidden_TD: Tensor) -> None:
        """Take the input of a layer, of one token, and let the experts be read that the next layer may choose.

        Where less than a part of the guesses was of use, it stops for good, and says so.
        """
        if not self.is_on or len(hidden_TD) != 1 or layer not in self._following:
            return
        used, settled = self._residency.prefetched
        if settled >= _ENOUGH and used < _WORTH * settled:
            log.warning("reading ahead stops: %d of %d experts that were read ahead were of use", used, settled)
            self._num_guesses = 0
            return
        following, router_ED, choose = self._following[layer]
        input_1D = hidden_TD.to(router_ED.dtype)
        chosen = [] if choose is None else choose(input_1D)[0].tolist()[: self._num_guesses]
        if len(chosen) < min(self._num_guesses, following.num_experts):
            score_E = nn.functional.linear(input_1D, router_ED)[0]
            likely = score_E.topk(min(self._num_guesses, following.num_experts)).indices.tolist()
            chosen = list(dict.fromkeys([*chosen, *likely]))[: self._num_guesses]
        self._residency.prefetch(following.index, chosen)


def router_rows(model: PreTrainedModel, layers: Sequence[MoELayer]) -> dict[int, Tensor]:
    """Return the router's rows (E, D) by number of layer, of layers whose router has one such matrix."""
    state, rows_by_layer = model.state_dict(), {}
    for layer in layers:
        names = [name for name, axis in layer.router_tensors if axis == 0]
        rows = [state[name] for name in names if tuple(state[name].shape) == (layer.num_experts, layer.hidden_size)]
        if len(rows) == 1:
            rows_by_layer[layer.index] = rows[0]
    return rows_by_layer


def _choice_of(model: PreTrainedModel, layer: MoELayer, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """Return what a layer's router chooses for hidden states (T, D), as numbers (T, K), with its biases and groups.

    A router module of transformers returns its choice, or scores from which its block chooses
    (`route_tokens_to_experts`). None where it is neither: then the products with the router's rows are what is known.
    """
    if layer.router is None:
        return None
    router, block = model.get_submodule(layer.router), model.get_submodule(layer.block)
    route: Any = getattr(block, "route_tokens_to_experts", None)

    def numbers(output: Any) -> list[Tensor]:
        tensors = output if isinstance(output, tuple) else (output,)
        return [each for each in tensors if not each.is_floating_point() and each.shape[-1] == layer.top_k]

    def by_router(hidden_TD: Tensor) -> Tensor:
        return numbers(router(hidden_TD))[0]

    def by_block(hidden_TD: Tensor) -> Tensor:
        output = router(hidden_TD)
        return numbers(route(*output) if isinstance(output, tuple) else route(output))[0]

    for choose in (by_router, by_block):
        try:
            with torch.no_grad():
                index_TK = choose(torch.ones((1, layer.hidden_size), dtype=dtype))
        except (IndexError, TypeError, AttributeError, RuntimeError, ValueError):
            continue
        if tuple(index_TK.shape) == (1, layer.top_k) and int(index_TK.max()) < layer.num_experts:
            return choose
    return None
