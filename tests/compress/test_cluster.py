import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.cluster import GROUP_SIZE, RULES, cluster
from coterie.compress.methods.cluster_features import FEATURES
from coterie.compress.state import LayerState
from coterie.errors import ArchitectureMismatch, UnknownName


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

    after = cluster(before, LayerPlan(num_experts=4), rule="m-smoe")
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

    after = cluster(before, LayerPlan(num_experts=4), rule="mergemoe")
    assert centre_of_each(after) == slow_nearest(closeness, most_used(before, 4), 9)
    other_down = replace(before, experts=replace(before.experts, down_EDF=before.experts.down_EDF.flip(0)))
    assert centre_of_each(cluster(other_down, LayerPlan(num_experts=4), rule="mergemoe")) == centre_of_each(after)


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
    after = cluster(before, LayerPlan(num_experts=4), rule="hc-smoe")
    assert after.clusters_E is not None
    labels = after.clusters_E.tolist()
    found = {frozenset(e for e in range(9) if labels[e] == label) for label in set(labels)}
    assert found == slow_average_linkage(means, 4)


def test_hc_smoe_centres_are_the_most_used_members(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=9, seed=7)
    after = cluster(before, LayerPlan(num_experts=3), rule="hc-smoe")
    assert after.clusters_E is not None
    assert after.centres_M is not None
    usage = before.statistics["usage"]
    for label, centre in enumerate(after.centres_M.tolist()):
        members = [e for e, found in enumerate(after.clusters_E.tolist()) if found == label]
        assert centre in members
        assert usage[centre] == max(usage[member] for member in members)


