"""Slimming against slow loops, and its invariants."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan, ragged_plan
from coterie.compress.methods import needs_of
from coterie.compress.methods.slim import heapr_scores, slim
from coterie.compress.state import LayerState
from coterie.errors import Infeasible, UnknownName
from coterie.model.arch.experts import Experts
from coterie.profile.statistics import needs_gradients

from .conftest import make_state

SCORES = ("activation", "heapr")
EXPERTS, WIDTH, HIDDEN = 8, 6, 5


def measured(state: LayerState, seed: int = 0) -> tuple[LayerState, Tensor, Tensor]:
    """Add the statistics of the neurons; also return the hidden values and the gradients that they come from.

    Returns:
        The state, h_TEF (0 where not chosen) and the gradient with respect to each expert's output, u_TED, all float64.
    """
    sample, experts = state.sample, state.original
    gradient_TD = torch.randn(sample.output_TD.shape, generator=torch.Generator().manual_seed(seed)).double()
    tokens, count, width = len(gradient_TD), experts.num_experts, experts.width
    h_TEF = torch.zeros(tokens, count, width).double()
    u_TED = torch.zeros(tokens, count, gradient_TD.shape[1]).double()
    for token in range(tokens):
        for slot, expert in enumerate(sample.index_TK[token].tolist()):
            h_TEF[token, expert] = experts.hidden(expert, sample.inputs_TD[token : token + 1])[0].double()
            u_TED[token, expert] = sample.weight_TK[token, slot].double() * gradient_TD[token]
    gradient_EF = torch.zeros(count, width).double()
    for expert in range(count):
        for neuron in range(width):
            column = experts.down_EDF[expert, :, neuron].double()
            gradient_EF[expert, neuron] = sum(float(u_TED[token, expert] @ column) ** 2 for token in range(tokens))
    added = {"hidden_square": h_TEF.square().sum(0), "channel_gradient": gradient_EF}
    return replace(state, statistics={**state.statistics, **added}), h_TEF, u_TED


def slow_scores(state: LayerState, score: str, h_TEF: Tensor, u_TED: Tensor) -> Tensor:
    """The formulas as they stand in the papers, neuron by neuron."""
    result = torch.zeros(h_TEF.shape[1:]).double()
    for expert in range(len(result)):
        routed = [t for t in range(len(h_TEF)) if expert in state.sample.index_TK[t].tolist()]
        if not routed:
            continue
        matrix_DD = torch.zeros(u_TED.shape[2], u_TED.shape[2]).double()
        for token in routed:
            matrix_DD += torch.outer(u_TED[token, expert], u_TED[token, expert]) / len(routed)
        for neuron in range(result.shape[1]):
            column = state.original.down_EDF[expert, :, neuron].double()
            for token in routed:
                output = h_TEF[token, expert, neuron] * column
                added = output @ matrix_DD @ output / len(routed) if score == "heapr" else output @ output
                result[expert, neuron] += added
    return result


def size_of(experts: Experts, expert: int, neuron: int) -> float:
    """Return the product of the norms of a neuron's weights in gate, up and down projection."""
    result = float(experts.down_EDF[expert, :, neuron].double().norm())
    for weight_EFD, bias_EF in ((experts.gate_EFD, experts.gate_bias_EF), (experts.up_EFD, experts.up_bias_EF)):
        if weight_EFD is not None:
            values = weight_EFD[expert, neuron].tolist() + ([] if bias_EF is None else [float(bias_EF[expert, neuron])])
            result *= sum(value**2 for value in values) ** 0.5
    return result


def best_of(state: LayerState, scores_EF: Tensor, expert: int, width: int) -> list[int]:
    """Return the neurons of an expert that are to stay: by score, then by size."""

    def rank(neuron: int) -> tuple[float, float]:
        return -float(scores_EF[expert, neuron]), -size_of(state.experts, expert, neuron)

    return sorted(sorted(range(WIDTH), key=rank)[:width])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("biases", "gate"), [(False, True), (True, True), (True, False)])
