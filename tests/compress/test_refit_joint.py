"""The joint re-fit against the normal equations of all down projections, set up entry by entry in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.refit_joint import refit_joint
from some import first

SIZE = LayerPlan(num_experts=8)

#: Every so many-th token is held out.
HELD_OUT = 8


def damaged(make, *, seed=0, tokens=800, noise=0.3, **options):
    """A layer whose gate and up projections were disturbed, and how much that costs."""
    state = make(seed=seed, tokens=tokens, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    up_EFD = state.experts.up_EFD
    return replace(
        state,
        experts=replace(state.experts, up_EFD=up_EFD + noise * torch.randn(up_EFD.shape, generator=generator)),
    )


def features(state, token):
    """g_te h_e(x_t) of all experts in one row (E * F), float64."""
    row = torch.zeros(state.experts.num_experts, state.experts.width, dtype=torch.float64)
    for slot in range(state.layer.top_k):
        expert = int(state.sample.index_TK[token, slot])
        if expert < state.experts.num_experts:
            hidden_F = state.experts.hidden(expert, state.sample.inputs_TD[token : token + 1])[0]
            row[expert] += float(state.sample.weight_TK[token, slot]) * hidden_F.double()
    return row.flatten()


def bias_of(state, token):
    total = torch.zeros(state.sample.output_TD.shape[1], dtype=torch.float64)
    if state.experts.down_bias_ED is not None:
        for slot in range(state.layer.top_k):
            expert = int(state.sample.index_TK[token, slot])
            total += float(state.sample.weight_TK[token, slot]) * state.experts.down_bias_ED[expert].double()
    return total


def solved_slowly(state, prior):
    """All down projections (E, D, F) from one dense system over the tokens that are not held out."""
    count, width = state.experts.num_experts, state.experts.width
    system = torch.zeros(count * width, count * width, dtype=torch.float64)
    right = torch.zeros(count * width, state.sample.output_TD.shape[1], dtype=torch.float64)
    squares, tokens = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for token in range(len(state.sample.inputs_TD)):
        if token % HELD_OUT == HELD_OUT - 1:
            continue
        row = features(state, token)
        system += torch.outer(row, row)
        right += torch.outer(row, state.sample.output_TD[token].double() - bias_of(state, token))
        squares += row.view(count, width).square().sum(1)
        for expert in state.sample.index_TK[token].tolist():
            if expert < count:
                tokens[expert] += 1
    ridge = torch.repeat_interleave(prior * squares / width / tokens, width)
    before = state.experts.down_EDF.double().permute(0, 2, 1).reshape(count * width, -1)
    solution = torch.linalg.solve(system + ridge.diag(), right + ridge[:, None] * before)
    return solution.view(count, width, -1).permute(0, 2, 1)


def error(state, held_out, every=HELD_OUT):
    total = scale = 0.0
    down = state.experts.down_EDF.double().permute(0, 2, 1).flatten(0, 1)
    for token in range(len(state.sample.inputs_TD)):
        if (token % every == every - 1) == held_out:
            target = state.sample.output_TD[token].double() - bias_of(state, token)
            total += float((target - features(state, token) @ down).square().sum())
            scale += float(target.square().sum())
    return total / scale


@pytest.mark.parametrize(("biases", "gate"), first(2, [(True, True), (False, False), (False, True)]))
@pytest.mark.parametrize("prior", first(1, [0.5, 16.0]))
@pytest.mark.parametrize("few", [10**6, 0], ids=["moments", "passes"])
def test_it_solves_the_normal_equations_of_all_experts_together(state, biases, gate, prior, few, monkeypatch):
    monkeypatch.setattr("coterie.compress.methods.refit_joint.FEW_NEURONS", few)
    monkeypatch.setattr("coterie.compress.methods.refit_joint._CHUNK", 100)
    layer = damaged(state, biases=biases, gate=gate)
    found = refit_joint(layer, SIZE, prior=prior, iterations=200)
    expected_EDF = solved_slowly(layer, prior)
    exact = replace(layer, experts=replace(layer.experts, down_EDF=expected_EDF.float()))
    notes = found.notes["refit-joint"]
    assert notes["heldout_error_before"] == pytest.approx(error(layer, True), rel=1e-4)
    assert notes["heldout_error_after"] == pytest.approx(error(found, True), rel=1e-4)
    assert error(found, True) < 0.95 * error(layer, True)
    # The held-out tokens choose the iterate, so it may stop before the end, never much behind it.
    assert error(found, True) <= error(exact, True) * 1.001
    assert error(exact, False) <= error(found, False) * (1 + 1e-6)


def test_lost_projections_are_found_again(state):
    layer = state(tokens=1600)
    generator = torch.Generator().manual_seed(1)
    lost_EDF = torch.randn(layer.experts.down_EDF.shape, generator=generator)
    # Outputs as the router's weights in the sample make them.
    rows = torch.stack([features(layer, token) for token in range(1600)])
    down = layer.experts.down_EDF.double().permute(0, 2, 1).flatten(0, 1)
    sample = replace(layer.sample, output_TD=(rows @ down).float())
    found = refit_joint(
        replace(layer, sample=sample, experts=replace(layer.experts, down_EDF=lost_EDF)), SIZE, prior=0, iterations=300
    )
    assert found.notes["refit-joint"]["heldout_error_before"] > 0.5
    assert found.notes["refit-joint"]["heldout_error_after"] < 1e-6
    torch.testing.assert_close(found.experts.down_EDF, layer.experts.down_EDF, rtol=0.02, atol=0.02)


def test_experts_make_up_for_each_other(state):
    """One expert by itself could not do what the experts that are chosen with it can."""
    layer = state(num_experts=2, top_k=2, tokens=400)
    silent = replace(layer.experts, down_EDF=layer.experts.down_EDF * torch.tensor([0.0, 1.0])[:, None, None])
    twins = replace(silent, up_EFD=silent.up_EFD[[1, 1]], gate_EFD=silent.gate_EFD[[1, 1]])
    layer = replace(layer, experts=twins)
    found = refit_joint(layer, LayerPlan(num_experts=2))
    assert float((found.experts.down_EDF[0]).abs().max()) > 0.01
    assert error(found, True) < error(layer, True)


@pytest.mark.long
@given(seed=st.integers(0, 10**6), noise=st.sampled_from([0.0, 0.05, 1.0]), tokens=st.sampled_from([8, 24, 200]))
def test_the_held_out_tokens_never_lose(state, seed, noise, tokens):
    layer = damaged(state, seed=seed, noise=noise, tokens=tokens)
    found = refit_joint(layer, SIZE)
    notes = found.notes["refit-joint"]
    assert notes["heldout_error_after"] <= notes["heldout_error_before"]
    assert error(found, True) <= error(layer, True) * (1 + 1e-5) + 1e-10
    if notes["iterations"] == 0:
        assert torch.equal(found.experts.down_EDF, layer.experts.down_EDF)
    assert found.router is layer.router
    assert torch.equal(found.experts.up_EFD, layer.experts.up_EFD)


def test_experts_that_nobody_chose_stay_as_they_are(state):
    layer = damaged(state)
    index_TK = layer.sample.index_TK.masked_fill(layer.sample.index_TK == 3, 8)
    found = refit_joint(replace(layer, sample=replace(layer.sample, index_TK=index_TK)), SIZE)
    assert torch.equal(found.experts.down_EDF[3], layer.experts.down_EDF[3])
    assert not torch.equal(found.experts.down_EDF[2], layer.experts.down_EDF[2])


def test_another_router_is_asked(state):
    layer = damaged(state)
    router = {name: tensor.flip(0) for name, tensor in layer.router.items()}
    asked = []

    def route(tensors, inputs_TD):
        asked.append(tensors)
        return layer.sample.index_TK, layer.sample.weight_TK

    found = refit_joint(replace(layer, router=router, route=route), SIZE)
    assert asked == [router]
    assert torch.equal(found.experts.down_EDF, refit_joint(layer, SIZE).experts.down_EDF)


def test_a_family_that_normalises_outputs_is_left_alone(state):
    layer = damaged(state)
    layer = replace(layer, experts=replace(layer.experts, finish=torch.tanh))
    found = refit_joint(layer, SIZE)
    assert found.experts is layer.experts
    assert "normalises" in found.notes["refit-joint"]["skipped"]


def test_other_tokens_can_be_held_out(state):
    layer = damaged(state)
    found = refit_joint(layer, SIZE, held_out=5)
    notes = found.notes["refit-joint"]
    assert notes["heldout_error_before"] == pytest.approx(error(layer, True, every=5), rel=1e-4)
    assert notes["heldout_error_after"] == pytest.approx(error(found, True, every=5), rel=1e-3)
