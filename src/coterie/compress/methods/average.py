"""Replace each cluster of experts by its usage-weighted mean.

So do M-SMoE (2310.01334), HC-SMoE (2410.08589) and, before its re-fit, MergeMoE (2510.14436).

Legend: E experts of the original, M clusters, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from coterie.compress.state import LayerSize, LayerState


def needs() -> tuple[str, ...]:
    """The weights of the mean are the usages."""
    return ("usage",)


def average(state: LayerState, size: LayerSize) -> LayerState:
    """Average gate, up, down and biases within each cluster, weighted by usage (equally where nothing was used).

    A cluster of one keeps its expert's exact tensors.
    """
    assert state.clusters_E is not None, "average comes after cluster"
    share_ME = usage_shares(state.clusters_E, state.statistics["usage"])

    def merge(tensor_E: Tensor) -> Tensor:
        flat_EN = tensor_E.flatten(1)
        rows = []
        for share_E in share_ME:
            members = share_E.nonzero().flatten()
            if len(members) == 1:
                rows.append(flat_EN[members[0]])
            else:
                rows.append((share_E[members] @ flat_EN[members].double()).to(flat_EN.dtype))
        return torch.stack(rows).view(-1, *tensor_E.shape[1:])

    return replace(state, experts=state.experts.map(merge), expert_map_E=state.clusters_E.clone())


def usage_shares(clusters_E: Tensor, usage_E: Tensor) -> Tensor:
    """Return b_j = n_j / (sum of usages in the cluster) as (M, E) float64; rows sum to 1.

    A member that was never chosen next to members that were has no share; a cluster nobody chose is shared equally.
    """
    member_ME = torch.nn.functional.one_hot(clusters_E).T.double()
    weight_ME = member_ME * usage_E.double()
    total_M1 = weight_ME.sum(1, keepdim=True)
    equal_ME = member_ME / member_ME.sum(1, keepdim=True)
    return torch.where(total_M1 > 0, weight_ME / total_M1.clamp(min=1e-300), equal_ME)
