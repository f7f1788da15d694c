"""GPTQ towards the original's output, against the solution of its least squares in float64."""

import pytest
import torch

import coterie.compress.quantisers.corrected as corrected_module
from coterie.compress.moments import Inputs
from coterie.compress.quantisers.corrected import RIDGE, corrected
from coterie.compress.quantisers.gptq import gptq
from coterie.model.disk.encodings.ggml import get_type


def problem(columns=64, rows=6, tokens=400, change=0.2, matrices=2, seed=0):
    """Return weights (N, R, C) and what came into the original (N, T, C), and what comes in now."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(matrices, columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    original = torch.randn(matrices, tokens, columns, generator=generator) @ mix
    # Layers before change what comes in along a few directions, as rounding errors of a shared residual stream do.
    few = torch.randn(matrices, columns, 4, generator=generator) @ torch.randn(
        matrices, 4, columns, generator=generator
    )
    now = original + change * (original @ few) / columns
    return torch.randn(matrices, rows, columns, generator=generator), original, now


def inputs_of(original, now):
    return Inputs(hessian_NCC=now.mT @ now, missed_NCC=(original - now).mT @ now, num_tokens=(now.shape[1],) * len(now))


def rounded_towards(monkeypatch, weight, inputs, **options):
    """Return the matrices that are rounded in the end."""
    given = []
    monkeypatch.setattr(
        corrected_module,
        "gptq",
        lambda weight_NRC, *rest, **others: given.append(weight_NRC) or gptq(weight_NRC, *rest),
    )
    corrected(weight, inputs, get_type("Q4_0"), **options)
    return given[0]


@pytest.mark.parametrize("ridge", [RIDGE, 0.001, 3.0])
def test_what_is_rounded_is_the_solution_of_the_least_squares(monkeypatch, ridge):
    """The least of |W X - V X'|^2 + lambda |V - W|^2, by lstsq on rows that say both."""
    weight, original, now = problem()
    found = rounded_towards(monkeypatch, weight, inputs_of(original, now), ridge=ridge)
    for number in range(len(weight)):
        x, o, w = now[number].double(), original[number].double(), weight[number].double()
        root = (ridge * (x.T @ x).diagonal().mean()).sqrt()
        left = torch.cat((x, root * torch.eye(64).double()))
        right = torch.cat((o @ w.T, root * w.T))
        expected = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(found[number].double(), expected, rtol=1e-4, atol=1e-4)
        assert float((expected - w).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q5_1"])
def test_the_output_comes_nearer_to_the_originals(name):
    weight, original, now = problem(change=2.0)
    inputs, kind = inputs_of(original, now), get_type(name)

    def error(function):
        _, value = function(weight, inputs, kind)
        return (now @ value.mT - original @ weight.mT).square().sum(dim=(-1, -2))

    assert (error(corrected) < 0.7 * error(gptq)).all()


def test_nothing_is_corrected_where_nothing_is_known_of_the_original():
    weight, _, now = problem()
    unknown = Inputs(hessian_NCC=now.mT @ now, missed_NCC=None, num_tokens=(400, 400))
    for mine, plain in zip(*(f(weight, unknown, get_type("Q4_0")) for f in (corrected, gptq)), strict=True):
        assert torch.equal(mine, plain)


def test_equal_inputs_give_the_very_bytes_of_gptq():
    weight, original, _ = problem()
    inputs = inputs_of(original, original)
    for mine, plain in zip(*(f(weight, inputs, get_type("Q4_0")) for f in (corrected, gptq)), strict=True):
        assert torch.equal(mine, plain)


def test_damping_is_handed_on():
    weight, original, _ = problem()
    inputs, kind = inputs_of(original, original), get_type("Q4_0")
    mine = corrected(weight, inputs, kind, damping=1.0)[0]
    assert torch.equal(mine, gptq(weight, inputs, kind, damping=1.0)[0])
    assert not torch.equal(mine, gptq(weight, inputs, kind)[0])


def test_an_expert_without_tokens_is_left_as_it_is(monkeypatch):
    weight, _, _ = problem()
    zeros = torch.zeros(2, 64, 64)
    nobody = Inputs(hessian_NCC=zeros, missed_NCC=zeros, num_tokens=(0, 0))
    assert torch.equal(rounded_towards(monkeypatch, weight, nobody), weight)
