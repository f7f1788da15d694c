import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from coterie.compress.methods.cluster_features import FEATURES, distances, gated_outputs, needs, pairwise_distance
from coterie.compress.state import LayerState
from coterie.errors import ArchitectureMismatch, UnknownName


def slow_distances(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([[math.dist(a, b) for b in rows] for a in rows], dtype=torch.float64)


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


def output(state: LayerState, expert: int, token: int) -> torch.Tensor:
    experts = state.experts.map(torch.Tensor.double)
    return experts.output(expert, state.sample.inputs_TD[token : token + 1].double())[0]


def slow_gated(state: LayerState, expert: int) -> list[float]:
    logits = state.sample.logits_TE
    assert logits is not None
    total = torch.zeros(state.layer.hidden_size).double()
    for token in range(len(logits)):
        exponents = [math.exp(score) for score in logits[token].double().tolist()]
        total += exponents[expert] / sum(exponents) * output(state, expert, token)
    return (total / len(logits)).tolist()


def slow_rows(state: LayerState, features: str) -> list[list[float]]:
    """The vector of each expert that is compared, from its definition."""
    experts, logits = state.experts, state.sample.logits_TE
    count, tokens = state.layer.num_experts, len(state.sample.inputs_TD)
    assert logits is not None
    if features == "weights":
        parts = [part for part in (experts.up_EFD, experts.gate_EFD) if part is not None]
        return [[value for part in parts for value in part[e].double().flatten().tolist()] for e in range(count)]
    if features == "router-scores":
        return [unit(logits[:, e].double().tolist()) for e in range(count)]
    if features == "outputs":
        return [(sum(output(state, e, t) for t in range(tokens)) / tokens).tolist() for e in range(count)]
    if features == "gated-outputs":
        return [unit(slow_gated(state, e)) for e in range(count)]
    scale = math.sqrt(tokens)
    each = [[unit(output(state, e, t).tolist()) for t in range(tokens)] for e in range(count)]
    return [[value / scale for token in rows for value in token] for rows in each]


@pytest.mark.parametrize("features", sorted(set(FEATURES) - {"ream"}))
@pytest.mark.parametrize(("gate", "biases"), [(True, False), (False, True), (True, True)])
def test_distances_are_those_of_the_vectors_by_definition(
    state: Callable[..., LayerState], features: str, gate: bool, biases: bool
) -> None:
    before = state(num_experts=5, tokens=12, gate=gate, biases=biases, seed=30)
    found = distances(before, features)
    torch.testing.assert_close(found, slow_distances(slow_rows(before, features)), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("features", sorted(FEATURES))
def test_experts_that_compute_the_same_are_at_distance_zero(state: Callable[..., LayerState], features: str) -> None:
    twins = state(seed=31).experts.select(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    before = state(experts=twins, seed=31)
    logits = before.sample.logits_TE
    assert logits is not None
    logits = torch.cat((logits[:, :4], logits[:, :4]), dim=1)
    product = logits.double().T @ logits.double()
    sample = replace(before.sample, logits_TE=logits)
    before = replace(before, sample=sample, statistics={**before.statistics, "logit_product": product})
    found = distances(before, features)
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.zeros(8).double())
    assert found[torch.arange(4), torch.arange(4) + 4].max() < 1e-6
    assert found[0, 1] > 1e-2


def test_an_output_norm_of_the_family_is_part_of_outputs(state: Callable[..., LayerState]) -> None:
    plain = state(num_experts=4, tokens=10, biases=True, seed=32)
    normed = replace(plain, experts=replace(plain.experts, finish=lambda x: torch.nn.functional.normalize(x, dim=-1)))
    torch.testing.assert_close(
        gated_outputs(normed), torch.tensor([slow_gated(normed, e) for e in range(4)]).double(), atol=1e-6, rtol=1e-6
    )
    assert not torch.allclose(gated_outputs(normed), gated_outputs(plain), atol=1e-3)


def test_an_expert_that_puts_out_nothing_is_at_a_distance_from_all(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=4, tokens=10, seed=33)
    silent = before.experts.down_EDF.clone()
    silent[2] = 0
    before = replace(before, experts=replace(before.experts, down_EDF=silent))
    for features in ("token-outputs", "gated-outputs"):
        torch.testing.assert_close(distances(before, features)[2, [0, 1, 3]], torch.ones(3).double())


def test_scores_are_needed_where_they_are_compared(state: Callable[..., LayerState]) -> None:
    before = state()
    without = replace(before, sample=replace(before.sample, logits_TE=None))
    assert needs("ream") == ("logit_product",)
    for features in ("ream", "gated-outputs"):
        with pytest.raises(ArchitectureMismatch, match="records no router scores, which"):
            distances(without, features)
    with pytest.raises(UnknownName, match="did you mean weights"):
        distances(before, "weight")


def test_pairwise_distance_is_symmetric_with_zero_diagonal() -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    distance = pairwise_distance(rows)
    assert torch.equal(distance.diagonal(), torch.zeros(5).double())
    torch.testing.assert_close(distance, distance.T)
    torch.testing.assert_close(distance, torch.cdist(rows.double(), rows.double()))
