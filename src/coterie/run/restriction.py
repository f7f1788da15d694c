"""Routing restricted to the experts that are in memory: what a model guesses with, as nothing has to be read.

The experts that a token chose and that are in memory stay. In the place of each other one comes the expert in memory
that the router likes best of those that were not chosen. Its weight is what a softmax gives it beside the one that it
stands for. Where weights add up to the same for every token, they do afterwards too.

Legend: T tokens, K chosen experts, E experts, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from coterie.run.residency import Residency

#: How near weights are to the softmax of all scores where they are that softmax itself, and not made to add up.
_NEAR = 0.02


class Restriction:
    """Restricts the routing of a model, layer by layer.

    Attributes:
        missing: experts (layer, number) that tokens wanted and that were not in memory, until somebody takes them out.
    """

    def __init__(self, residency: Residency, router_rows: Mapping[int, Tensor], *, share: float = 1.0) -> None:
        """Look at who is in memory.

        Args:
            residency: knows.
            router_rows: rows (E, D) of the routers, by number of layer; where there are none, nothing comes in the
                place of an expert that is missing.
            share: of a token's experts, those with the largest weights that it passes with.
        """
        self.missing: set[tuple[int, int]] = set()
        self._residency, self._rows, self._share = residency, router_rows, share

    def apply(self, layer: int, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return which experts tokens of a layer choose instead, and their weights."""
        rows_ED = self._rows.get(layer)
        scores_TE = None if rows_ED is None else hidden_TD.float() @ rows_ED.float().T
        ready_E = torch.from_numpy(np.ascontiguousarray(self._residency.ready(layer))).to(index_TK.device)
        if scores_TE is not None:
            ready_E = ready_E[: scores_TE.shape[1]]
        chosen = index_TK[index_TK < len(ready_E)]
        self.missing.update((layer, expert) for expert in chosen[~ready_E[chosen]].tolist())
        count = max(1, math.ceil(self._share * index_TK.shape[1]))
        return restricted(index_TK, weight_TK, ready_E, scores_TE, count=count)


def restricted(
    index_TK: Tensor, weight_TK: Tensor, ready_E: Tensor, scores_TE: Tensor | None, *, count: int
) -> tuple[Tensor, Tensor]:
    """Return which experts tokens pass with, of those in memory, and their weights; an index of E means none.

    Args:
        index_TK: experts that tokens chose; those of E or more are none.
        weight_TK: their weights.
        ready_E: which experts are in memory.
        scores_TE: what the router gives to each, before anything becomes a weight; None where that is not known.
        count: experts of a token at most, those with the largest weights.
    """
    num_experts = len(ready_E)
    wide_TK, sum_T1 = weight_TK.float(), weight_TK.float().sum(dim=-1, keepdim=True)
    is_there_TK = (index_TK < num_experts) & ready_E[index_TK.clamp(max=num_experts - 1)]
    index_TK = index_TK.masked_fill(index_TK > num_experts, num_experts)
    is_softmax = False
    if scores_TE is not None:
        chosen_TK = scores_TE.gather(1, index_TK.clamp(max=num_experts - 1))
        share_TK = scores_TE.softmax(dim=-1).gather(1, index_TK.clamp(max=num_experts - 1))
        is_softmax = bool(((share_TK - wide_TK).abs() <= _NEAR * share_TK + 1e-6).all())
        left_TE = scores_TE.masked_fill(~ready_E, -torch.inf)
        left_TE = torch.cat([left_TE, left_TE[:, :1]], dim=1).scatter(1, index_TK, -torch.inf)[:, :num_experts]
        best_TK, by_TK = left_TE.topk(min(index_TK.shape[1], num_experts), dim=-1)
        which_TK = ((~is_there_TK).cumsum(dim=-1) - 1).clamp(0, best_TK.shape[1] - 1)
        score_TK, other_TK = best_TK.gather(1, which_TK), by_TK.gather(1, which_TK)
        other_TK = other_TK.masked_fill(score_TK.isneginf(), num_experts)
        other_weight_TK = wide_TK * (score_TK - chosen_TK).clamp(max=0).exp()
        index_TK = torch.where(is_there_TK, index_TK, other_TK)
        wide_TK = torch.where(is_there_TK, wide_TK, other_weight_TK)
    else:
        index_TK = index_TK.masked_fill(~is_there_TK, num_experts)
    wide_TK = wide_TK.masked_fill(index_TK == num_experts, 0.0)
    if count < index_TK.shape[1]:
        least_T1 = wide_TK.topk(count, dim=-1).values[:, -1:]
        index_TK = index_TK.masked_fill(wide_TK < least_T1, num_experts)
        wide_TK = wide_TK.masked_fill(wide_TK < least_T1, 0.0)
    if not is_softmax or count < index_TK.shape[1]:
        wide_TK = wide_TK * (sum_T1 / wide_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20))
    return index_TK, wide_TK.to(weight_TK.dtype)
