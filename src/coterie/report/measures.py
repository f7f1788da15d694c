"""What a profile says about the experts, as plain arrays for the plots.

Legend: L layers, E experts, D model width, G domains. Arrays are numpy float64; layers may differ in E, so what has an
expert axis is a list with one array a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from coterie.profile.profile import Profile

Array = NDArray[np.float64]

_ORDERING_LIMIT = 256  # experts; optimal leaf ordering is cubic


def usage_counts(profile: Profile) -> list[Array]:
    """Return n_ge for every layer: how often domain g chose expert e, as (G, E)."""
    return [_numpy(profile, layer, "usage") for layer in range(len(profile.layers))]


def shares(counts_GE: Array) -> Array:
    """Return p(e|g), the share of a domain's routed tokens that each expert gets, as (G, E); zero if it has none."""
    return _divide(counts_GE, counts_GE.sum(axis=-1, keepdims=True))


def even_share(counts_GE: Array) -> Array:
    """Return the share of routed tokens of each expert when every domain counts the same, as (E,)."""
    used = counts_GE[counts_GE.sum(axis=1) > 0]
    return shares(used).mean(axis=0) if len(used) else np.zeros(counts_GE.shape[1])


def normalised_entropy(share_E: Array) -> float:
    """Return the entropy of a distribution over E experts divided by log E: 1 = even, 0 = one expert only."""
    if len(share_E) < 2:
        return 0.0
    return _entropy(share_E) / float(np.log2(len(share_E)))


def mutual_information(counts_GE: Array) -> float:
    """Return the mutual information of expert and domain in bits, every domain counting the same.

    It equals the Jensen-Shannon divergence of the domains' expert shares: 0 when all domains choose alike, log2 G when
    no two domains share an expert.
    """
    used = counts_GE[counts_GE.sum(axis=1) > 0]
    if len(used) < 2:
        return 0.0
    share_GE = shares(used)
    within = float(np.mean([_entropy(share_E) for share_E in share_GE]))
    return max(0.0, _entropy(share_GE.mean(axis=0)) - within)


def chance_information(counts_GE: Array) -> float:
    """Return the mutual information in bits that finite counts alone would show (Miller and Madow's first term)."""
    domains = int((counts_GE.sum(axis=1) > 0).sum())
    experts = int((counts_GE.sum(axis=0) > 0).sum())
    total = float(counts_GE.sum())
    if total == 0 or domains < 2 or experts < 2:
        return 0.0
    return (domains - 1) * (experts - 1) / (2 * total * float(np.log(2)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Specialist:
    """One expert and the domain that it serves most, every domain counting the same.

    Attributes:
        layer: position among the MoE layers.
        expert: which expert.
        domain: index of its main domain.
        domain_share: share of the expert's tokens that come from that domain.
        lift: how many times more often that domain chooses it than the average domain does.
        share: share of all routed tokens that the expert gets.
    """

    layer: int
    expert: int
    domain: int
    domain_share: float
    lift: float
    share: float


def specialists(counts: Sequence[Array], limit: int) -> list[Specialist]:
    """Return the experts that carry most of the information about the domain, at most `limit` of them.

    Ranked by an expert's own term of the mutual information, so a rarely used expert does not win by chance.
    """
    ranked: list[tuple[float, Specialist]] = []
    for layer, counts_GE in enumerate(counts):
        share_GE = shares(counts_GE)
        average_E = share_GE.mean(axis=0)
        ratio_GE = _divide(share_GE, average_E[None, :])
        with np.errstate(divide="ignore", invalid="ignore"):
            terms_GE = np.where(share_GE > 0, share_GE * np.log2(ratio_GE), 0.0)
        information_E = terms_GE.mean(axis=0)
        for expert in range(counts_GE.shape[1]):
            domain = int(share_GE[:, expert].argmax())
            lift = float(ratio_GE[domain, expert])
            specialist = Specialist(
                layer=layer,
                expert=expert,
                domain=domain,
                domain_share=lift / len(share_GE),
                lift=lift,
                share=float(average_E[expert]),
            )
            ranked.append((float(information_E[expert]), specialist))
    ranked.sort(key=lambda entry: (-entry[0], entry[1].layer, entry[1].expert))
    return [specialist for information, specialist in ranked[:limit] if information > 0]


def output_cosine(profile: Profile, layer: int) -> Array:
    """Return the cosine between the experts' mean outputs over all tokens, as (E, E); zero without output."""
    mean_ED = _numpy(profile, layer, "mean_output").sum(axis=0)
    unit_ED = _divide(mean_ED, np.linalg.norm(mean_ED, axis=1, keepdims=True))
    return np.clip(unit_ED @ unit_ED.T, -1.0, 1.0)


def logit_correlation(profile: Profile, layer: int) -> Array:
    """Return Pearson's correlation between the experts' router scores over all tokens, as (E, E); zero if constant."""
    tokens = float(_numpy(profile, layer, "tokens").sum())
    mean_E = _numpy(profile, layer, "logit_sum").sum(axis=0) / max(tokens, 1.0)
    covariance_EE = _numpy(profile, layer, "logit_product").sum(axis=0) / max(tokens, 1.0) - np.outer(mean_E, mean_E)
    deviation_E = np.sqrt(np.clip(np.diag(covariance_EE), 0.0, None))
    return np.clip(_divide(covariance_EE, np.outer(deviation_E, deviation_E)), -1.0, 1.0)


def cluster_order(similarity_EE: Array) -> NDArray[np.intp]:
    """Return an order of the experts that puts alike ones side by side (average linkage on 1 - similarity), as (E,)."""
    count = len(similarity_EE)
    if count < 3:
        return np.arange(count)
    distance_EE = np.clip(1.0 - (similarity_EE + similarity_EE.T) / 2, 0.0, None)
    np.fill_diagonal(distance_EE, 0.0)
    condensed = squareform(distance_EE, checks=False)
    tree = linkage(condensed, method="average")
    if count <= _ORDERING_LIMIT:
        tree = optimal_leaf_ordering(tree, condensed)
    return np.asarray(leaves_list(tree), dtype=np.intp)


def closest_pair(similarity_EE: Array) -> tuple[int, int, float]:
    """Return the two experts that are most alike and their similarity; needs two experts."""
    upper = np.triu_indices(len(similarity_EE), k=1)
    best = int(similarity_EE[upper].argmax())
    return int(upper[0][best]), int(upper[1][best]), float(similarity_EE[upper][best])


def _numpy(profile: Profile, layer: int, name: str) -> Array:
    return np.asarray(profile.by_domain(layer, name).numpy(), dtype=np.float64)


def _divide(a: Array, b: Array) -> Array:
    """Divide, with zero where the divisor is zero."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.zeros(a.shape), where=b != 0)


def _entropy(share_E: Array) -> float:
    """Entropy in bits."""
    positive = share_E[share_E > 0]
    return float(-(positive * np.log2(positive)).sum())
