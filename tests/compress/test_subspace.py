from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.average import average
from coterie.compress.methods.cluster import cluster
from coterie.compress.methods.subspace import subspace
from coterie.compress.state import LayerState
from coterie.errors import InputError

SIZE = LayerPlan(num_experts=3)


def paper_matrix(state: LayerState, label: int, name: str, rank: int) -> torch.Tensor:
    """Sub-MoE as published: SVD of [W_1 S_1 ... W_n S_n], truncated, V_i S_i^-1 averaged by frequency; float64."""
    assert state.clusters_E is not None
    usage, experts = state.statistics["usage"].tolist(), state.experts.map(torch.Tensor.double)
    members = [expert for expert, found in enumerate(state.clusters_E.tolist()) if found == label]
    weighted, inverses, blocks = [], [], []
    for member in members:
        routed = [t for t in range(len(state.sample.index_TK)) if member in state.sample.index_TK[t].tolist()]
        inputs = [state.sample.inputs_TD[t : t + 1].double() for t in routed]
        if name == "down_EDF":
            inputs = [experts.hidden(member, x) for x in inputs]
        moment = sum(torch.outer(x[0], x[0]) for x in inputs)
        root = torch.linalg.cholesky(moment)
        weighted.append(experts.tensors()[name][member] @ root)
        inverses.append(torch.linalg.inv(root))
    u, s, vt = torch.linalg.svd(torch.cat(weighted, dim=1), full_matrices=False)
    start = 0
    for matrix, inverse in zip(weighted, inverses, strict=True):
        blocks.append(vt[:rank, start : start + matrix.shape[1]] @ inverse)
        start += matrix.shape[1]
    total = sum(usage[member] for member in members)
    merged = sum(usage[member] / total * block for member, block in zip(members, blocks, strict=True))
    return u[:, :rank] @ torch.diag(s[:rank]) @ merged


@pytest.mark.parametrize("biases", [False, True])
def test_projection_and_average_are_the_papers_formula(state: Callable[..., LayerState], biases: bool) -> None:
    before = cluster(state(tokens=300, biases=biases, seed=40), SIZE, rule="k-means")
    after = average(subspace(before, SIZE, ratio=0.2), SIZE)
    assert before.clusters_E is not None
    notes = after.notes["subspace"]
    assert isinstance(notes, dict)
    projected = 0
    for name, short in (("gate_EFD", "gate"), ("up_EFD", "up"), ("down_EDF", "down")):
        outputs, inputs = before.experts.tensors()[name].shape[1:]
        for label in range(3):
            rank = int(0.8 * outputs * inputs / (outputs + inputs))
            if int((before.clusters_E == label).sum()) == 1:
                assert notes["rank"][short][label] is None
                continue
            assert notes["rank"][short][label] == rank
            expected = paper_matrix(before, label, name, rank)
            torch.testing.assert_close(after.experts.tensors()[name][label].double(), expected, atol=1e-4, rtol=1e-4)
            projected += 1
    assert projected >= 3


def test_without_truncation_it_is_the_plain_average(state: Callable[..., LayerState]) -> None:
    before = cluster(state(tokens=200, biases=True, seed=41), SIZE, rule="hc-smoe")
    after = subspace(before, SIZE, energy=1.0)
    for name, tensor in before.experts.tensors().items():
        assert torch.equal(after.experts.tensors()[name], tensor)


@pytest.mark.parametrize("gate", [True, False])
def test_the_rank_holds_the_energy_and_no_smaller_one_does(state: Callable[..., LayerState], gate: bool) -> None:
    before = cluster(state(tokens=300, gate=gate, biases=True, seed=42), SIZE, rule="mergemoe")
    after = subspace(before, SIZE, energy=0.9)
    assert before.clusters_E is not None
    notes = after.notes["subspace"]
    assert isinstance(notes, dict)
    assert notes["rank"].keys() == ({"gate", "up", "down"} if gate else {"up", "down"})
    checked = 0
    for label, rank in enumerate(notes["rank"]["up"]):
        if rank is None:
            continue
        outputs = [
            before.experts.up_EFD[expert].double() @ before.sample.inputs_TD[token].double()
            for expert in range(8)
            for token in range(300)
            if before.clusters_E[expert] == label and expert in before.sample.index_TK[token]
        ]
        values = torch.linalg.svdvals(torch.stack(outputs)).square()
        assert float(values[:rank].sum() / values.sum()) >= 0.9
        assert float(values[: rank - 1].sum() / values.sum()) < 0.9
        checked += 1
    assert checked


def test_clusters_of_one_used_expert_stay_bit_identical(state: Callable[..., LayerState]) -> None:
    before = state(seed=43)
    usage = torch.tensor([5.0, 0, 0, 0, 7, 0, 0, 0]).double()
    before = replace(
        before,
        statistics={**before.statistics, "usage": usage},
        clusters_E=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        centres_M=torch.tensor([0, 4]),
    )
    after = subspace(before, LayerPlan(num_experts=2), energy=0.5)
    for name, tensor in before.experts.tensors().items():
        assert torch.equal(after.experts.tensors()[name], tensor)


def test_a_cluster_without_a_token_in_the_sample_stays(state: Callable[..., LayerState]) -> None:
    before = cluster(state(seed=44), LayerPlan(num_experts=1), rule="mergemoe")
    nobody = torch.full_like(before.sample.index_TK, 8)
    before = replace(before, sample=replace(before.sample, index_TK=nobody))
    after = subspace(before, LayerPlan(num_experts=1), energy=0.5)
    assert torch.equal(after.experts.up_EFD, before.experts.up_EFD)


@pytest.mark.parametrize(
    "options", [{}, {"energy": 0.9, "ratio": 0.1}, {"energy": 0.0}, {"energy": 1.1}, {"ratio": 1.0}, {"ratio": -0.1}]
)
def test_a_rank_that_cannot_be_chosen_is_refused(state: Callable[..., LayerState], options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"exactly one of energy and ratio|is not a share|out of range"):
        subspace(cluster(state(), SIZE, rule="mergemoe"), SIZE, **options)
