"""Distillation: its loss against slow loops, its steps against Adam written out; it goes on where it stopped."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.compress.adam import BETAS, rate_at
from coterie.compress.distill import Distillation, Schedule, Targets, trainable
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.open import open_checkpoint
from coterie.testing import tiny_checkpoint

FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss"]
SCHEDULE = Schedule(steps=6, sequences=4, micro=2)
RATE = 0.02


@pytest.fixture(scope="module", params=FAMILIES)
def place(request, tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param) / "model", request.param)
    ids_BS = torch.randint(5, 60, (10, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_model(folder, dtype=torch.float32)(input_ids=ids_BS, use_cache=False).logits
    return folder, Architecture.of(open_checkpoint(folder)).layers, ids_BS, Targets.of(logits, 16)


def student(place, **options):
    """The model with disturbed experts, on its way."""
    folder, layers, _, _ = place
    model = load_model(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in trainable(model, layers).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * tensor.square().mean().sqrt() * 0.3)
    return Distillation(model, layers, SCHEDULE, rate=RATE, **options)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), kept=st.sampled_from([1, 3, 7]))
def test_the_loss_equals_slow_loops(seed, kept):
    generator = torch.Generator().manual_seed(seed)
    original, found = torch.randn(2, 3, 7, generator=generator) * 3, torch.randn(2, 3, 7, generator=generator)
    targets = Targets.of(original, kept)
    total = 0.0
    for b in range(2):
        for s in range(3):
            p = original[b, s].double().softmax(0).tolist()
            q = found[b, s].double().softmax(0).tolist()
            best = sorted(range(7), key=lambda v: -p[v])[:kept]
            total += sum(p[v] * math.log(p[v] / q[v]) for v in best) / 6
            rest_p, rest_q = (1 - sum(each[v] for v in best) for each in (p, q))
            if kept < 7:
                total += rest_p * math.log(rest_p / rest_q) / 6
    assert float(targets.divergence(found)) == pytest.approx(total, rel=1e-3, abs=1e-5)


@given(count=st.integers(1, 20), sequences=st.integers(1, 7))
def test_every_sequence_is_seen_once_an_epoch(count, sequences):
    schedule = Schedule(steps=10**6, sequences=sequences)
    seen = torch.cat([schedule.rows(step, count) for step in range(3 * count)]).tolist()
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_rate_rises_stays_and_falls_to_nothing():
    rates = [rate_at(step, 50, 0.1) for step in range(50)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[5:26] == [0.1] * 21
    assert rates[25:] == pytest.approx([0.1 * left / 25 for left in range(25, 0, -1)])
    assert [rate_at(step, 2, 0.1) for step in range(2)] == pytest.approx([0.02, 0.04])


def test_steps_equal_those_of_adam(place):
    _, _, ids_BS, targets = place
    found, other = student(place), student(place)
    sizes = {name: float(tensor.detach().square().mean().sqrt()) for name, tensor in other.weights.items()}
    first, second = ({name: torch.zeros_like(t).double() for name, t in other.weights.items()} for _ in range(2))
    for step in range(3):
        loss = found.advance(ids_BS, targets)
        rows = SCHEDULE.rows(step, len(ids_BS))
        logits = other._model(input_ids=ids_BS[rows], use_cache=False).logits
        expected = targets.select(rows).divergence(logits)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
        gradients = torch.autograd.grad(expected, list(other.weights.values()))
        for (name, tensor), gradient in zip(other.weights.items(), gradients, strict=True):
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient.double() ** 2
            mean, square = (
                moment[name] / (1 - beta ** (step + 1)) for moment, beta in zip((first, second), BETAS, strict=True)
            )
            rate = rate_at(step, SCHEDULE.steps, RATE) * sizes[name]
            tensor.data -= (rate * mean / (square.sqrt() + 1e-12)).float()
            # An entry whose gradient is nearly nothing may step either way.
            close = ((found.weights[name] - tensor).detach().abs() < 1e-3 * float(tensor.detach().abs().max())).float()
            assert close.mean() > 0.98, name


def test_it_gets_nearer_and_changes_experts_and_routers_only(place):
    folder, layers, ids_BS, targets = place
    held = load_model(folder, dtype=torch.float32).state_dict()
    found = student(place)
    routers = {name for layer in layers for name, _ in layer.router_tensors}
    assert set(found.weights) >= {f"{layer.experts}.down_proj" for layer in layers}
    assert set(found.weights) & routers
    before = found.measure(ids_BS, targets)
    losses = [found.advance(ids_BS, targets) for _ in range(6)]
    assert found.measure(ids_BS, targets) < 0.9 * before
    assert losses[0] == pytest.approx(before, rel=0.5)
    for name, tensor in found._model.state_dict().items():
        assert name in found.weights or torch.equal(tensor, held[name]), name


def test_the_number_of_threads_does_not_matter(place):
    _, _, ids_BS, targets = place
    one, two = student(place), student(place, workers=2)
    assert [one.advance(ids_BS, targets) for _ in range(2)] == [two.advance(ids_BS, targets) for _ in range(2)]
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, two.weights[name]), name
    assert one.measure(ids_BS, targets) == two.measure(ids_BS, targets)


def test_it_goes_on_from_its_state_with_the_same_bits(place):
    _, _, ids_BS, targets = place
    whole = student(place)
    for _ in range(4):
        whole.advance(ids_BS, targets)
    first = student(place)
    for _ in range(2):
        first.advance(ids_BS, targets)
    kept = {name: tensor.clone() for name, tensor in first.adam.state().items()}
    second = student(place)
    second.adam.restore(kept)
    for _ in range(2):
        second.advance(ids_BS, targets)
    assert second.step == whole.step == 4
    for name, tensor in whole.adam.state().items():
        assert torch.equal(tensor, second.adam.state()[name]), name


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
        targets = Targets.of(load_model(folder, dtype=torch.float32)(input_ids=ids_BS, use_cache=False).logits, 16)
    found = Distillation(model, layers, SCHEDULE, rate=RATE)
    losses = [found.advance(ids_BS, targets) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in held.items())


def test_neurons_that_are_nothing_stay_nothing(tmp_path):
    """A ragged result fills narrow experts up with zeros: training must leave them."""
    folder = tiny_checkpoint(tmp_path / "model", "olmoe")
    ids_BS = torch.randint(5, 60, (10, 12), generator=torch.Generator().manual_seed(0))
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        targets = Targets.of(model(input_ids=ids_BS, use_cache=False).logits, 16)
        width = model.model.layers[0].mlp.experts.down_proj.shape[2]
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj[:, [0, width]] = 0
            layer.mlp.experts.down_proj[:, :, 0] = 0
    found = Distillation(model, Architecture.of(open_checkpoint(folder)).layers, SCHEDULE, rate=0.005)
    before = found.measure(ids_BS, targets)
    for _ in range(SCHEDULE.steps):
        found.advance(ids_BS, targets)
    assert found.measure(ids_BS, targets) < before
    for layer in model.model.layers:
        assert not layer.mlp.experts.gate_up_proj[:, [0, width]].any()
        assert not layer.mlp.experts.down_proj[:, :, 0].any()
        assert layer.mlp.experts.down_proj[:, :, 1].all()
