"""Decide which experts become one: rules that set ``clusters_E`` and ``centres_M`` and change no tensor.

A rule is a way to partition and the features that it compares (`coterie.compress.methods.cluster_features`):

- ``m-smoe`` (2310.01334) centres on the most used experts; the others join the nearest by router scores.
- ``mergemoe`` (2510.14436) does the same by up and gate weights.
- ``hc-smoe`` (2410.08589) cuts an average-linkage tree over the experts' mean outputs.
- ``k-means`` (in Sub-MoE, 2506.23266, and as a baseline of HC-SMoE) minimises squared distances to cluster means.
- ``ppp`` is k-means whose partition is validated by a Gaussian mixture, which also says how many clusters there are.
- ``ream`` (2604.04356) centres on the most salient experts; from the most salient down, each takes its nearest ones.

Legend: E experts of the original, M clusters, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods import cluster_features
from coterie.compress.methods.average import expert_weights, weight_needs
from coterie.compress.methods.k_means import agreement, fit_mixture, found_count, k_means
from coterie.compress.methods.select import top_experts
from coterie.compress.state import LayerState
from coterie.errors import UnknownName

#: Experts that a centre takes in beside itself, in REAM.
GROUP_SIZE = 15

#: (distances (E, E), importance (E,), number of clusters, seed) -> a label for each expert; all E of one router group.
Partition = Callable[[Tensor, Tensor, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to partition, the features that it compares by default, and what makes an expert a centre."""

    partition: Partition
    features: str
    importance: str = "usage"


def needs(rule: str, features: str | None = None) -> tuple[str, ...]:
    """Return the statistics that a rule reads; raises UnknownName."""
    chosen_rule = _rule(rule)
    return tuple(
        sorted(
            {*weight_needs(chosen_rule.importance), "usage", *cluster_features.needs(features or chosen_rule.features)}
        )
    )


def cluster(state: LayerState, plan: LayerPlan, *, rule: str, features: str | None = None) -> LayerState:
    """Partition the experts into `plan.num_experts` clusters; with router groups, within each group.

    Clusters that the plan names are taken as they are. Clusters are numbered in the order of their centres. The centre
    of a cluster is its most important expert: the most used, with ``ream`` the most salient.

    Args:
        state: a layer.
        plan: how many clusters.
        rule: one of `RULES`.
        features: what is compared in place of the rule's own features, see `cluster_features.distances`.

    Raises:
        UnknownName: no such rule or features.
        ArchitectureMismatch: router scores are compared and the model records none.
    """
    needs(rule, features)
    chosen_rule = _rule(rule)
    distance_EE = cluster_features.distances(state, features or chosen_rule.features)
    importance_E = expert_weights(state.statistics, chosen_rule.importance)
    if plan.experts is not None:
        return replace(state, **_planned(plan, importance_E))
    label_E = torch.empty(len(distance_EE), dtype=torch.int64)
    share = plan.num_experts // state.layer.num_groups
    groups = torch.arange(len(distance_EE)).chunk(state.layer.num_groups)
    for group, rows_N in enumerate(groups):
        within = distance_EE[rows_N][:, rows_N], importance_E[rows_N], share, state.seed
        label_E[rows_N] = group * share + chosen_rule.partition(*within)
    centres_M, clusters_E = _number_by_centre(label_E, importance_E)
    notes = dict(state.notes)
    if rule == "ppp":
        notes["cluster"] = _validated(distance_EE, label_E, groups, state.seed)
    return replace(state, clusters_E=clusters_E, centres_M=centres_M, notes=notes)


def _planned(plan: LayerPlan, importance_E: Tensor) -> dict[str, Any]:
    """Return centres and clusters as a plan has them."""
    assert plan.experts is not None
    label_E = torch.empty(len(importance_E), dtype=torch.int64)
    for number, expert in enumerate(plan.experts):
        label_E[list(expert.sources)] = number
    centres_M, clusters_E = _number_by_centre(label_E, importance_E)
    return {"centres_M": centres_M, "clusters_E": clusters_E}


def nearest_centre(distance_EE: Tensor, centres_M: Tensor) -> Tensor:
    """Return for each expert its nearest centre; a centre is nearest to itself."""
    distance_EM = distance_EE[:, centres_M].clone()
    distance_EM[centres_M, torch.arange(len(centres_M))] = -torch.inf
    return centres_M[distance_EM.argmin(dim=1)]


def _around_top_centres(distance_EE: Tensor, importance_E: Tensor, count: int, seed: int) -> Tensor:
    centres_M = top_experts(importance_E, count)
    return torch.searchsorted(centres_M, nearest_centre(distance_EE, centres_M))


def _by_tree(distance_EE: Tensor, importance_E: Tensor, count: int, seed: int) -> Tensor:
    if len(distance_EE) == 1:
        return torch.zeros(1, dtype=torch.int64)
    tree = linkage(squareform(distance_EE.numpy(), checks=False), method="average")
    return torch.from_numpy(cut_tree(tree, n_clusters=[count]).ravel().astype(np.int64))


def _by_k_means(distance_EE: Tensor, importance_E: Tensor, count: int, seed: int) -> Tensor:
    return torch.from_numpy(k_means(distance_EE.numpy(), count, seed=seed))


def _from_salient_down(distance_EE: Tensor, importance_E: Tensor, count: int, seed: int) -> Tensor:
    """From the most salient centre down, each takes its nearest experts that are free, `GROUP_SIZE` at most.

    Where that many would leave experts over, centres take as many more as are needed.
    """
    num_experts = len(distance_EE)
    limit = max(GROUP_SIZE, -(-(num_experts - count) // count))
    centres = importance_E.argsort(descending=True, stable=True)[:count].tolist()
    label_E = torch.full((num_experts,), -1, dtype=torch.int64)
    label_E[centres] = torch.arange(count)
    for label, centre in enumerate(centres):
        nearest = distance_EE[centre].argsort(stable=True)
        free = nearest[label_E[nearest] == -1]
        label_E[free[:limit]] = label
    return label_E


RULES: dict[str, Rule] = {
    "m-smoe": Rule(_around_top_centres, "router-scores"),
    "mergemoe": Rule(_around_top_centres, "weights"),
    "hc-smoe": Rule(_by_tree, "outputs"),
    "k-means": Rule(_by_k_means, "outputs"),
    "ppp": Rule(_by_k_means, "outputs"),
    "ream": Rule(_from_salient_down, "ream", "reap"),
}


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise UnknownName("clustering rule", name, RULES)
    return RULES[name]


def _validated(distance_EE: Tensor, label_E: Tensor, groups: tuple[Tensor, ...], seed: int) -> dict[str, object]:
    """Say how many clusters there are, and what share of the experts a mixture puts where k-means did."""
    counts, agreed = [], 0.0
    for rows_N in groups:
        distances = distance_EE[rows_N][:, rows_N].numpy()
        labels = label_E[rows_N].numpy() - int(label_E[rows_N].min())
        counts.append(found_count(distances, seed=seed))
        agreed += agreement(labels, fit_mixture(distances, labels)) / len(groups)
    return {"found_count": sum(counts), "found_by_group": counts, "agreement": agreed}


def _number_by_centre(label_E: Tensor, importance_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return centres in ascending order, and for each expert the position of its cluster's centre."""
    centre_of = {}
    for label in sorted(set(label_E.tolist())):
        members = (label_E == label).nonzero().flatten()
        centre_of[label] = int(members[importance_E[members].argmax()])
    centres = sorted(centre_of.values())
    clusters_E = torch.tensor([centres.index(centre_of[label]) for label in label_E.tolist()])
    return torch.tensor(centres), clusters_E
