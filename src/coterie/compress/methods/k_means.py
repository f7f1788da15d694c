"""k-means on distances, and a Gaussian mixture that says how many clusters there are.

Only the distances between points are needed: the squared distance to the mean of a cluster is the mean squared distance
to its members less half their mean squared distance among each other.

Legend: E points (experts), C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

_STEPS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """A mixture of spherical Gaussians of one variance, fitted to points from a partition of them.

    Attributes:
        bic: Bayesian information criterion, lower is better.
        labels: the component that each point most probably comes from.
    """

    bic: float
    labels: Labels


def k_means(distance_EE: Array, count: int, *, seed: int, restarts: int = 8) -> Labels:
    """Partition points into exactly `count` clusters, none empty, so that the squared distances to the means are least.

    Starts are drawn by k-means++; the best of `restarts` counts. The draw does not depend on the order of the points.

    Returns:
        The cluster of each point, 0 to count - 1.
    """
    square_EE = np.square(distance_EE)
    order = np.argsort(square_EE.sum(1), kind="stable")
    sorted_EE = square_EE[np.ix_(order, order)]
    rng = np.random.default_rng(seed)
    best: tuple[float, Labels] | None = None
    for _ in range(restarts if 1 < count < len(order) else 1):
        labels = _improve(sorted_EE, _first_labels(sorted_EE, count, rng), count)
        loss = inertia(sorted_EE, labels)
        if best is None or loss < best[0] * (1 - 1e-12):
            best = loss, labels
    assert best is not None
    labels_E = np.empty(len(order), dtype=np.int64)
    labels_E[order] = best[1]
    return labels_E


def inertia(square_EE: Array, labels_E: Labels) -> float:
    """Return the sum of squared distances to the means, from the squared distances among the points."""
    member_EC = np.eye(labels_E.max() + 1)[labels_E]
    return float((square_EE @ member_EC * member_EC).sum(0) @ (0.5 / member_EC.sum(0).clip(min=1)))


def fit_mixture(distance_EE: Array, labels_E: Labels) -> Mixture:
    """Fit a mixture by expectation maximisation that starts from a partition.

    Its components are spherical with one common variance, in the space that the points span.
    """
    square_EE = np.square(distance_EE)
    num_points, count = len(square_EE), int(labels_E.max()) + 1
    rank = _rank(square_EE)
    share_EC = np.eye(count)[labels_E]
    floor = 1e-9 * square_EE.sum() / (2 * num_points**2 * rank)
    before = -np.inf
    for _ in range(_STEPS):
        weight_C = share_EC.sum(0).clip(min=1e-12)
        to_mean_EC = _square_to_means(square_EE, share_EC, weight_C)
        variance = max(float((share_EC * to_mean_EC).sum()) / (num_points * rank), floor, 1e-300)
        log_EC = np.log(weight_C / num_points) - rank / 2 * np.log(2 * np.pi * variance) - to_mean_EC / (2 * variance)
        top_E1 = log_EC.max(1, keepdims=True)
        total_E1 = top_E1 + np.log(np.exp(log_EC - top_E1).sum(1, keepdims=True))
        likelihood = float(total_E1.sum())
        share_EC = np.exp(log_EC - total_E1)
        if likelihood - before <= 1e-9 * abs(likelihood):
            break
        before = likelihood
    parameters = count * rank + count - 1 + 1
    return Mixture(bic=parameters * float(np.log(num_points)) - 2 * likelihood, labels=log_EC.argmax(1))


def found_count(distance_EE: Array, *, seed: int = 0) -> int:
    """Return how many clusters there are: the number whose k-means partition makes the best mixture.

    Numbers up to half the points are tried: with fewer than two members a cluster tells nothing about the variance, and
    the criterion falls whatever the points are. 1 says that the points do not cluster.
    """
    counts = range(1, max(1, len(distance_EE) // 2) + 1)
    scores = [fit_mixture(distance_EE, k_means(distance_EE, count, seed=seed, restarts=2)).bic for count in counts]
    return counts[int(np.argmin(scores))]


def agreement(labels_E: Labels, mixture: Mixture) -> float:
    """Return the share of points that the mixture assigns to the cluster that they are in."""
    return float((labels_E == mixture.labels).mean())


def _first_labels(square_EE: Array, count: int, rng: np.random.Generator) -> Labels:
    """Draw centres, each with a probability that grows with the squared distance to those before it."""
    num_points = len(square_EE)
    centres = [int(rng.integers(num_points))]
    while len(centres) < count:
        nearest_E = square_EE[:, centres].min(1)
        nearest_E[centres] = 0
        if nearest_E.sum() <= 0:  # only copies of the centres are left
            nearest_E = np.ones(num_points)
            nearest_E[centres] = 0
        centres.append(int(rng.choice(num_points, p=nearest_E / nearest_E.sum())))
    labels: Labels = square_EE[:, centres].argmin(1)
    labels[centres] = np.arange(count)
    return labels


def _improve(square_EE: Array, labels_E: Labels, count: int) -> Labels:
    """Assign to the nearest mean and move the means until nothing changes."""
    rows = np.arange(len(labels_E))
    for _ in range(_STEPS):
        member_EC = np.eye(count)[labels_E]
        to_mean_EC = _square_to_means(square_EE, member_EC, member_EC.sum(0))
        own_E = to_mean_EC[rows, labels_E]
        # A point stays where nothing is nearer by more than rounding.
        moved = np.where(to_mean_EC.min(1) < own_E * (1 - 1e-12), to_mean_EC.argmin(1), labels_E)
        for empty in set(range(count)) - set(moved.tolist()):
            alone = np.bincount(moved, minlength=count)[moved] == 1
            moved[np.where(alone, -1.0, own_E).argmax()] = empty
        if (moved == labels_E).all():
            break
        labels_E = moved
    return labels_E


def _square_to_means(square_EE: Array, share_EC: Array, weight_C: Array) -> Array:
    cross_EC = square_EE @ share_EC / weight_C
    within_C = (share_EC * cross_EC).sum(0) / weight_C
    distances: Array = (cross_EC - within_C / 2).clip(min=0)
    return distances


def _rank(square_EE: Array) -> int:
    """Return how many dimensions the points span."""
    centred = square_EE - square_EE.mean(0) - square_EE.mean(1, keepdims=True) + square_EE.mean()
    values = np.linalg.eigvalsh(-centred / 2)
    return max(1, int((values > 1e-9 * max(values.max(), 0)).sum())) if values.max() > 0 else 1