def test_the_neurons_of_highest_score_stay_in_their_order(score: str, biases: bool, gate: bool) -> None:
    before, h_TEF, u_TED = measured(make_state(biases=biases, gate=gate))
    scores_EF = slow_scores(before, score, h_TEF, u_TED)
    after = slim(before, LayerPlan(num_experts=EXPERTS, width=4), score=score)
    old, new = before.experts.tensors(), after.experts.tensors()
    assert old.keys() == new.keys()
    kept = 0.0
    for expert in range(EXPERTS):
        best = best_of(before, scores_EF, expert, 4)
        kept += float(scores_EF[expert, best].sum())
        for name in old.keys() - {"down_EDF", "down_bias_ED"}:
            assert torch.equal(new[name][expert], old[name][expert][best]), (name, expert)
        assert torch.equal(new["down_EDF"][expert], old["down_EDF"][expert][:, best])
    if biases:
        assert torch.equal(new["down_bias_ED"], old["down_bias_ED"])
    assert after.router is before.router
    assert torch.equal(after.expert_map_E, torch.arange(EXPERTS))
    assert after.notes["slim"]["score"] == score
    assert after.notes["slim"]["share_of_score"] == pytest.approx(kept / float(scores_EF.sum()))


def test_heapr_is_the_papers_formula_without_its_matrix() -> None:
    before, h_TEF, u_TED = measured(make_state(tokens=24))
    never = before.statistics["usage"] == 0
    expected = slow_scores(before, "heapr", h_TEF, u_TED)
    torch.testing.assert_close(heapr_scores(before.statistics), expected, rtol=1e-9, atol=1e-12)
    lone = make_state(tokens=1)
    scores_EF = heapr_scores(measured(lone)[0].statistics)
    assert not never.all()
    assert (scores_EF[lone.statistics["usage"] == 0] == 0).all()


@pytest.mark.parametrize("biases", [False, True])
def test_ragged_widths_keep_the_best_of_each_expert_and_fill_up_with_zeros(biases: bool) -> None:
    before, h_TEF, u_TED = measured(make_state(biases=biases))
    scores_EF = slow_scores(before, "heapr", h_TEF, u_TED)
    widths = (0, 6, 3, 1, 2, 5, 4, 6)
    after = slim(before, ragged_plan(widths), score="heapr")
    assert after.experts.width == WIDTH
    inputs = before.sample.inputs_TD
    for expert, width in enumerate(widths):
        best = best_of(before, scores_EF, expert, width)
        assert torch.equal(after.experts.up_EFD[expert, :width], before.experts.up_EFD[expert, best])
        assert torch.equal(after.experts.down_EDF[expert, :, :width], before.experts.down_EDF[expert][:, best])
        for name, tensor in after.experts.tensors().items():
            if name != "down_bias_ED":
                rest = tensor[expert, :, width:] if name == "down_EDF" else tensor[expert, width:]
                assert not rest.any(), name
        hidden_TF = before.experts.hidden(expert, inputs)
        hidden_TF[:, [neuron for neuron in range(WIDTH) if neuron not in best]] = 0
        expected = before.experts.project(expert, hidden_TF)
        torch.testing.assert_close(after.experts.output(expert, inputs), expected)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [LayerPlan(num_experts=8, width=6), ragged_plan((6,) * 8)])
def test_full_width_is_bit_identical(score: str, size: LayerPlan) -> None:
    before, _, _ = measured(make_state(biases=True))
    after = slim(before, size, score=score)
    for name, tensor in before.experts.tensors().items():
        assert torch.equal(after.experts.tensors()[name], tensor), name
    assert after.notes["slim"]["share_of_score"] == pytest.approx(1.0)


