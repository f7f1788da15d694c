import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from coterie.compress.methods.k_means import agreement, fit_mixture, found_count, inertia, k_means


def points(count: int, *, seed: int, clusters: int = 1, spread: float = 4.0, depth: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = spread * rng.normal(size=(clusters, depth))
    return centres[np.arange(count) % clusters] + rng.normal(size=(count, depth))


def slow_inertia(rows: np.ndarray, labels: list[int]) -> float:
    total = 0.0
    for label in set(labels):
        members = [rows[index].tolist() for index in range(len(rows)) if labels[index] == label]
        centre = [sum(column) / len(members) for column in zip(*members, strict=True)]
        total += sum(math.dist(member, centre) ** 2 for member in members)
    return total


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_loss_is_that_of_the_best_partition(count: int) -> None:
    rows = points(7, seed=count)
    found = k_means(cdist(rows, rows), count, seed=0).tolist()
    best = min(
        slow_inertia(rows, list(labels))
        for labels in itertools.product(range(count), repeat=7)
        if len(set(labels)) == count
    )
    assert slow_inertia(rows, found) == pytest.approx(best)


@settings(max_examples=30)
@given(size=st.integers(1, 12), count=st.integers(1, 12), copies=st.booleans(), seed=st.integers(0, 99))
def test_there_are_exactly_so_many_clusters_and_none_is_empty(size: int, count: int, copies: bool, seed: int) -> None:
    rows = points(size, seed=seed)
    if copies:  # also where fewer points differ than there are to be clusters
        rows = rows[np.arange(size) // 3]
    count = min(count, size)
    labels = k_means(cdist(rows, rows), count, seed=seed)
    assert sorted(set(labels.tolist())) == list(range(count))
    assert inertia(np.square(cdist(rows, rows)), labels) == pytest.approx(slow_inertia(rows, labels.tolist()))


def test_the_same_seed_gives_the_same_and_the_order_of_points_does_not_matter() -> None:
    rows = points(30, seed=3)
    order = np.random.default_rng(1).permutation(30)
    first = k_means(cdist(rows, rows), 6, seed=5)
    assert (first == k_means(cdist(rows, rows), 6, seed=5)).all()
    second = k_means(cdist(rows[order], rows[order]), 6, seed=5)
    assert (first[order] == second).all()


def slow_mixture(rows: np.ndarray, labels: list[int], steps: int) -> tuple[float, list[int]]:
    """Spherical Gaussians of one variance by expectation maximisation, from the definition."""
    size, depth, count = len(rows), rows.shape[1], max(labels) + 1
    share = [[1.0 if labels[i] == c else 0.0 for c in range(count)] for i in range(size)]
    for _ in range(steps):
        weight = [sum(share[i][c] for i in range(size)) for c in range(count)]
        means = [sum(share[i][c] * rows[i] for i in range(size)) / weight[c] for c in range(count)]
        square = [[math.dist(rows[i], means[c]) ** 2 for c in range(count)] for i in range(size)]
        variance = sum(share[i][c] * square[i][c] for i in range(size) for c in range(count)) / (size * depth)
        density = [
            [
                weight[c] / size * (2 * math.pi * variance) ** (-depth / 2) * math.exp(-square[i][c] / 2 / variance)
                for c in range(count)
            ]
            for i in range(size)
        ]
        likelihood = sum(math.log(sum(row)) for row in density)
        share = [[value / sum(row) for value in row] for row in density]
    parameters = count * depth + (count - 1) + 1
    return parameters * math.log(size) - 2 * likelihood, [int(np.argmax(row)) for row in density]


def test_the_mixture_is_that_of_the_definition() -> None:
    rows = points(20, seed=6, clusters=2, spread=1.0, depth=3)
    labels = k_means(cdist(rows, rows), 3, seed=0)
    found = fit_mixture(cdist(rows, rows), labels)
    bic, nearest = slow_mixture(rows, labels.tolist(), steps=100)
    assert found.bic == pytest.approx(bic, abs=1e-3)
    assert found.labels.tolist() == nearest
    assert agreement(labels, found) == sum(a == b for a, b in zip(labels, nearest, strict=True)) / 20


@pytest.mark.parametrize(("size", "clusters"), [(16, 4), (32, 5), (40, 1)])
def test_the_number_of_clusters_is_found(size: int, clusters: int) -> None:
    rows = points(size, seed=7, clusters=clusters, depth=20)
    assert found_count(cdist(rows, rows)) == clusters


def test_copies_of_one_point_are_one_cluster_and_one_point_too() -> None:
    assert found_count(np.zeros((8, 8))) == 1
    assert found_count(np.zeros((1, 1))) == 1
