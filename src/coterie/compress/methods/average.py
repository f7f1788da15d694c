"""Replace each cluster of experts by its weighted mean.

M-SMoE (2310.01334), HC-SMoE (2410.08589) and, before its re-fit, MergeMoE (2510.14436) weight by usage, REAM
(2604.04356) by saliency.

Legend: E experts of the original, M clusters, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.state import LayerState
from coterie.errors import UnknownName

#: How long it takes, in times of running the token sample through all experts.
SAMPLE_RUNS = 0.1

#: What an expert can weigh, and the statistics that say so: nothing but itself, tokens that chose it, REAP's score.
WEIGHTS: dict[str, tuple[str, ...]] = {"equal": (), "usage": ("usage",), "reap": ("reap", "usage")}


def needs(weights: str = "usage") -> tuple[str, ...]:
    """Return the statistics that the weights of the mean are read from; raises UnknownName."""
    return tuple(sorted({"usage", *weight_needs(weights)}))


def weight_needs(weights: str) -> tuple[str, ...]:
    """Return the statistics that say what an expert weighs; raises UnknownName."""
    if weights not in WEIGHTS:
        raise UnknownName("weights of experts", weights, WEIGHTS)
    return WEIGHTS[weights]


def expert_weights(statistics: Mapping[str, Tensor], weights: str) -> Tensor:
    """Return what each expert weighs, (E,) float64: 1, its usage n_e, or its REAP score (0 where never chosen)."""
    weight_needs(weights)
    usage_E = statistics["usage"].double()
    if weights == "equal":
        return torch.ones_like(usage_E)
    return usage_E if weights == "usage" else statistics["reap"].double() / usage_E.clamp(min=1)


def average(state: LayerState, plan: LayerPlan, *, weights: str = "usage") -> LayerState:
    """Average gate, up, down and biases within each cluster (equally where all of its weights are 0).

    A cluster of one keeps its expert's exact tensors.

    Args:
        state: a layer with clusters.
        plan: not read: the clusters say how many experts come out.
        weights: one of `WEIGHTS`.

    Raises:
        UnknownName: no such weights.
    """
    assert state.clusters_E is not None, "average comes after cluster"
    share_ME = usage_shares(state.clusters_E, expert_weights(state.statistics, weights))
    experts = state.experts.map(lambda tensor_E: weighted_mean(tensor_E, share_ME))
    return replace(state, experts=experts, expert_map_E=state.clusters_E.clone())


def weighted_mean(tensor_E: Tensor, share_ME: Tensor) -> Tensor:
    """Return sums of the rows of a tensor (E, ...) times their shares, (M, ...); a share of 1 gives the very row."""
    flat_EN = tensor_E.flatten(1)
    rows = []
    for share_E in share_ME:
        members = share_E.nonzero().flatten()
        if len(members) == 1:
            rows.append(flat_EN[members[0]])
        else:
            rows.append((share_E[members] @ flat_EN[members].double()).to(flat_EN.dtype))
    return torch.stack(rows).view(-1, *tensor_E.shape[1:])


def usage_shares(clusters_E: Tensor, usage_E: Tensor) -> Tensor:
    """Return b_j = n_j / (sum of usages in the cluster) as (M, E) float64; rows sum to 1.

    A member that was never chosen next to members that were has no share; a cluster nobody chose is shared equally.
    """
    member_ME = torch.nn.functional.one_hot(clusters_E).T.double()
    weight_ME = member_ME * usage_E.double()
    total_M1 = weight_ME.sum(1, keepdim=True)
    equal_ME = member_ME / member_ME.sum(1, keepdim=True)
    return torch.where(total_M1 > 0, weight_ME / total_M1.clamp(min=1e-300), equal_ME)
