"""Optimisers: Adam's steps against slow loops in float64; the table."""

import math

import pytest
import torch

from coterie.errors import UnknownName
from coterie.train.optimiser import BETAS, EPSILON, OPTIMISERS, Adam, load_optimiser

OPTIONS = [
    {},
    {"betas": (0.9, 0.999), "epsilon": 1e-2, "relative": False, "unit": 7.0},
    {"relative": False, "epsilon": 0.1},
    {"unit": 1e-3, "epsilon": 1e-3},
]


def slow_adam(start, gradients, rates, *, betas=BETAS, epsilon=EPSILON, relative=True, unit=1.0):
    """Kingma and Ba's algorithm 1, entry by entry."""
    used = [value for value in start if value != 0]
    size = math.sqrt(sum(value**2 for value in used) / len(used)) if relative else 1.0
    weights = list(start)
    for entry in range(len(start)):
        first = second = 0.0
        for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
            slope = gradient[entry] / unit
            first = betas[0] * first + (1 - betas[0]) * slope
            second = betas[1] * second + (1 - betas[1]) * slope**2
            mean, square = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
            weights[entry] -= rate * size * mean / (math.sqrt(square) + epsilon)
    return weights


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_of_adam_equal_slow_loops(options):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, generator=generator).double() * 5
    start[2] = 0
    gradients, rates = torch.randn(4, 6, generator=generator).double(), [0.1, 0.2, 0.05, 0.0]
    weights = {"one": start.clone(), "other": (2 * start).float()}
    adam = load_optimiser("adam")(weights, **options)
    for gradient, rate in zip(gradients, rates, strict=True):
        adam.step([gradient, -gradient.float()], rate)
    rows = gradients.tolist()
    assert weights["one"].tolist() == pytest.approx(slow_adam(start.tolist(), rows, rates, **options), rel=1e-9)
    negative = [[-value for value in row] for row in rows]
    other = slow_adam((2 * start).tolist(), negative, rates, **options)
    assert weights["other"].tolist() == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_a_tensor_of_zeros_stays():
    weights = {"zero": torch.zeros(3)}
    Adam(weights).step([torch.ones(3)], 0.1)
    assert weights["zero"].tolist() == [0, 0, 0]


def test_a_state_is_only_read():
    weights = {"w": torch.ones(3)}
    adam = Adam(weights)
    adam.step([torch.ones(3)], 0.1)
    state = {name: tensor.clone() for name, tensor in adam.state().items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    other = Adam({"w": torch.full((3,), 9.0)})
    other.restore(state)
    other.step([torch.ones(3)], 0.1)
    assert state.keys() == kept.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, kept[name]), name


def test_every_name_of_the_table_makes_an_optimiser():
    for name in OPTIMISERS:
        weights = {"w": torch.ones(3)}
        load_optimiser(name)(weights).step([torch.ones(3)], 0.1)
        assert float(weights["w"].max()) < 1, name


def test_one_that_is_in_no_table_is_asked_for_by_its_place():
    assert load_optimiser("coterie.train.optimiser:Adam") is Adam


@pytest.mark.parametrize("name", ["adan", "no_such_module:Adam", "coterie.train.optimiser:Adan"])
def test_unknown_optimisers_are_refused(name):
    with pytest.raises(UnknownName, match="unknown optimiser"):
        load_optimiser(name)