@settings(max_examples=15, deadline=None)
@given(
    score=st.sampled_from(SCORES),
    seed=st.integers(0, 1000),
    dead=st.lists(
        st.lists(st.sampled_from("udu."), min_size=WIDTH, max_size=WIDTH), min_size=EXPERTS, max_size=EXPERTS
    ),
    biases=st.booleans(),
)
def test_neurons_that_do_nothing_go_without_a_trace(score: str, seed: int, dead: list[list[str]], biases: bool) -> None:
    """d: the down column is zero; u: the activation is; a dot: alive."""
    draft = make_state(biases=biases, seed=seed, tokens=20)
    tensors = {name: tensor.clone() for name, tensor in draft.experts.tensors().items()}
    for expert, kinds in enumerate(dead):
        for neuron, kind in enumerate(kinds):
            if kind == "d":
                tensors["down_EDF"][expert, :, neuron] = 0
            elif kind == "u":
                for name in tensors.keys() - {"down_EDF", "down_bias_ED"}:
                    tensors[name][expert, neuron] = 0
    before, _, _ = measured(make_state(seed=seed, tokens=20, experts=replace(draft.experts, **tensors)))
    width = max(1, *(kinds.count(".") for kinds in dead))
    sizes = (
        LayerPlan(num_experts=EXPERTS, width=width),
        ragged_plan([kinds.count(".") for kinds in dead]),
    )
    used = before.statistics["usage"] > 0
    for size in sizes:
        after = slim(before, size, score=score)
        for expert in range(EXPERTS):
            if used[expert] or size.width:  # a rank over all experts knows nothing of one that was never chosen
                inputs = before.sample.inputs_TD
                expected, found = before.experts.output(expert, inputs), after.experts.output(expert, inputs)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(score=st.sampled_from(SCORES), seed=st.integers(0, 1000), width=st.integers(1, WIDTH))
def test_neither_the_order_of_neurons_nor_that_of_experts_matters(score: str, seed: int, width: int) -> None:
    before, _, _ = measured(make_state(seed=seed, tokens=20))
    size = LayerPlan(num_experts=EXPERTS, width=width)
    after = slim(before, size, score=score)
    generator = torch.Generator().manual_seed(seed)
    neurons_F, order_E = torch.randperm(WIDTH, generator=generator), torch.randperm(EXPERTS, generator=generator)
    moved = {
        name: (tensor[:, :, neurons_F] if name == "down_EDF" else tensor[:, neurons_F])[order_E]
        for name, tensor in before.experts.tensors().items()
    }
    names = ("hidden_square", "channel_gradient")
    statistics = {name: before.statistics[name][order_E][:, neurons_F] for name in names}
    statistics["usage"] = before.statistics["usage"][order_E]
    experts = replace(before.experts, **moved)
    other = slim(replace(before, experts=experts, original=experts, statistics=statistics), size, score=score)
    inputs = before.sample.inputs_TD
    for new, old in enumerate(order_E.tolist()):
        found, expected = other.experts.output(new, inputs), after.experts.output(old, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_token_chose_keeps_its_larger_weights() -> None:
    before, _, _ = measured(make_state(tokens=1))
    after = slim(before, LayerPlan(num_experts=EXPERTS, width=2), score="heapr")
    never = [expert for expert in range(EXPERTS) if before.statistics["usage"][expert] == 0]
    assert len(never) == 6
    for expert in never:
        best = best_of(before, torch.zeros(EXPERTS, WIDTH), expert, 2)
        assert torch.equal(after.experts.up_EFD[expert], before.experts.up_EFD[expert, best])


def test_experts_that_were_dropped_before_do_not_confuse_the_scores() -> None:
    before, _, _ = measured(make_state())
    kept = torch.tensor([1, 4, 6])
    map_E = torch.full((EXPERTS,), -1)
    map_E[kept] = torch.arange(3)
    pruned = replace(before, experts=before.experts.select(kept), expert_map_E=map_E)
    found = slim(pruned, LayerPlan(num_experts=3, width=2), score="heapr").experts
    whole = slim(before, LayerPlan(num_experts=EXPERTS, width=2), score="heapr").experts
    for name, tensor in whole.select(kept).tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


def test_merged_experts_are_refused(state: Callable[..., LayerState]) -> None:
    before, _, _ = measured(state())
    merged = replace(before, experts=before.experts.select(torch.arange(4)), expert_map_E=torch.arange(8) % 4)
    with pytest.raises(Infeasible, match="8 experts were merged into 4"):
        slim(merged, LayerPlan(num_experts=4, width=2), score="activation")


def test_needs_and_names() -> None:
    assert needs_of("slim", score="activation") == ("hidden_square",)
    assert not needs_gradients(needs_of("slim", score="activation"))
    assert needs_gradients(needs_of("slim", score="heapr"))
    with pytest.raises(UnknownName, match="did you mean heapr"):
        needs_of("slim", score="heap")
