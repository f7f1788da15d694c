"""Leave-one-out against slow loops that route every token once more without the expert, token by token.

Legend: E experts, T tokens, K chosen experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import coterie.compress.methods.leave_one_out as module
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.leave_one_out import absence_errors, leave_one_out
from coterie.compress.state import LayerState
from coterie.errors import ArchitectureMismatch

#: Router scores of one token, None for an expert that is left out -> weight by chosen expert.
SlowRoute = Callable[[list[float | None]], dict[int, float]]


def slow_softmax(logits: list[float | None]) -> dict[int, float]:
    """Softmax over the experts that are there, two best, not renormalised."""
    there = {expert: math.exp(logit) for expert, logit in enumerate(logits) if logit is not None}
    best = sorted(there, key=lambda expert: -there[expert])[:2]
    return {expert: there[expert] / sum(there.values()) for expert in best}


def slow_groups(logits: list[float | None], bias: list[float], *, sigmoid: bool) -> dict[int, float]:
    """Three experts from the best two of four groups of three; a group counts by its two best (or its best)."""
    if sigmoid:
        score = [-math.inf if each is None else 1 / (1 + math.exp(-each)) for each in logits]
    else:
        total = sum(math.exp(each) for each in logits if each is not None)
        score = [-math.inf if each is None else math.exp(each) / total for each in logits]
    choice = [one + two for one, two in zip(score, bias, strict=True)]
    rank = [sum(sorted(choice[3 * group : 3 * group + 3])[-2 if sigmoid else -1 :]) for group in range(4)]
    groups = sorted(range(4), key=lambda group: -rank[group])[:2]
    allowed = [expert for group in groups for expert in range(3 * group, 3 * group + 3)]
    best = sorted(allowed, key=lambda expert: -choice[expert])[:3]
    return {expert: score[expert] / sum(score[each] for each in best) for expert in best}


def slow_errors(state: LayerState, logits_TE: Tensor, route: SlowRoute) -> list[float]:
    sample, num_experts = state.sample, state.layer.num_experts
    errors = [0.0] * num_experts
    for token, logits in enumerate(logits_TE.tolist()):
        x_D = sample.inputs_TD[token : token + 1]
        output = [state.original.output(expert, x_D)[0].double() for expert in range(num_experts)]
        with_all = route(logits)
        for expert in with_all:
            without = route([None if each == expert else logit for each, logit in enumerate(logits)])
            assert expert not in without
            change_D = sum(weight * output[each] for each, weight in without.items())
            change_D -= sum(weight * output[each] for each, weight in with_all.items())
            errors[expert] += sum(value**2 for value in change_D.tolist())
    return [error / sample.inputs_TD.numel() for error in errors]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_the_score_is_the_mean_squared_change_of_the_output(
    state: Callable[..., LayerState], monkeypatch: pytest.MonkeyPatch, biases: bool, elements: int
) -> None:
    monkeypatch.setattr(module, "CHANGE_ELEMENTS", elements)
    before = state(num_experts=7, tokens=40, seed=4, biases=biases)
    expected = slow_errors(before, before.sample.inputs_TD @ before.router["block.gate.weight"].T, slow_softmax)
    assert absence_errors(before).tolist() == pytest.approx(expected, rel=1e-4)
    after = leave_one_out(before, LayerPlan(num_experts=3))
    assert after.centres_M is not None
    assert after.centres_M.tolist() == sorted(sorted(range(7), key=lambda expert: -expected[expert])[:3])
    assert after.notes["leave-one-out"]["score"] == pytest.approx(expected, rel=1e-4)  # type: ignore[index]
    assert torch.equal(after.router["block.gate.weight"], before.router["block.gate.weight"][after.centres_M])
    assert torch.equal(after.experts.up_EFD, before.experts.up_EFD[after.centres_M])


def test_full_size_asks_no_router_and_keeps_everything(state: Callable[..., LayerState]) -> None:
    def never(router: Mapping[str, Tensor], block_TD: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("asked")

    before = state(num_experts=4)
    after = leave_one_out(replace(before, route=never), LayerPlan(num_experts=4))
    assert after.expert_map_E.tolist() == [0, 1, 2, 3]
    assert torch.equal(after.experts.down_EDF, before.experts.down_EDF)


def grouped(state: LayerState, *, sigmoid: bool, bias: bool, scale: bool = False) -> LayerState:
    """The state with a router of four groups; `bias` corrects the choice, `scale` multiplies the weights."""
    generator = torch.Generator().manual_seed(9)
    router = {"block.gate.weight": state.router["block.gate.weight"].T.clone()}  # the expert axis need not be first
    if bias:
        router["block.gate.bias"] = 0.2 * torch.randn(1, 12, generator=generator)
    if scale:
        router["block.gate.scale"] = 1 + torch.rand(12, generator=generator)

    def route(router: Mapping[str, Tensor], block_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = block_TD @ router["block.gate.weight"]
        score_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
        choice_TE = score_TE + router["block.gate.bias"] if bias else score_TE
        rank_TG = choice_TE.view(-1, 4, 3).topk(2 if sigmoid else 1).values.sum(-1)
        best_TG = rank_TG.topk(2).indices
        open_TG = torch.zeros_like(rank_TG, dtype=torch.bool).scatter_(1, best_TG, True)
        index_TK = choice_TE.masked_fill(~open_TG.repeat_interleave(3, 1), -torch.inf).topk(3).indices
        weight_TK = score_TE.gather(1, index_TK)
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        return index_TK, weight_TK * router["block.gate.scale"][index_TK] if scale else weight_TK

    axes = (("block.gate.weight", 1), ("block.gate.bias", 1), ("block.gate.scale", 0))
    router_tensors = tuple((name, axis) for name, axis in axes if name in router)
    layer = replace(state.layer, num_groups=4, top_k=3, router_tensors=router_tensors)
    return replace(state, layer=layer, router=router, route=route)


@pytest.mark.parametrize(("sigmoid", "bias"), [(True, True), (True, False), (False, False)])
def test_with_router_groups_the_expert_is_put_out_of_reach(
    state: Callable[..., LayerState], sigmoid: bool, bias: bool
) -> None:
    before = grouped(state(num_experts=12, tokens=40, seed=2), sigmoid=sigmoid, bias=bias)
    logits_TE = before.sample.inputs_TD @ before.router["block.gate.weight"]
    values = before.router["block.gate.bias"][0].tolist() if bias else [0.0] * 12
    expected = slow_errors(before, logits_TE, lambda logits: slow_groups(logits, values, sigmoid=sigmoid))
    assert absence_errors(before).tolist() == pytest.approx(expected, rel=1e-4)
    after = leave_one_out(before, LayerPlan(num_experts=8))
    assert after.centres_M is not None
    assert (after.centres_M // 3).bincount().tolist() == [2, 2, 2, 2]
    assert after.router["block.gate.weight"].shape == (5, 8)


def test_a_scale_of_each_expert_is_no_bias_to_push_down(state: Callable[..., LayerState]) -> None:
    before = grouped(state(num_experts=12, tokens=40, seed=2), sigmoid=False, bias=False, scale=True)
    logits_TE, scale = before.sample.inputs_TD @ before.router["block.gate.weight"], before.router["block.gate.scale"]

    def slow(logits: list[float | None]) -> dict[int, float]:
        chosen = slow_groups(logits, [0.0] * 12, sigmoid=False)
        return {expert: weight * float(scale[expert]) for expert, weight in chosen.items()}

    assert absence_errors(before).tolist() == pytest.approx(slow_errors(before, logits_TE, slow), rel=1e-4)


def test_a_grouped_router_that_cannot_be_closed_for_an_expert_is_refused(state: Callable[..., LayerState]) -> None:
    def stubborn(router: Mapping[str, Tensor], block_TD: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(block_TD), 1, dtype=torch.int64), torch.ones(len(block_TD), 1)

    before = replace(grouped(state(num_experts=12, tokens=40), sigmoid=True, bias=True), route=stubborn)
    with pytest.raises(
        ArchitectureMismatch, match=r"block: no change of .* keeps 40 of 40 tokens .* expert 0.* use reap"
    ):
        leave_one_out(before, LayerPlan(num_experts=8))


def test_protected_experts_stay(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=6, tokens=40)
    worst = int(absence_errors(before).argmin())
    protected_E = torch.arange(6) == worst
    after = leave_one_out(replace(before, protected_E=protected_E), LayerPlan(num_experts=2))
    assert after.expert_map_E[worst] >= 0
    assert leave_one_out(before, LayerPlan(num_experts=2)).expert_map_E[worst] == -1


@pytest.mark.parametrize("model_type", ["olmoe", "qwen2_moe", "gpt_oss", "glm4_moe", "ernie4_5_moe", "granitemoe"])
def test_putting_an_expert_out_of_reach_is_leaving_out_its_row(
    family_state: Callable[..., LayerState], model_type: str
) -> None:
    """The families whose routers have no groups here can be asked both ways."""
    state = family_state(model_type)
    assert state.layer.num_groups == 1
    closed = module._Closed(state)
    block_TD = state.sample.router_inputs_TD
    for expert in range(8):
        both = [closed.route(expert, block_TD), closed._far_away(expert, block_TD)]
        found = [torch.zeros(len(block_TD), 9).scatter_add_(1, index_TK, weight_TK) for index_TK, weight_TK in both]
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
        assert not found[0][:, expert].any()


def test_a_family_with_router_groups_has_its_experts_left_out_one_at_a_time(
    family_state: Callable[..., LayerState],
) -> None:
    state = family_state("deepseek_v3")
    assert state.layer.num_groups > 1
    closed, whole = module._Closed(state), state.route(state.router, state.sample.router_inputs_TD)
    for expert in range(8):
        index_TK, _ = closed.route(expert, state.sample.router_inputs_TD)
        assert not (index_TK == expert).any()
        untouched = ~(whole[0] == expert).any(1)
        same = index_TK.sort(1).values[untouched] == whole[0].sort(1).values[untouched]
        assert same.float().mean() > 0.5, "groups count by their two best, so some tokens move; most do not"
    assert (absence_errors(state) > 0).all()
