from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.average import average, usage_shares
from coterie.compress.methods.cluster import cluster
from coterie.compress.methods.refit_down import accumulate, refit_down, ridge_solution
from coterie.compress.state import LayerState
from coterie.errors import ArchitectureMismatch

SIZE = LayerPlan(num_experts=3)


def merged(state: LayerState) -> LayerState:
    return average(cluster(state, SIZE, rule="mergemoe"), SIZE)


def paper_down(state: LayerState, label: int, inputs: torch.Tensor) -> torch.Tensor:
    """MergeMoE as published: down* = [b_1 down_1 ... b_n down_n] (Q P^+) with stacked activations Q, in float64."""
    assert state.clusters_E is not None
    usage = state.statistics["usage"].tolist()
    members = [expert for expert, found in enumerate(state.clusters_E.tolist()) if found == label]
    total = sum(usage[member] for member in members)
    original = state.original.map(torch.Tensor.double)
    x = inputs.double()
    q_columns, weighted = [], []
    for member in members:
        share = usage[member] / total
        rows = [original.hidden(member, x[token : token + 1])[0] for token in range(len(x))]
        q_columns.append(torch.stack(rows, dim=1))
        weighted.append(share * original.down_EDF[member])
    experts = state.experts.map(torch.Tensor.double)
    p_FT = torch.stack([experts.hidden(label, x[token : token + 1])[0] for token in range(len(x))], dim=1)
    t1 = torch.cat(q_columns) @ torch.linalg.pinv(p_FT)
    return torch.cat(weighted, dim=1) @ t1


def test_without_ridge_the_gram_form_is_the_papers_formula(state: Callable[..., LayerState]) -> None:
    before = merged(state(tokens=80, seed=20))
    assert before.clusters_E is not None
    share_ME = usage_shares(before.clusters_E, before.statistics["usage"])
    inputs = before.sample.inputs_TD
    for label in range(3):
        gram = accumulate(before, label, share_ME[label], inputs)
        solved = ridge_solution(gram, before.experts.down_EDF[label].double(), ridge=1e-12)
        torch.testing.assert_close(solved, paper_down(before, label, inputs), atol=1e-4, rtol=1e-4)


def test_a_huge_ridge_keeps_the_average(state: Callable[..., LayerState]) -> None:
    before = merged(state(seed=21))
    assert before.clusters_E is not None
    share_ME = usage_shares(before.clusters_E, before.statistics["usage"])
    gram = accumulate(before, 0, share_ME[0], before.sample.inputs_TD)
    average_DF = before.experts.down_EDF[0].double()
    torch.testing.assert_close(ridge_solution(gram, average_DF, ridge=1e12), average_DF, atol=1e-8, rtol=1e-8)


def test_the_gram_error_is_the_error_token_by_token(state: Callable[..., LayerState]) -> None:
    before = merged(state(biases=True, seed=22))
    assert before.clusters_E is not None
    share_E = usage_shares(before.clusters_E, before.statistics["usage"])[1]
    inputs = before.sample.inputs_TD
    gram = accumulate(before, 1, share_E, inputs)
    down = before.experts.down_EDF[1].double()
    bias = before.experts.down_bias_ED
    assert bias is not None
    squared = target = 0.0
    for token in range(len(inputs)):
        x = inputs[token : token + 1]
        wanted = -bias[1].double()
        for expert in range(8):
            wanted = wanted + share_E[expert] * before.original.output(expert, x)[0].double()
        found = down @ before.experts.hidden(1, x)[0].double()
        squared += float((wanted - found).square().sum())
        target += float(wanted.square().sum())
    assert gram.error(down) == pytest.approx(squared / target, rel=1e-5)


def test_the_refit_wins_on_held_out_tokens_or_keeps_the_average(state: Callable[..., LayerState]) -> None:
    before = merged(state(tokens=400, seed=23))
    after = refit_down(before, SIZE)
    held_out = torch.arange(400) % 4 == 3
    assert before.clusters_E is not None
    share_ME = usage_shares(before.clusters_E, before.statistics["usage"])
    improved = 0
    for label in range(3):
        test = accumulate(before, label, share_ME[label], before.sample.inputs_TD[held_out])
        was = test.error(before.experts.down_EDF[label].double())
        now = test.error(after.experts.down_EDF[label].double())
        assert now <= was + 1e-6
        improved += now < was - 1e-3
    assert improved > 0
    notes = after.notes["refit-down"]
    assert isinstance(notes, dict)
    assert notes["heldout_error_refit"] < notes["heldout_error_average"]


def test_other_tokens_can_be_held_out(state: Callable[..., LayerState]) -> None:
    before = merged(state(tokens=400, seed=23))
    assert before.clusters_E is not None
    share_ME = usage_shares(before.clusters_E, before.statistics["usage"])
    inputs_TD = before.sample.inputs_TD[4::5]
    errors = [
        accumulate(before, label, share_ME[label], inputs_TD).error(before.experts.down_EDF[label].double())
        for label in range(3)
        if int((before.clusters_E == label).sum()) > 1
    ]
    notes = refit_down(before, SIZE, held_out=5).notes["refit-down"]
    assert isinstance(notes, dict)
    assert notes["heldout_error_average"] == pytest.approx(sum(errors) / len(errors), rel=1e-6)


def test_with_too_few_tokens_nothing_blows_up(state: Callable[..., LayerState]) -> None:
    """Near T = F the pseudo-inverse explodes; held-out tokens must keep the result near the average."""
    before = merged(state(width=16, tokens=20, seed=24))
    after = refit_down(before, SIZE)
    assert after.experts.down_EDF.abs().max() < 10 * before.experts.down_EDF.abs().max()


def test_a_cluster_of_one_keeps_its_exact_tensor(state: Callable[..., LayerState]) -> None:
    size = LayerPlan(num_experts=8)
    before = average(cluster(state(seed=25), size, rule="mergemoe"), size)
    assert torch.equal(refit_down(before, size).experts.down_EDF, before.experts.down_EDF)


def test_experts_with_a_norm_behind_them_are_refused(state: Callable[..., LayerState]) -> None:
    before = merged(state(seed=26))
    normed = replace(before, experts=replace(before.experts, finish=torch.nn.functional.normalize))
    with pytest.raises(ArchitectureMismatch, match="normalises the output"):
        refit_down(normed, SIZE)
