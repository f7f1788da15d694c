"""NAEE's search against slow loops in float64 that route, compute and compare token by token, subset by subset.

Legend: E experts, M kept, T tokens, K chosen experts.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import coterie.compress.methods.subset_search as module
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.select import select
from coterie.compress.methods.subset_search import Judge, all_subsets, num_subsets, subset_search
from coterie.compress.state import LayerState


def outputs_of(state: LayerState) -> Tensor:
    """f_e(x_t) of all experts and tokens, (E, T, D) float64."""
    experts = state.original.map(Tensor.double)
    return torch.stack(
        [experts.output(expert, state.sample.inputs_TD.double()) for expert in range(state.layer.num_experts)]
    )


def slow_error(state: LayerState, output_ETD: Tensor, kept: Sequence[int]) -> float:
    """Squared distance to the original output when tokens choose the two best of `kept`, softmax over `kept`."""
    total = 0.0
    for token, x_D in enumerate(state.sample.inputs_TD.double()):
        logits = [float(state.router["block.gate.weight"][expert].double() @ x_D) for expert in kept]
        mass = [math.exp(logit) for logit in logits]
        best = sorted(range(len(kept)), key=lambda place: -logits[place])[:2]
        output_D = sum(mass[place] / sum(mass) * output_ETD[kept[place], token] for place in best)
        total += float((output_D - state.sample.output_TD[token].double()).square().sum())
    return total


def slow_best(state: LayerState, subsets: Sequence[Sequence[int]]) -> tuple[list[int], float]:
    output_ETD = outputs_of(state)
    errors = {tuple(kept): slow_error(state, output_ETD, kept) for kept in subsets}
    best = min(errors, key=lambda kept: errors[kept])
    return list(best), errors[best]


def kept_of(state: LayerState) -> list[int]:
    assert state.centres_M is not None
    return state.centres_M.tolist()


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_of_all_subsets_is_found(
    state: Callable[..., LayerState], monkeypatch: pytest.MonkeyPatch, quick: bool, seed: int
) -> None:
    if not quick:
        monkeypatch.setattr(module, "find_quick_route", lambda *args, **options: None)
    before = state(num_experts=7, tokens=24, seed=seed, biases=True)
    best, error = slow_best(before, list(itertools.combinations(range(7), 3)))
    after = subset_search(before, LayerPlan(num_experts=3))
    note = after.notes["subset-search"]
    assert kept_of(after) == best
    target = float(before.sample.output_TD.double().square().sum())
    assert note["error"] == pytest.approx(error / target, rel=1e-4)  # type: ignore[index]
    assert (note["exhaustive"], note["subsets_judged"], note["tokens"]) == (True, 35 + 1, 24)  # type: ignore[index]
    start = slow_error(before, outputs_of(before), kept_of(select(before, LayerPlan(num_experts=3), score="reap")))
    assert note["error_reap"] == pytest.approx(start / target, rel=1e-4)  # type: ignore[index]
    assert note["error"] <= note["error_reap"]  # type: ignore[index]
    assert torch.equal(after.router["block.gate.weight"], before.router["block.gate.weight"][best])
    assert torch.equal(after.experts.down_EDF, before.experts.down_EDF[best])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_swap_search_ends_where_no_swap_helps(state: Callable[..., LayerState], seed: int) -> None:
    before = state(num_experts=8, tokens=24, seed=seed)
    after = subset_search(before, LayerPlan(num_experts=4), evaluations=69)  # one fewer than there are subsets
    note, kept, output_ETD = after.notes["subset-search"], kept_of(after), outputs_of(before)
    assert note["exhaustive"] is False  # type: ignore[index]
    assert note["subsets_judged"] < 69, "it ended by itself"  # type: ignore[index]
    error = slow_error(before, output_ETD, kept)
    for leaving, coming in itertools.product(kept, set(range(8)) - set(kept)):
        trial = sorted({*kept, coming} - {leaving})
        assert slow_error(before, output_ETD, trial) >= error * (1 - 1e-6)
    assert note["error"] <= note["error_reap"]  # type: ignore[index]


def test_the_swap_search_finds_the_best_of_all_more_often_than_not(state: Callable[..., LayerState]) -> None:
    found = 0
    for seed in range(8):
        before = state(num_experts=8, tokens=32, seed=seed)
        best = subset_search(before, LayerPlan(num_experts=4))
        found += kept_of(subset_search(before, LayerPlan(num_experts=4), evaluations=69)) == kept_of(best)
    assert found >= 5


@pytest.mark.parametrize("evaluations", [1, 3, 10])
def test_the_search_ends_when_its_evaluations_are_used_up(state: Callable[..., LayerState], evaluations: int) -> None:
    after = subset_search(state(num_experts=8, tokens=24), LayerPlan(num_experts=4), evaluations=evaluations)
    assert after.notes["subset-search"]["subsets_judged"] == evaluations  # type: ignore[index]
    assert len(kept_of(after)) == 4


def test_swaps_that_promise_most_come_first(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=6, tokens=30, seed=5)
    kept, output_ETD = [0, 2, 3], outputs_of(before)
    rows_M = torch.tensor(kept)
    index_TK, weight_TK = before.route(
        {"block.gate.weight": before.router["block.gate.weight"][rows_M]}, before.sample.inputs_TD
    )
    promise: dict[tuple[int, int], float] = {}
    for leaving, coming in itertools.product(kept, [1, 4, 5]):
        total = 0.0
        for token in range(30):
            missing_D = -before.sample.output_TD[token].double()
            for place, weight in zip(index_TK[token].tolist(), weight_TK[token].tolist(), strict=True):
                missing_D = missing_D + weight * output_ETD[kept[place], token]
            lost, won = torch.zeros(5).double(), torch.zeros(5).double()
            for place, weight in zip(index_TK[token].tolist(), weight_TK[token].tolist(), strict=True):
                if kept[place] == leaving:
                    lost = weight * output_ETD[leaving, token]
            for slot, expert in enumerate(before.sample.index_TK[token].tolist()):
                if expert == coming:
                    won = float(before.sample.weight_TK[token, slot]) * output_ETD[coming, token]
            for change_D in (-lost, won):
                total += float((missing_D + change_D).square().sum() - missing_D.square().sum())
        promise[leaving, coming] = total
    assert Judge(before, rows_M).swaps(rows_M) == sorted(promise, key=lambda pair: promise[pair])


def grouped(state: LayerState) -> LayerState:
    """The state with two router groups of four, of which the better one is open to a token."""

    def route(router: Mapping[str, Tensor], block_TD: Tensor) -> tuple[Tensor, Tensor]:
        score_TE = (block_TD @ router["block.gate.weight"].T).sigmoid()
        half = score_TE.shape[1] // 2
        rank_TG = score_TE.view(-1, 2, half).topk(2).values.sum(-1)
        closed_TG = rank_TG < rank_TG.amax(1, keepdim=True)
        weight_TK, index_TK = score_TE.masked_fill(closed_TG.repeat_interleave(half, 1), -1).topk(2)
        return index_TK, weight_TK

    return replace(state, layer=replace(state.layer, num_groups=2), route=route)


@pytest.mark.parametrize("evaluations", [4096, 17])
def test_groups_keep_equal_shares_and_protected_experts_stay(
    state: Callable[..., LayerState], evaluations: int
) -> None:
    before = grouped(state(num_experts=8, tokens=40, seed=1))
    size = LayerPlan(num_experts=4)
    free = subset_search(before, size, evaluations=evaluations)
    assert [sum(expert // 4 == group for expert in kept_of(free)) for group in range(2)] == [2, 2]
    dropped = [expert for expert in range(8) if expert not in kept_of(free)]
    protected_E = torch.zeros(8, dtype=torch.bool)
    protected_E[dropped[0]] = True
    held = replace(before, protected_E=protected_E)
    after = subset_search(held, size, evaluations=evaluations)
    assert dropped[0] in kept_of(after)
    assert [sum(expert // 4 == group for expert in kept_of(after)) for group in range(2)] == [2, 2]
    assert num_subsets(before, 4) == 36
    assert num_subsets(held, 4) == 18
    listed = [tuple(rows_M.tolist()) for rows_M in all_subsets(held, 4)]
    expected = {
        kept for kept in itertools.combinations(range(8), 4)
        if dropped[0] in kept and sum(expert < 4 for expert in kept) == 2
    }  # fmt: skip
    assert len(listed) == 18
    assert set(listed) == expected


def test_the_judge_thins_a_sample_that_would_take_too_much(
    state: Callable[..., LayerState], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(num_experts=6, tokens=30)
    monkeypatch.setattr(module, "OUTPUTS", 6 * 12)
    judge = Judge(before, torch.arange(3))
    assert judge.tokens_T.tolist() == list(range(0, 30, 3)), "at most 12 tokens, evenly spaced"
    few = replace(before.sample, **{name: value[::3] for name, value in before.sample.tensors().items()})
    expected = slow_error(replace(before, sample=few), outputs_of(replace(before, sample=few)), [0, 2, 4])
    assert judge.error(torch.tensor([0, 2, 4])) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(module, "PRODUCTS", 49 * 5)
    assert len(Judge(before, torch.arange(3)).tokens_T) == 5


@pytest.mark.parametrize("elements", [1, 200])
def test_chunks_do_not_matter(state: Callable[..., LayerState], monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    before, rows_M = state(num_experts=6, tokens=30), torch.tensor([0, 2, 4])
    whole = Judge(before, rows_M).error(rows_M)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
    assert Judge(before, rows_M).error(rows_M) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3"])
def test_tokens_without_an_expert_and_families_of_their_own(
    family_state: Callable[..., LayerState], model_type: str
) -> None:
    """The error of a subset is what a model of these experts would really do to the layer's output."""
    state = family_state(model_type)
    rows_M = torch.tensor([0, 2, 5, 6])
    index_TK, weight_TK = state.route(
        {name: tensor.index_select(axis, rows_M) for name, tensor in state.router.items()
         for each, axis in state.layer.router_tensors if each == name},
        state.sample.router_inputs_TD,
    )  # fmt: skip
    total = 0.0
    for token, x_D in enumerate(state.sample.inputs_TD):
        output_D = torch.zeros_like(x_D, dtype=torch.float64)
        for place, weight in zip(index_TK[token].tolist(), weight_TK[token].tolist(), strict=True):
            output_D += weight * state.original.output(int(rows_M[place]), x_D[None])[0].double()
        total += float((output_D - state.sample.output_TD[token]).square().sum())
    judge = Judge(state, rows_M)
    assert judge.error(rows_M) == pytest.approx(total, rel=1e-4)
    assert judge.error(torch.arange(8)) == pytest.approx(0, abs=1e-5 * judge.target), "all experts: no distance"

    def absent(router: Mapping[str, Tensor], block_TD: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(block_TD), 2), len(rows_M)), torch.ones(len(block_TD), 2)

    assert Judge(replace(state, route=absent), rows_M).error(rows_M) == pytest.approx(judge.target, rel=1e-5)


def test_full_size_asks_no_router(state: Callable[..., LayerState]) -> None:
    def never(router: Mapping[str, Tensor], block_TD: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("asked")

    after = subset_search(replace(state(num_experts=4), route=never), LayerPlan(num_experts=4))
    assert kept_of(after) == [0, 1, 2, 3]
