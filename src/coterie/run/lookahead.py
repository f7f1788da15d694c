"""Guess which experts the next layer will choose, so that idle lanes read them before it asks.

The guess is what the next layer's router says of this layer's input: hidden states change little from layer to layer
(HOBBIT, arXiv 2411.01433, section 3.3). A guess costs no exactness: what was not guessed is read when it is needed.

Legend: E experts, D model width, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
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
        rows = router_rows(model, layers)
        self._routers: dict[int, tuple[MoELayer, Tensor]] = {
            before.index: (layer, rows[layer.index]) for before, layer in pairwise(layers) if layer.index in rows
        }

    @property
    def is_on(self) -> bool:
        """Whether anything is read ahead."""
        return self._num_guesses > 0 and bool(self._routers)

    @torch.no_grad()
    def look(self, layer: int, hidden_TD: Tensor) -> None:
        """Take the input of a layer, of one token, and let the experts be read that the next layer may choose.

        Where less than a part of the guesses was of use, it stops for good, and says so.
        """
        if not self.is_on or len(hidden_TD) != 1 or layer not in self._routers:
            return
        counters = self._residency.counters
        settled = counters.prefetches_used + counters.prefetches_wasted
        if settled >= _ENOUGH and counters.prefetches_used < _WORTH * settled:
            log.warning(
                "reading ahead stops: %d of %d experts that were read ahead were of use",
                counters.prefetches_used, settled,
            )  # fmt: skip
            self._num_guesses = 0
            return
        following, router_ED = self._routers[layer]
        score_E = router_ED.float() @ hidden_TD[0].float()
        count = min(self._num_guesses, following.num_experts)
        self._residency.prefetch(following.index, score_E.topk(count).indices.tolist())


def router_rows(model: PreTrainedModel, layers: Sequence[MoELayer]) -> dict[int, Tensor]:
    """Return the router's rows (E, D) by number of layer, of layers whose router has one such matrix."""
    state, rows_by_layer = model.state_dict(), {}
    for layer in layers:
        names = [name for name, axis in layer.router_tensors if axis == 0]
        rows = [state[name] for name in names if tuple(state[name].shape) == (layer.num_experts, layer.hidden_size)]
        if len(rows) == 1:
            rows_by_layer[layer.index] = rows[0]
    return rows_by_layer
