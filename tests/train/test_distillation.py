"""Distillation in memory: its steps against Adam written out; what it changes, what it leaves; it goes on."""

from types import SimpleNamespace

import pytest
import torch

from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.open import open_checkpoint
from coterie.testing import tiny_checkpoint
from coterie.train.distill import divergence_loss
from coterie.train.loop import Loop, mean_loss
from coterie.train.model import experts_apart, trainable
from coterie.train.optimiser import BETAS, Adam
from coterie.train.predictions import Predictions
from coterie.train.schedule import Schedule, rate_at, shuffled

FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss"]
STEPS, RATE = 6, 0.02


def schedule(count, rate=RATE):
    return Schedule(steps=STEPS, rows=shuffled(count, 4, seed=0), rate=lambda step: rate_at(step, STEPS, rate))


@pytest.fixture(scope="module", params=FAMILIES)
def place(request, tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param) / "model", request.param)
    ids_BS = torch.randint(5, 60, (10, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_model(folder, dtype=torch.float32)(input_ids=ids_BS, use_cache=False).logits
    return folder, Architecture.of(open_checkpoint(folder)).layers, ids_BS, Predictions.of(logits, 16)


def on_its_way(model, layers, ids_BS, predictions, rate=RATE, workers=1):
    """A model with what trains and what measures it."""
    loss = divergence_loss(model, ids_BS, predictions)
    model.requires_grad_(False)
    weights = trainable(model, layers)
    loop = Loop(weights, loss, optimiser=Adam(weights), schedule=schedule(len(ids_BS), rate), micro=2, workers=workers)

    def advance():
        with experts_apart(model):
            return loop.advance()

    def measure():
        with experts_apart(model):
            return mean_loss(loss, torch.arange(len(ids_BS)), micro=2, workers=workers)

    return SimpleNamespace(model=model, weights=weights, loop=loop, advance=advance, measure=measure)


def student(place, **options):
    """The model with disturbed experts, on its way."""
    folder, layers, ids_BS, predictions = place
    model = load_model(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in trainable(model, layers).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * tensor.square().mean().sqrt() * 0.3)
    return on_its_way(model, layers, ids_BS, predictions, **options)


def test_steps_equal_those_of_adam(place):
    _, _, ids_BS, predictions = place
    found, other = student(place), student(place)
    sizes = {name: float(tensor.detach().square().mean().sqrt()) for name, tensor in other.weights.items()}
    first, second = ({name: torch.zeros_like(t).double() for name, t in other.weights.items()} for _ in range(2))
    for step in range(3):
        loss = found.advance()
        rows = schedule(len(ids_BS)).rows(step)
        logits = other.model(input_ids=ids_BS[rows], use_cache=False).logits
        expected = predictions.select(rows).divergence(logits)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
        gradients = torch.autograd.grad(expected, list(other.weights.values()))
        for (name, tensor), gradient in zip(other.weights.items(), gradients, strict=True):
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient.double() ** 2
            mean, square = (
                moment[name] / (1 - beta ** (step + 1)) for moment, beta in zip((first, second), BETAS, strict=True)
            )
            rate = rate_at(step, STEPS, RATE) * sizes[name]
            tensor.data -= (rate * mean / (square.sqrt() + 1e-12)).float()
            # An entry whose gradient is nearly nothing may step either way.
            close = ((found.weights[name] - tensor).detach().abs() < 1e-3 * float(tensor.detach().abs().max())).float()
            assert close.mean() > 0.98, name


def test_it_gets_nearer_and_changes_experts_and_routers_only(place):
    folder, layers, _, _ = place
    held = load_model(folder, dtype=torch.float32).state_dict()
    found = student(place)
    routers = {name for layer in layers for name, _ in layer.router_tensors}
    assert set(found.weights) >= {f"{layer.experts}.down_proj" for layer in layers}
    assert set(found.weights) & routers
    before = found.measure()
    losses = [found.advance() for _ in range(6)]
    assert found.measure() < 0.9 * before
    assert losses[0] == pytest.approx(before, rel=0.5)
    for name, tensor in found.model.state_dict().items():
        assert name in found.weights or torch.equal(tensor, held[name]), name


def test_the_number_of_threads_does_not_matter(place):
    one, two = student(place), student(place, workers=2)
    assert [one.advance() for _ in range(2)] == [two.advance() for _ in range(2)]
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, two.weights[name]), name
    assert one.measure() == two.measure()


def test_it_goes_on_from_its_state_with_the_same_bits(place):
    whole = student(place)
    for _ in range(4):
        whole.advance()
    first = student(place)
    for _ in range(2):
        first.advance()
    kept = {name: tensor.clone() for name, tensor in first.loop.state().items()}
    second = student(place)
    second.loop.restore(kept)
    for _ in range(2):
        second.advance()
    assert second.loop.step == whole.loop.step == 4
    for name, tensor in whole.loop.state().items():
        assert torch.equal(tensor, second.loop.state()[name]), name


def test_a_bias_that_only_chooses_experts_stays_what_it_was(tmp_path):
    """In AFMoE it is a parameter of the router, which no gradient reaches."""
    folder = tiny_checkpoint(tmp_path / "model", "afmoe")
    layers = Architecture.of(open_checkpoint(folder)).layers
    model = load_model(folder, dtype=torch.float32)
    biases = {name: tensor for name, tensor in trainable(model, layers).items() if name.endswith("expert_bias")}
    assert len(biases) == len(layers)
    with torch.no_grad():
        for tensor in biases.values():
            tensor.copy_(torch.linspace(-0.1, 0.1, len(tensor)))
        model.get_submodule(layers[0].experts).down_proj.mul_(0.5)
    held = {name: tensor.clone() for name, tensor in biases.items()}
    ids_BS = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_model(folder, dtype=torch.float32)(input_ids=ids_BS, use_cache=False).logits
    found = on_its_way(model, layers, ids_BS, Predictions.of(logits, 16))
    losses = [found.advance() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in held.items())


def test_neurons_that_are_nothing_stay_nothing(tmp_path):
    """A ragged result fills narrow experts up with zeros: training must leave them."""
    folder = tiny_checkpoint(tmp_path / "model", "olmoe")
    ids_BS = torch.randint(5, 60, (10, 12), generator=torch.Generator().manual_seed(0))
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        predictions = Predictions.of(model(input_ids=ids_BS, use_cache=False).logits, 16)
        width = model.model.layers[0].mlp.experts.down_proj.shape[2]
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj[:, [0, width]] = 0
            layer.mlp.experts.down_proj[:, :, 0] = 0
    found = on_its_way(model, Architecture.of(open_checkpoint(folder)).layers, ids_BS, predictions, rate=0.005)
    before = found.measure()
    for _ in range(STEPS):
        found.advance()
    assert found.measure() < before
    for layer in model.model.layers:
        assert not layer.mlp.experts.gate_up_proj[:, [0, width]].any()
        assert not layer.mlp.experts.down_proj[:, :, 0].any()
        assert layer.mlp.experts.down_proj[:, :, 1].all()
