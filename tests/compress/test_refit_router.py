from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods import refit_router as module
from coterie.compress.methods.average import average
from coterie.compress.methods.cluster import cluster
from coterie.compress.methods.merge_router import merge_router
from coterie.compress.methods.refit_router import HELD_OUT, Outputs, measure_router, refit_router
from coterie.compress.methods.select import select
from coterie.compress.state import LayerState

SIZE = LayerPlan(num_experts=3)
WEIGHT, BIAS, CORRECTION = "block.gate.weight", "block.gate.bias", "block.gate.correction"


def merged(state: LayerState, rows: str = "centre") -> LayerState:
    return merge_router(average(cluster(state, SIZE, rule="mergemoe"), SIZE), SIZE, rows=rows)


def slow_error(state: LayerState, index: Tensor, weight: Tensor, tokens: list[int]) -> float:
    """Relative squared error of the weighted sums of expert outputs, token by token."""
    squared = target = 0.0
    for row, token in enumerate(tokens):
        wanted = state.sample.output_TD[token].double()
        found = torch.zeros_like(wanted)
        for expert, share in zip(index[row].tolist(), weight[row].tolist(), strict=True):
            if expert < state.experts.num_experts:
                value = state.experts.output(expert, state.sample.inputs_TD[token : token + 1])[0]
                found += share * value.double()
        squared += float((wanted - found).square().sum())
        target += float(wanted.square().sum())
    return squared / target


@pytest.mark.parametrize("biases", [False, True])
def test_the_error_from_inner_products_is_that_token_by_token(state: Callable[..., LayerState], biases: bool) -> None:
    before = merged(state(tokens=30, biases=biases, seed=50))
    tokens = list(range(1, 30, 3))
    outputs = Outputs.of(before, torch.tensor(tokens))
    index, weight = before.route(before.router, outputs.router_inputs_TD)
    index[0, 1] = 3  # no expert
    found = float(outputs.error(index, weight))
    assert found == pytest.approx(slow_error(before, index, weight, tokens), rel=1e-4)


def test_the_refit_is_never_worse_on_held_out_tokens_and_often_better(state: Callable[..., LayerState]) -> None:
    better = 0
    for seed in range(3):
        before = merged(state(tokens=200, seed=60 + seed), rows="best")
        after = refit_router(before, SIZE, steps=150)
        held_out = list(range(HELD_OUT - 1, 200, HELD_OUT))
        errors = [
            slow_error(before, *before.route(router, before.sample.inputs_TD[held_out]), held_out)
            for router in (before.router, after.router)
        ]
        notes = after.notes["refit-router"]
        assert isinstance(notes, dict)
        assert errors == pytest.approx([notes["heldout_error_before"], notes["heldout_error_refit"]], rel=1e-4)
        assert errors[1] <= errors[0] * (1 + 1e-5)
        assert notes["kept"] == torch.equal(after.router[WEIGHT], before.router[WEIGHT])
        better += errors[1] < 0.98 * errors[0]
    assert better >= 2


def test_other_tokens_can_be_held_out(state: Callable[..., LayerState]) -> None:
    before = merged(state(tokens=200, seed=60), rows="best")
    after = refit_router(before, SIZE, steps=30, held_out=7)
    held_out = list(range(6, 200, 7))
    errors = [
        slow_error(before, *before.route(router, before.sample.inputs_TD[held_out]), held_out)
        for router in (before.router, after.router)
    ]
    notes = after.notes["refit-router"]
    assert isinstance(notes, dict)
    assert errors == pytest.approx([notes["heldout_error_before"], notes["heldout_error_refit"]], rel=1e-4)
    assert measure_router(before, after.router, held_out=7) == pytest.approx(errors[1], rel=1e-4)


def test_rows_that_were_spoiled_are_found_again(state: Callable[..., LayerState]) -> None:
    """When the experts are exact and only the rows are off, the re-fit takes most of the error away."""
    before = select(state(tokens=600, seed=70), LayerPlan(num_experts=4), score="frequency")
    index, weight = before.route(before.router, before.sample.inputs_TD)
    target = torch.zeros_like(before.sample.output_TD)
    for token in range(600):
        for expert, share in zip(index[token].tolist(), weight[token].tolist(), strict=True):
            target[token] += share * before.experts.output(expert, before.sample.inputs_TD[token : token + 1])[0]
    noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    spoiled = replace(
        before,
        sample=replace(before.sample, output_TD=target),
        router={WEIGHT: before.router[WEIGHT] + 0.2 * noise},
    )
    after = refit_router(spoiled, LayerPlan(num_experts=4), steps=150)
    assert measure_router(after, after.router) < 0.2 * measure_router(spoiled, spoiled.router)


