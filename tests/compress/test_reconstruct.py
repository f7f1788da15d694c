"""Block reconstruction: what it reports against slow loops, and that it mends what was damaged."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.reconstruct import reconstruct
from some import first

SIZE = LayerPlan(num_experts=8)

#: Every so many-th token is held out.
HELD_OUT = 8


def disturbed(make, *, seed=0, tokens=512, noise=0.3, **options):
    """A layer whose projections were all disturbed, with outputs as its own routing makes them."""
    state = make(seed=seed, tokens=tokens, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    experts = state.experts.map(lambda tensor: tensor + noise * torch.randn(tensor.shape, generator=generator))
    return replace(state, experts=experts)


def slow_error(state, every=HELD_OUT):
    """Relative squared error on the held-out tokens, token by token."""
    total = scale = 0.0
    sample = state.sample
    for token in range(every - 1, len(sample.inputs_TD), every):
        output = torch.zeros(sample.output_TD.shape[1], dtype=torch.float64)
        for slot, expert in enumerate(sample.index_TK[token].tolist()):
            value = state.experts.output(expert, sample.inputs_TD[token : token + 1])[0]
            output += float(sample.weight_TK[token, slot]) * value.double()
        total += float((output - sample.output_TD[token].double()).square().sum())
        scale += float(sample.output_TD[token].double().square().sum())
    return total / scale


@pytest.mark.parametrize(("biases", "gate"), first(1, [(True, True), (False, True), (False, False)]))
def test_it_mends_what_was_damaged(state, biases, gate):
    layer = disturbed(state, biases=biases, gate=gate)
    found = reconstruct(layer, SIZE, steps=150, tokens=128, rate=0.05)
    notes = found.notes["reconstruct"]
    assert notes["heldout_error_before"] == pytest.approx(slow_error(layer), rel=1e-4)
    assert notes["heldout_error_after"] == pytest.approx(slow_error(found), rel=1e-4)
    assert notes["heldout_error_after"] < 0.5 * notes["heldout_error_before"]
    assert found.router is layer.router
    for name, tensor in found.experts.tensors().items():
        assert not torch.equal(tensor, layer.experts.tensors()[name]), name
        assert not tensor.requires_grad, name


def test_other_tokens_can_be_held_out(state):
    layer = disturbed(state)
    found = reconstruct(layer, SIZE, steps=20, tokens=128, rate=0.05, held_out=5)
    notes = found.notes["reconstruct"]
    assert notes["heldout_error_before"] == pytest.approx(slow_error(layer, every=5), rel=1e-4)
    assert notes["heldout_error_after"] == pytest.approx(slow_error(found, every=5), rel=1e-4)


@pytest.mark.long
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), noise=st.sampled_from([0.0, 0.01, 1.0]))
def test_the_held_out_tokens_never_lose(state, seed, noise):
    layer = disturbed(state, seed=seed, noise=noise, tokens=40)
    found = reconstruct(layer, SIZE, steps=8, tokens=16, rate=0.1)
    assert slow_error(found) <= slow_error(layer) * (1 + 1e-6)
    assert found.notes["reconstruct"]["taken"] == (found.experts is not layer.experts)


def test_the_same_seed_gives_the_same_bits(state):
    layer = disturbed(state)
    one, two = (reconstruct(layer, SIZE, steps=5, tokens=64) for _ in range(2))
    other = reconstruct(replace(layer, seed=1), SIZE, steps=5, tokens=64)
    assert torch.equal(one.experts.up_EFD, two.experts.up_EFD)
    assert not torch.equal(one.experts.up_EFD, other.experts.up_EFD)


def test_experts_that_nobody_chose_stay_as_they_are(state):
    layer = disturbed(state)
    index_TK = layer.sample.index_TK.masked_fill(layer.sample.index_TK == 3, 8)
    found = reconstruct(replace(layer, sample=replace(layer.sample, index_TK=index_TK)), SIZE, steps=20, tokens=64)
    for name, tensor in found.experts.tensors().items():
        assert torch.equal(tensor[3], layer.experts.tensors()[name][3]), name


def test_outputs_that_are_normalised_are_trained_too(state):
    layer = disturbed(state)
    experts = replace(layer.experts, finish=torch.tanh)
    outputs = torch.stack([
        sum(
            float(layer.sample.weight_TK[token, slot])
            * torch.tanh(layer.original.output(int(layer.sample.index_TK[token, slot]), x_D[None])[0])
            for slot in range(2)
        )
        for token, x_D in enumerate(layer.sample.inputs_TD)
    ])  # fmt: skip
    layer = replace(layer, experts=experts, sample=replace(layer.sample, output_TD=outputs))
    notes = reconstruct(layer, SIZE, steps=150, tokens=128, rate=0.05).notes["reconstruct"]
    assert notes["heldout_error_after"] < 0.7 * notes["heldout_error_before"]
