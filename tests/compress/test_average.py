from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.average import average, usage_shares
from coterie.compress.methods.cluster import cluster
from coterie.compress.methods.merge_router import merge_router
from coterie.compress.state import LayerState
from coterie.errors import UnknownName


def slow_average(tensor: torch.Tensor, members: list[int], usage: list[float]) -> torch.Tensor:
    total = sum(usage[member] for member in members)
    mean = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for member in members:
        share = usage[member] / total if total else 1 / len(members)
        mean += share * tensor[member].double()
    return mean


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("weights", ["usage", "equal", "reap"])
def test_a_cluster_becomes_its_weighted_mean(state: Callable[..., LayerState], biases: bool, weights: str) -> None:
    before = cluster(state(biases=biases, seed=9), LayerPlan(num_experts=3), rule="mergemoe")
    after = average(before, LayerPlan(num_experts=3), weights=weights)
    assert before.clusters_E is not None
    labels, usage = before.clusters_E.tolist(), before.statistics["usage"].tolist()
    if weights == "equal":
        usage = [1.0] * 8
    elif weights == "reap":
        usage = [total / max(1, count) for total, count in zip(before.statistics["reap"].tolist(), usage, strict=True)]
    assert after.experts.tensors().keys() == before.experts.tensors().keys()
    for name, tensor in before.experts.tensors().items():
        for label in range(3):
            members = [expert for expert in range(8) if labels[expert] == label]
            expected = slow_average(tensor, members, usage)
            torch.testing.assert_close(after.experts.tensors()[name][label].double(), expected, atol=1e-6, rtol=1e-5)
    assert after.expert_map_E.tolist() == labels


@given(
    labels=st.lists(st.integers(0, 2), min_size=6, max_size=6).filter(lambda x: set(x) == {0, 1, 2}),
    usage=st.lists(st.integers(0, 50), min_size=6, max_size=6),
)
def test_shares_sum_to_one_and_follow_usage(labels: list[int], usage: list[int]) -> None:
    shares = usage_shares(torch.tensor(labels), torch.tensor(usage).double())
    torch.testing.assert_close(shares.sum(1), torch.ones(3).double())
    for label in range(3):
        total = sum(count for count, found in zip(usage, labels, strict=True) if found == label)
        for expert, (count, found) in enumerate(zip(usage, labels, strict=True)):
            if found != label:
                assert shares[label, expert] == 0
            elif total:
                assert float(shares[label, expert]) == pytest.approx(count / total)
            else:
                assert float(shares[label, expert]) == pytest.approx(1 / labels.count(label))


def test_full_size_is_bit_identical(state: Callable[..., LayerState]) -> None:
    size = LayerPlan(num_experts=8)
    before = state(biases=True, seed=10)
    after = merge_router(average(cluster(before, size, rule="hc-smoe"), size), size)
    for name, tensor in before.experts.tensors().items():
        assert torch.equal(after.experts.tensors()[name], tensor)
    assert torch.equal(after.router["block.gate.weight"], before.router["block.gate.weight"])


def test_identical_experts_merge_without_change(state: Callable[..., LayerState]) -> None:
    twins = state(seed=11).experts.select(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    before = replace(state(experts=twins, seed=11), clusters_E=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    after = average(before, LayerPlan(num_experts=4))
    for name, tensor in after.experts.tensors().items():
        torch.testing.assert_close(tensor, twins.tensors()[name][::2], atol=1e-7, rtol=1e-6)


def test_unknown_weights_are_refused(state: Callable[..., LayerState]) -> None:
    size = LayerPlan(num_experts=3)
    with pytest.raises(UnknownName, match="did you mean usage"):
        average(cluster(state(), size, rule="mergemoe"), size, weights="usages")
