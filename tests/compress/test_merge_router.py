from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.average import average
from coterie.compress.methods.cluster import cluster
from coterie.compress.methods.merge_router import merge_router
from coterie.compress.methods.refit_router import HELD_OUT
from coterie.compress.state import LayerState
from coterie.errors import UnknownName

SIZE = LayerPlan(num_experts=3)
WEIGHT = "block.gate.weight"


def merged(state: LayerState, size: LayerPlan = SIZE) -> LayerState:
    return average(cluster(state, size, rule="mergemoe"), size)


def with_more_tensors(state: LayerState) -> LayerState:
    """A router with a bias, a table of whole numbers whose second axis is the experts', and spare rows."""
    generator = torch.Generator().manual_seed(3)
    router = {
        WEIGHT: torch.cat((state.router[WEIGHT], torch.randn(2, 5, generator=generator))),
        "block.gate.bias": torch.randn(8, generator=generator),
        "block.table": torch.arange(16).view(2, 8),
    }
    layer = replace(state.layer, router_tensors=((WEIGHT, 0), ("block.gate.bias", 0), ("block.table", 1)))
    return replace(state, layer=layer, router=router)


def test_the_plain_router_has_the_centres_rows(state: Callable[..., LayerState]) -> None:
    before = merged(state(seed=12))
    after = merge_router(before, SIZE)
    assert before.centres_M is not None
    for row, centre in enumerate(before.centres_M.tolist()):
        assert torch.equal(after.router[WEIGHT][row], before.router[WEIGHT][centre])


def test_mean_rows_are_usage_weighted_means_of_every_tensor(state: Callable[..., LayerState]) -> None:
    before = merged(with_more_tensors(state(seed=13)))
    after = merge_router(before, SIZE, rows="mean")
    assert before.clusters_E is not None
    assert before.centres_M is not None
    labels, usage = before.clusters_E.tolist(), before.statistics["usage"].tolist()
    for row, centre in enumerate(before.centres_M.tolist()):
        members = [expert for expert in range(8) if labels[expert] == row]
        total = sum(usage[member] for member in members)
        for name in (WEIGHT, "block.gate.bias"):
            mean = sum(usage[member] / total * before.router[name][member].double() for member in members)
            torch.testing.assert_close(after.router[name][row].double(), mean, atol=1e-6, rtol=1e-6)
        assert torch.equal(after.router["block.table"][:, row], before.router["block.table"][:, centre])
    assert torch.equal(after.router[WEIGHT][3:], before.router[WEIGHT][8:])
    assert after.router["block.gate.bias"].shape == (3,)
    assert after.router["block.table"].dtype == torch.int64


def slow_error(state: LayerState, router: Mapping[str, Tensor]) -> float:
    """Relative squared error of the routed output, token by token, over the held-out tokens."""
    squared = target = 0.0
    for token in range(HELD_OUT - 1, len(state.sample.inputs_TD), HELD_OUT):
        x = state.sample.inputs_TD[token : token + 1]
        index, weight = state.route(router, x)
        wanted = state.sample.output_TD[token].double()
        found = torch.zeros_like(wanted)
        for expert, share in zip(index[0].tolist(), weight[0].tolist(), strict=True):
            if expert < state.experts.num_experts:
                found += share * state.experts.output(expert, x)[0].double()
        squared += float((wanted - found).square().sum())
        target += float(wanted.square().sum())
    return squared / target


@pytest.mark.parametrize("seed", range(4))
def test_the_best_rows_are_those_with_the_smaller_error_on_held_out_tokens(
    state: Callable[..., LayerState], seed: int
) -> None:
    before = merged(state(seed=seed, tokens=101, biases=seed % 2 == 0))
    rows = {name: merge_router(before, SIZE, rows=name).router for name in ("centre", "mean")}
    errors = {name: slow_error(before, router) for name, router in rows.items()}
    after = merge_router(before, SIZE, rows="best")
    notes = after.notes["merge-router"]
    assert isinstance(notes, dict)
    assert notes["heldout_error"] == pytest.approx(errors, rel=1e-4)
    assert notes["rows"] == min(errors, key=lambda name: errors[name])
    assert torch.equal(after.router[WEIGHT], rows[notes["rows"]][WEIGHT])


@pytest.mark.parametrize("rows", ["centre", "mean", "best"])
def test_full_size_is_bit_identical(state: Callable[..., LayerState], rows: str) -> None:
    size = LayerPlan(num_experts=8)
    before = merged(state(seed=14), size)
    assert torch.equal(merge_router(before, size, rows=rows).router[WEIGHT], before.router[WEIGHT])


def test_unknown_rows_are_refused(state: Callable[..., LayerState]) -> None:
    with pytest.raises(UnknownName, match="did you mean centre"):
        merge_router(merged(state()), SIZE, rows="center")