@settings(max_examples=50)
@given(
    rule=st.sampled_from(sorted(RULES)),
    groups=st.sampled_from([1, 2, 4]),
    share=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_clusters_partition_each_router_group_into_its_share(
    state: Callable[..., LayerState], rule: str, groups: int, share: int, seed: int
) -> None:
    before = state(num_experts=8, groups=groups, seed=seed, tokens=24)
    after = cluster(before, LayerPlan(num_experts=groups * share), rule=rule)
    assert after.clusters_E is not None
    assert after.centres_M is not None
    assert sorted(set(after.clusters_E.tolist())) == list(range(groups * share))
    assert after.centres_M.tolist() == sorted(after.centres_M.tolist())
    assert after.clusters_E[after.centres_M].tolist() == list(range(groups * share))
    size = 8 // groups
    for expert, label in enumerate(after.clusters_E.tolist()):
        assert expert // size == int(after.centres_M[label]) // size


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("features", [None, *FEATURES])
def test_full_size_leaves_every_expert_alone(state: Callable[..., LayerState], rule: str, features: str | None) -> None:
    after = cluster(state(tokens=16), LayerPlan(num_experts=8), rule=rule, features=features)
    assert after.clusters_E is not None
    assert after.clusters_E.tolist() == list(range(8))


def slow_ream(distance: list[list[float]], saliency: list[float], count: int, size: int) -> list[int]:
    """The centre of each expert: groups are filled one after the other, the most salient centre first."""
    order = sorted(range(len(saliency)), key=lambda expert: (-saliency[expert], expert))
    centres, free = order[:count], set(order[count:])
    centre_of = {centre: centre for centre in centres}
    for centre in centres:
        for _ in range(size):
            if free:
                nearest = min(sorted(free), key=lambda expert: distance[centre][expert])
                centre_of[nearest] = centre
                free.remove(nearest)
    return [centre_of[expert] for expert in range(len(saliency))]


def slow_dissimilarity(state: LayerState) -> list[list[float]]:
    """REAM's, from its definition: mean gated outputs over all tokens, columns of scores of unit length."""
    sample, count = state.sample, state.layer.num_experts
    assert sample.logits_TE is not None
    gated = torch.zeros(count, state.layer.hidden_size).double()
    for token in range(len(sample.inputs_TD)):
        exponents = [math.exp(score) for score in sample.logits_TE[token].double().tolist()]
        for expert in range(count):
            value = state.experts.output(expert, sample.inputs_TD[token : token + 1])[0].double()
            gated[expert] += exponents[expert] / sum(exponents) * value / len(sample.inputs_TD)
    columns = [(column / column.norm()).tolist() for column in sample.logits_TE.double().T]
    apart = [[math.dist(a, b) for b in columns] for a in columns]
    largest = max(max(row) for row in apart)
    alike = [[(float(a @ b / a.norm() / b.norm()) + 1) / 2 for b in gated] for a in gated]
    return [[1 - (alike[i][j] + 1 - apart[i][j] / largest) / 2 for j in range(count)] for i in range(count)]


@pytest.mark.parametrize("biases", [False, True])
def test_ream_fills_groups_from_the_most_salient_down(state: Callable[..., LayerState], biases: bool) -> None:
    before = state(num_experts=9, seed=5, biases=biases)
    saliency = (before.statistics["reap"] / before.statistics["usage"].clamp(min=1)).tolist()
    for count in (2, 4, 7):
        after = cluster(before, LayerPlan(num_experts=count), rule="ream")
        assert centre_of_each(after) == slow_ream(slow_dissimilarity(before), saliency, count, GROUP_SIZE)


def test_ream_groups_have_a_limit_unless_experts_would_be_left_over(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=40, seed=6, tokens=200)
    sizes = torch.tensor(centre_of_each(cluster(before, LayerPlan(num_experts=20), rule="ream"))).bincount()
    assert sorted(sizes[sizes > 0].tolist()) == [1] * 18 + [6, 16]
    sizes = torch.tensor(centre_of_each(cluster(before, LayerPlan(num_experts=2), rule="ream"))).bincount()
    assert sorted(sizes[sizes > 0].tolist()) == [20, 20]


def all_partitions(points: int, count: int) -> Iterator[list[int]]:
    """Every way to put points into exactly so many clusters, each once."""
    for labels in itertools.product(range(count), repeat=points):
        first = list(dict.fromkeys(labels))
        if first == sorted(first) and len(first) == count:
            yield list(labels)


def test_k_means_finds_the_best_of_all_partitions(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=7, seed=7)
    means = (before.statistics["mean_output"] / 64).tolist()

    def loss(labels: list[int]) -> float:
        total = 0.0
        for label in set(labels):
            members = [means[expert] for expert in range(7) if labels[expert] == label]
            centre = [sum(column) / len(members) for column in zip(*members, strict=True)]
            total += sum(math.dist(member, centre) ** 2 for member in members)
        return total

    after = cluster(before, LayerPlan(num_experts=3), rule="k-means")
    assert after.clusters_E is not None
    assert loss(after.clusters_E.tolist()) == pytest.approx(min(loss(each) for each in all_partitions(7, 3)))


def test_ppp_is_k_means_and_says_how_many_clusters_it_found(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=40, groups=2, seed=8)
    labels = torch.cat((torch.arange(20) % 2, 2 + torch.arange(20) % 3))
    centres = 3 * torch.eye(5).double()[labels]
    noise = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)).double()
    before = replace(before, statistics={**before.statistics, "mean_output": (centres + 0.2 * noise) * 64})
    size = LayerPlan(num_experts=6)
    after = cluster(before, size, rule="ppp")
    assert centre_of_each(after) == centre_of_each(cluster(before, size, rule="k-means"))
    assert after.notes["cluster"] == {"found_count": 5, "found_by_group": [2, 3], "agreement": 1.0}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_numbers_of_the_experts_do_not_matter(state: Callable[..., LayerState], rule: str) -> None:
    before = state(num_experts=9, seed=9)
    # Of two experts that were used equally often the first counts, so here there are none.
    usage = before.statistics["usage"] + torch.arange(9) / 10
    before = replace(before, statistics={**before.statistics, "usage": usage})
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    named = {
        name: value[order] if value.ndim == 1 else value[order][:, order] if len(value) == value.shape[-1] else value
        for name, value in before.statistics.items()
        if value.ndim
    }
    named["mean_output"] = before.statistics["mean_output"][order]
    logits = before.sample.logits_TE
    assert logits is not None
    shuffled = replace(
        before,
        experts=before.experts.select(order),
        statistics={**before.statistics, **named},
        sample=replace(before.sample, logits_TE=logits[:, order]),
    )
    size = LayerPlan(num_experts=4)
    first, second = (centre_of_each(cluster(each, size, rule=rule)) for each in (before, shuffled))
    assert [int(order[centre]) for centre in second] == [first[int(expert)] for expert in order]


@pytest.mark.parametrize("rule", ["m-smoe", "ream"])
def test_rules_that_compare_scores_refuse_a_model_without(state: Callable[..., LayerState], rule: str) -> None:
    before = state()
    statistics = {name: value for name, value in before.statistics.items() if not name.startswith("logit")}
    with pytest.raises(ArchitectureMismatch, match="records no router scores"):
        cluster(replace(before, statistics=statistics), LayerPlan(num_experts=4), rule=rule)


def test_an_unknown_rule_or_feature_names_the_nearest(state: Callable[..., LayerState]) -> None:
    with pytest.raises(UnknownName, match="did you mean hc-smoe"):
        cluster(state(), LayerPlan(num_experts=4), rule="hc-smo")
    with pytest.raises(UnknownName, match="did you mean outputs"):
        cluster(state(), LayerPlan(num_experts=4), rule="hc-smoe", features="output")
