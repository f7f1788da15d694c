"""Prune: keep the experts with the highest score, drop the others and their router rows.

Scores: ``frequency`` is the number of tokens that chose the expert; ``reap`` (2510.13999) is the mean, over the tokens
that chose it, of routing weight times output norm.

Legend: E experts of the original, M kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from coterie.compress.state import LayerSize, LayerState
from coterie.errors import UnknownName

Score = Callable[[Mapping[str, Tensor]], Tensor]


def _frequency(statistics: Mapping[str, Tensor]) -> Tensor:
    return statistics["usage"]


def _reap(statistics: Mapping[str, Tensor]) -> Tensor:
    return statistics["reap"] / statistics["usage"].clamp(min=1)  # never chosen: 0 / 1


#: Score by name, and the statistics that it reads.
SCORES: dict[str, tuple[Score, tuple[str, ...]]] = {
    "frequency": (_frequency, ("usage",)),
    "reap": (_reap, ("reap", "usage")),
}


def needs(score: str) -> tuple[str, ...]:
    """Return the statistics that a score reads; raises UnknownName."""
    if score not in SCORES:
        raise UnknownName("score", score, SCORES)
    return SCORES[score][1]


def select(state: LayerState, size: LayerSize, *, score: str) -> LayerState:
    """Keep the `size.num_experts` experts with the highest score, in their original order.

    Ties go to the expert that comes first. With router groups, each group keeps its equal share.

    Raises:
        UnknownName: no such score.
    """
    needs(score)
    values_E = SCORES[score][0](state.statistics)
    kept_M = top_experts(values_E, size.num_experts, state.layer.num_groups)
    expert_map_E = torch.full_like(state.expert_map_E, -1)
    expert_map_E[kept_M] = torch.arange(len(kept_M))
    return replace(
        state,
        experts=state.experts.select(kept_M),
        router=slice_router(state, kept_M),
        expert_map_E=expert_map_E,
        centres_M=kept_M,
        notes={**state.notes, "select": {"score": [float(value) for value in values_E]}},
    )


def top_experts(values_E: Tensor, count: int, num_groups: int = 1) -> Tensor:
    """Return the numbers of the `count` highest values, ascending; an equal share from each group of experts."""
    grouped_GE = values_E.view(num_groups, -1)
    order_GE = grouped_GE.argsort(dim=1, descending=True, stable=True)[:, : count // num_groups]
    offset_G1 = torch.arange(num_groups)[:, None] * grouped_GE.shape[1]
    return (order_GE + offset_G1).flatten().sort().values


def slice_router(state: LayerState, rows_M: Tensor) -> dict[str, Tensor]:
    """Return the router's tensors with only these experts along each expert axis."""
    axes = dict(state.layer.router_tensors)
    sliced = {}
    for name, tensor in state.router.items():
        # Rows behind the experts' (for shared experts, or for "no expert") stay.
        spare = torch.arange(state.layer.num_experts, tensor.shape[axes[name]])
        sliced[name] = tensor.index_select(axes[name], torch.cat((rows_M, spare)))
    return sliced
