import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.align import MATCHES, align, match_neurons, match_neurons_and_activations, permute_neurons
from coterie.compress.methods.average import average
from coterie.compress.methods.cluster import cluster
from coterie.compress.state import LayerState
from coterie.errors import UnknownName


def slow_match(state: LayerState, centre: int, member: int) -> tuple[float, tuple[int, ...]]:
    """The best of all F! orders of the member's neurons, by summed inner products."""
    experts = state.experts
    assert experts.gate_EFD is not None

    def total(order: tuple[int, ...]) -> float:
        value = 0.0
        for place, neuron in enumerate(order):
            for part in (experts.up_EFD, experts.gate_EFD):
                assert part is not None
                pairs = zip(part[centre, place].tolist(), part[member, neuron].tolist(), strict=True)
                value += sum(a * b for a, b in pairs)
            down = zip(
                experts.down_EDF[centre, :, place].tolist(), experts.down_EDF[member, :, neuron].tolist(), strict=True
            )
            value += sum(a * b for a, b in down)
        return value

    return max((total(order), order) for order in itertools.permutations(range(experts.width)))


def test_neurons_are_matched_like_the_best_of_all_orders(state: Callable[..., LayerState]) -> None:
    before = state(width=5, seed=8)
    for centre, member in ((0, 1), (3, 2)):
        assert tuple(match_neurons(before.experts, centre, member).tolist()) == slow_match(before, centre, member)[1]


def unit(values: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values] if length else values


def slow_ream_match(state: LayerState, centre: int, member: int) -> tuple[int, ...]:
    """The best of all F! orders, by summed distances of unit vectors: weights of a neuron, activations of a neuron."""
    experts = state.experts.map(torch.Tensor.double)
    x = state.sample.inputs_TD.double()

    def weights(expert: int, neuron: int) -> list[float]:
        rows = [part[expert, neuron] for part in (experts.gate_EFD, experts.up_EFD) if part is not None]
        return unit([value for row in (*rows, experts.down_EDF[expert, :, neuron]) for value in row.tolist()])

    def activations(expert: int, neuron: int) -> list[float]:
        return unit([float(experts.hidden(expert, x[t : t + 1])[0, neuron]) for t in range(len(x))])

    cost = [
        [math.dist(weights(centre, i), weights(member, j)) + math.dist(activations(centre, i), activations(member, j))
         for j in range(experts.width)]
        for i in range(experts.width)
    ]  # fmt: skip
    return min(
        itertools.permutations(range(experts.width)),
        key=lambda order: sum(cost[place][neuron] for place, neuron in enumerate(order)),
    )


@pytest.mark.parametrize(("gate", "biases"), [(True, False), (False, True)])
def test_ream_matches_weights_and_activations(state: Callable[..., LayerState], gate: bool, biases: bool) -> None:
    before = state(width=5, tokens=9, gate=gate, biases=biases, seed=8)
    dead = before.experts.up_EFD.clone()
    dead[1, 2] = 0  # without biases this neuron is never active
    before = replace(before, experts=replace(before.experts, up_EFD=dead))
    for centre, member in ((0, 1), (3, 2)):
        found = match_neurons_and_activations(before.experts, centre, member, before.sample.inputs_TD)
        assert tuple(found.tolist()) == slow_ream_match(before, centre, member)


def test_an_unknown_way_to_match_is_refused(state: Callable[..., LayerState]) -> None:
    with pytest.raises(UnknownName, match="did you mean weights"):
        align(cluster(state(), LayerPlan(num_experts=4), rule="m-smoe"), LayerPlan(num_experts=4), by="weight")


@settings(max_examples=20)
@given(seed=st.integers(0, 999), biases=st.booleans(), gate=st.booleans())
def test_permuting_neurons_does_not_change_what_an_expert_computes(
    state: Callable[..., LayerState], seed: int, biases: bool, gate: bool
) -> None:
    before = state(biases=biases, gate=gate, seed=seed, tokens=16)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(6, generator=generator) for _ in range(8)])
    permuted = permute_neurons(before.experts, order)
    x = before.sample.inputs_TD.double()
    for expert in range(8):
        mine = before.experts.map(torch.Tensor.double).output(expert, x)
        theirs = permuted.map(torch.Tensor.double).output(expert, x)
        torch.testing.assert_close(mine, theirs)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), biases=st.booleans(), by=st.sampled_from(MATCHES))
def test_averaging_aligned_copies_of_one_expert_gives_it_back(
    state: Callable[..., LayerState], seed: int, biases: bool, by: str
) -> None:
    """Experts that differ only in the order of their neurons merge without loss once they are aligned."""
    single = state(biases=biases, seed=seed, num_experts=4, tokens=16)
    first = single.experts.select(torch.zeros(4, dtype=torch.int64))
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(6, generator=generator) for _ in range(4)])
    shuffled = permute_neurons(first, order)
    before = replace(single, experts=shuffled, original=shuffled)
    size = LayerPlan(num_experts=2)
    after = average(align(cluster(before, size, rule="m-smoe"), size, by=by), size)
    x = before.sample.inputs_TD
    for expert in range(2):
        torch.testing.assert_close(after.experts.output(expert, x), first.output(0, x), atol=1e-4, rtol=1e-4)
