"""Decide which experts become one: rules that set ``clusters_E`` and ``centres_M`` and change no tensor.

Rules by paper: ``m-smoe`` (2310.01334) centres on the most used experts and joins the others by cosine of the columns
of the router scores; ``mergemoe`` (2510.14436) centres on the most used experts and joins the others by distance of the
concatenated up and gate weights; ``hc-smoe`` (2410.08589) cuts an average-linkage tree over the experts' mean outputs.

Legend: E experts of the original, M clusters, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from coterie.compress.methods.select import top_experts
from coterie.compress.state import LayerSize, LayerState
from coterie.errors import ArchitectureMismatch, UnknownName

NEEDS = {
    "m-smoe": ("usage", "logit_product"),
    "mergemoe": ("usage",),
    "hc-smoe": ("usage", "mean_output", "tokens"),
}


def needs(rule: str) -> tuple[str, ...]:
    """Return the statistics that a rule reads; raises UnknownName."""
    if rule not in NEEDS:
        raise UnknownName("clustering rule", rule, NEEDS)
    return NEEDS[rule]


def cluster(state: LayerState, size: LayerSize, *, rule: str) -> LayerState:
    """Partition the experts into `size.num_experts` clusters; with router groups, within each group.

    Clusters are numbered in the order of their centres. The centre of a cluster is its most used expert.

    Raises:
        UnknownName: no such rule.
        ArchitectureMismatch: ``m-smoe`` on a model that records no router scores.
    """
    needs(rule)
    if rule == "m-smoe" and "logit_product" not in state.statistics:
        raise ArchitectureMismatch(
            f"{state.layer.block}: the model records no router scores, which m-smoe compares; use hc-smoe or mergemoe"
        )
    label_E = _RULES[rule](state, size.num_experts)
    centres_M, clusters_E = _number_by_centre(label_E, state.statistics["usage"])
    return replace(state, clusters_E=clusters_E, centres_M=centres_M)


def nearest_centre(distance_EE: Tensor, centres_M: Tensor, num_groups: int) -> Tensor:
    """Return for each expert its nearest centre within its own router group; a centre is nearest to itself."""
    num_experts = len(distance_EE)
    group_E = torch.arange(num_experts) // (num_experts // num_groups)
    distance_EM = distance_EE[:, centres_M].clone()
    distance_EM[group_E[:, None] != group_E[centres_M][None, :]] = torch.inf
    distance_EM[centres_M, torch.arange(len(centres_M))] = -torch.inf
    return centres_M[distance_EM.argmin(dim=1)]


def _by_router_scores(state: LayerState, count: int) -> Tensor:
    product_EE = state.statistics["logit_product"]
    norm_E = product_EE.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    cosine_EE = product_EE / norm_E[:, None] / norm_E[None, :]
    centres_M = top_experts(state.statistics["usage"], count, state.layer.num_groups)
    return nearest_centre(-cosine_EE, centres_M, state.layer.num_groups)


def _by_weights(state: LayerState, count: int) -> Tensor:
    parts = [part for part in (state.experts.up_EFD, state.experts.gate_EFD) if part is not None]
    flat_EN = torch.cat([part.flatten(1) for part in parts], dim=1)
    distance_EE = pairwise_distance(flat_EN)
    centres_M = top_experts(state.statistics["usage"], count, state.layer.num_groups)
    return nearest_centre(distance_EE, centres_M, state.layer.num_groups)


def _by_output_tree(state: LayerState, count: int) -> Tensor:
    mean_ED = (state.statistics["mean_output"] / state.statistics["tokens"]).numpy()
    num_groups = state.layer.num_groups
    label_E = np.empty(len(mean_ED), dtype=np.int64)
    for group, rows in enumerate(np.split(np.arange(len(mean_ED)), num_groups)):
        share = count // num_groups
        if len(rows) == 1:
            label_E[rows] = group * share
            continue
        tree = linkage(mean_ED[rows], method="average", metric="euclidean")
        label_E[rows] = group * share + cut_tree(tree, n_clusters=[share]).ravel()
    return torch.from_numpy(label_E)


_RULES: dict[str, Callable[[LayerState, int], Tensor]] = {
    "m-smoe": _by_router_scores,
    "mergemoe": _by_weights,
    "hc-smoe": _by_output_tree,
}


def pairwise_distance(rows_EN: Tensor) -> Tensor:
    """Return the Euclidean distances between rows, (E, E) float64, without holding E x E x N values."""
    rows = rows_EN.double()
    return torch.stack([(rows - row).square().sum(1).sqrt() for row in rows])


def _number_by_centre(label_E: Tensor, usage_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return centres in ascending order, and for each expert the position of its cluster's centre."""
    centre_of = {}
    for label in sorted(set(label_E.tolist())):
        members = (label_E == label).nonzero().flatten()
        centre_of[label] = int(members[usage_E[members].argmax()])
    centres = sorted(centre_of.values())
    clusters_E = torch.tensor([centres.index(centre_of[label]) for label in label_E.tolist()])
    return torch.tensor(centres), clusters_E
