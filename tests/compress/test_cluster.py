import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.compress.methods.cluster import cluster, pairwise_distance
from coterie.compress.state import LayerSize, LayerState
from coterie.errors import ArchitectureMismatch, UnknownName

RULES = ("m-smoe", "hc-smoe", "mergemoe")


def most_used(state: LayerState, count: int) -> list[int]:
    usage = state.statistics["usage"].tolist()
    return sorted(range(len(usage)), key=lambda expert: (-usage[expert], expert))[:count]


def slow_nearest(similarity: Callable[[int, int], float], centres: list[int], num_experts: int) -> list[int]:
    found = []
    for expert in range(num_experts):
        best = max(sorted(centres), key=lambda centre: similarity(expert, centre))
        found.append(expert if expert in centres else best)
    return found


def centre_of_each(after: LayerState) -> list[int]:
    assert after.clusters_E is not None
    assert after.centres_M is not None
    return after.centres_M[after.clusters_E].tolist()


def test_m_smoe_joins_by_cosine_of_the_columns_of_router_scores(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=9, tokens=40, seed=4)
    logits = before.sample.logits_TE
    assert logits is not None

    def cosine(a: int, b: int) -> float:
        x, y = logits[:, a].double().tolist(), logits[:, b].double().tolist()
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        return dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y))

    after = cluster(before, LayerSize(num_experts=4), rule="m-smoe")
    assert centre_of_each(after) == slow_nearest(cosine, most_used(before, 4), 9)


def test_mergemoe_joins_by_distance_of_up_and_gate_and_ignores_down(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=9, seed=5)
    assert before.experts.gate_EFD is not None

    def closeness(a: int, b: int) -> float:
        total = 0.0
        for part in (before.experts.up_EFD, before.experts.gate_EFD):
            assert part is not None
            for p, q in zip(part[a].flatten().tolist(), part[b].flatten().tolist(), strict=True):
                total += (p - q) ** 2
        return -total

    after = cluster(before, LayerSize(num_experts=4), rule="mergemoe")
    assert centre_of_each(after) == slow_nearest(closeness, most_used(before, 4), 9)
    other_down = replace(before, experts=replace(before.experts, down_EDF=before.experts.down_EDF.flip(0)))
    assert centre_of_each(cluster(other_down, LayerSize(num_experts=4), rule="mergemoe")) == centre_of_each(after)


def slow_average_linkage(points: list[list[float]], count: int) -> set[frozenset[int]]:
    """Agglomerate by the mean of all pairwise distances between two clusters, from the definition."""
    clusters = [frozenset([index]) for index in range(len(points))]
    while len(clusters) > count:
        pairs = [(a, b) for i, a in enumerate(clusters) for b in clusters[i + 1 :]]

        def mean_distance(pair: tuple[frozenset[int], frozenset[int]]) -> float:
            a, b = pair
            return sum(math.dist(points[i], points[j]) for i in a for j in b) / (len(a) * len(b))

        a, b = min(pairs, key=mean_distance)
        clusters = [entry for entry in clusters if entry not in (a, b)] + [a | b]
    return set(clusters)


def test_hc_smoe_cuts_an_average_linkage_tree_over_mean_outputs(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=9, seed=6)
    means = (before.statistics["mean_output"] / 64).tolist()
    after = cluster(before, LayerSize(num_experts=4), rule="hc-smoe")
    assert after.clusters_E is not None
    labels = after.clusters_E.tolist()
    found = {frozenset(e for e in range(9) if labels[e] == label) for label in set(labels)}
    assert found == slow_average_linkage(means, 4)


def test_hc_smoe_centres_are_the_most_used_members(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=9, seed=7)
    after = cluster(before, LayerSize(num_experts=3), rule="hc-smoe")
    assert after.clusters_E is not None
    assert after.centres_M is not None
    usage = before.statistics["usage"]
    for label, centre in enumerate(after.centres_M.tolist()):
        members = [e for e, found in enumerate(after.clusters_E.tolist()) if found == label]
        assert centre in members
        assert usage[centre] == max(usage[member] for member in members)


@settings(max_examples=25)
@given(rule=st.sampled_from(RULES), groups=st.sampled_from([1, 2, 4]), share=st.integers(1, 2), seed=st.integers(0, 99))
def test_clusters_partition_each_router_group_into_its_share(
    state: Callable[..., LayerState], rule: str, groups: int, share: int, seed: int
) -> None:
    before = state(num_experts=8, groups=groups, seed=seed, tokens=24)
    after = cluster(before, LayerSize(num_experts=groups * share), rule=rule)
    assert after.clusters_E is not None
    assert after.centres_M is not None
    assert sorted(set(after.clusters_E.tolist())) == list(range(groups * share))
    assert after.centres_M.tolist() == sorted(after.centres_M.tolist())
    assert after.clusters_E[after.centres_M].tolist() == list(range(groups * share))
    size = 8 // groups
    for expert, label in enumerate(after.clusters_E.tolist()):
        assert expert // size == int(after.centres_M[label]) // size


@pytest.mark.parametrize("rule", RULES)
def test_full_size_leaves_every_expert_alone(state: Callable[..., LayerState], rule: str) -> None:
    after = cluster(state(), LayerSize(num_experts=8), rule=rule)
    assert after.clusters_E is not None
    assert after.clusters_E.tolist() == list(range(8))


def test_m_smoe_refuses_a_model_without_router_scores(state: Callable[..., LayerState]) -> None:
    before = state()
    statistics = {name: value for name, value in before.statistics.items() if not name.startswith("logit")}
    with pytest.raises(ArchitectureMismatch, match="records no router scores"):
        cluster(replace(before, statistics=statistics), LayerSize(num_experts=4), rule="m-smoe")


def test_an_unknown_rule_names_the_nearest(state: Callable[..., LayerState]) -> None:
    with pytest.raises(UnknownName, match="did you mean hc-smoe"):
        cluster(state(), LayerSize(num_experts=4), rule="hc-smo")


def test_pairwise_distance_is_symmetric_with_zero_diagonal() -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    distance = pairwise_distance(rows)
    assert torch.equal(distance.diagonal(), torch.zeros(5).double())
    torch.testing.assert_close(distance, distance.T)
    torch.testing.assert_close(distance, torch.cdist(rows.double(), rows.double()))