def test_where_nothing_is_wrong_nothing_changes(state: Callable[..., LayerState]) -> None:
    """Experts that no token chose are dropped: what is left computes the same, and keeps its rows."""
    plain = state(tokens=80, seed=66)
    unused = torch.tensor([0.0, 0, 0, 0, 0, 0, 1e4, 1e4])

    def route(router: Mapping[str, Tensor], inputs_TD: Tensor) -> tuple[Tensor, Tensor]:
        scores = inputs_TD @ router[WEIGHT].T
        index = (scores - router[BIAS]).topk(2).indices
        return index, scores.sigmoid().gather(1, index)

    router = {WEIGHT: plain.router[WEIGHT], BIAS: unused}
    index, weight = route(router, plain.sample.inputs_TD)
    target = torch.zeros_like(plain.sample.output_TD)
    for token in range(80):
        for expert, share in zip(index[token].tolist(), weight[token].tolist(), strict=True):
            target[token] += share * plain.experts.output(expert, plain.sample.inputs_TD[token : token + 1])[0]
    layer = replace(plain.layer, router_tensors=((WEIGHT, 0), (BIAS, 0)))
    kept = torch.arange(6)
    before = replace(
        plain,
        layer=layer,
        router={name: tensor[kept] for name, tensor in router.items()},
        experts=plain.experts.select(kept),
        sample=replace(plain.sample, output_TD=target),
        route=route,
    )
    after = refit_router(before, LayerPlan(num_experts=6))
    assert torch.equal(after.router[WEIGHT], before.router[WEIGHT])
    notes = after.notes["refit-router"]
    assert isinstance(notes, dict)
    assert notes["kept"]
    assert 0 <= notes["heldout_error_before"] < 1e-5


def test_it_is_deterministic(state: Callable[..., LayerState]) -> None:
    before = merged(state(tokens=100, seed=61))
    first, second = (refit_router(before, SIZE, steps=30).router for _ in range(2))
    assert torch.equal(first[WEIGHT], second[WEIGHT])


def corrected_route(router: Mapping[str, Tensor], inputs_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid scores with a bias; a correction that steers the choice only; a row behind the experts' is ignored."""
    count = len(router[BIAS])
    scores = (inputs_TD @ router[WEIGHT][:count].T + router[BIAS]).sigmoid()
    index = (scores + router[CORRECTION]).topk(2).indices
    return index, scores.gather(1, index)


def test_only_what_the_weights_depend_on_is_fitted(state: Callable[..., LayerState]) -> None:
    plain = state(tokens=300, seed=62)
    generator = torch.Generator().manual_seed(4)
    router = {
        WEIGHT: torch.cat((plain.router[WEIGHT], torch.randn(1, 5, generator=generator))),
        BIAS: torch.zeros(8),
        CORRECTION: 0.1 * torch.randn(8, generator=generator),
        "block.table": torch.arange(8),
    }
    layer = replace(plain.layer, router_tensors=tuple((name, 0) for name in router))
    before = merged(replace(plain, layer=layer, router=router, route=corrected_route))
    after = refit_router(before, SIZE, steps=60)
    notes = after.notes["refit-router"]
    assert isinstance(notes, dict)
    assert not notes["kept"]
    assert not torch.equal(after.router[WEIGHT][:3], before.router[WEIGHT][:3])
    assert not torch.equal(after.router[BIAS], before.router[BIAS])
    for name, rows in ((WEIGHT, slice(3, None)), (CORRECTION, slice(None)), ("block.table", slice(None))):
        assert torch.equal(after.router[name][rows], before.router[name][rows])


def test_full_size_is_bit_identical(state: Callable[..., LayerState]) -> None:
    before = state(seed=63)
    assert refit_router(before, LayerPlan(num_experts=8)) is before


def test_a_sample_of_a_token_or_two_is_enough_to_do_nothing(state: Callable[..., LayerState]) -> None:
    before = merged(state(tokens=2, seed=64))
    after = refit_router(before, SIZE)
    assert torch.equal(after.router[WEIGHT], before.router[WEIGHT])


def test_of_a_sample_that_is_too_large_evenly_spaced_tokens_are_used(
    state: Callable[..., LayerState], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = merged(state(tokens=100, seed=65))
    monkeypatch.setattr(module, "LIMIT", 20 * 3**2)
    index, weight = before.route(before.router, before.sample.inputs_TD[15::20])
    expected = slow_error(before, index, weight, [15, 35, 55, 75, 95])
    assert measure_router(before, before.router) == pytest.approx(expected, rel=1e-4)
