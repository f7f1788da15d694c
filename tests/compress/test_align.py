import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.compress.methods.align import align, match_neurons, permute_neurons
from coterie.compress.methods.average import average
from coterie.compress.methods.cluster import cluster
from coterie.compress.state import LayerSize, LayerState


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
@given(seed=st.integers(0, 999), biases=st.booleans())
def test_averaging_aligned_copies_of_one_expert_gives_it_back(
    state: Callable[..., LayerState], seed: int, biases: bool
) -> None:
    """Experts that differ only in the order of their neurons merge without loss once they are aligned."""
    single = state(biases=biases, seed=seed, num_experts=4, tokens=16)
    first = single.experts.select(torch.zeros(4, dtype=torch.int64))
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(6, generator=generator) for _ in range(4)])
    shuffled = permute_neurons(first, order)
    before = replace(single, experts=shuffled, original=shuffled)
    size = LayerSize(num_experts=2)
    after = average(align(cluster(before, size, rule="m-smoe"), size), size)
    x = before.sample.inputs_TD
    for expert in range(2):
        torch.testing.assert_close(after.experts.output(expert, x), first.output(0, x), atol=1e-4, rtol=1e-4)
