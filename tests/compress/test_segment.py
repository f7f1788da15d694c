"""Experts cut into parts: against slow loops, and cutting alone changes nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.segment import segment
from coterie.compress.state import LayerState
from coterie.errors import UnknownName

from .conftest import make_state
from .test_slim import measured, slow_scores

EXPERTS, WIDTH, HIDDEN, TOP_K = 8, 6, 5, 2


def route(top_k: int, *, groups: int = 1):
    """A router of softmax over all, normalised over the chosen; parts of one expert tie, the first one goes first."""

    def chosen(router: dict[str, Tensor], inputs_TD: Tensor) -> tuple[Tensor, Tensor]:
        probability_TM = (inputs_TD @ router["block.gate.weight"].T).softmax(-1)
        order_TM = probability_TM.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        weight_TK = probability_TM.gather(1, order_TM)
        return order_TM, weight_TK / weight_TK.sum(1, keepdim=True)

    return chosen


def routed(state: LayerState, top_k: int) -> Tensor:
    """What the layer computes on its sample, token by token, float64."""
    index_TK, weight_TK = route(top_k)(state.router, state.sample.router_inputs_TD)
    out_TD = torch.zeros(len(index_TK), state.experts.down_EDF.shape[1]).double()
    for token in range(len(index_TK)):
        x_1D = state.sample.inputs_TD[token : token + 1]
        for slot in range(top_k):
            out_TD[token] += (
                weight_TK[token, slot].double() * state.experts.output(int(index_TK[token, slot]), x_1D)[0].double()
            )
    return out_TD


def layer(**options) -> LayerState:
    """A layer whose routing is that of `route`, with measured neurons."""
    state, *_ = measured(make_state(top_k=TOP_K, **options))
    index_TK, weight_TK = route(TOP_K)(state.router, state.sample.router_inputs_TD)
    return replace(state, sample=replace(state.sample, index_TK=index_TK, weight_TK=weight_TK))


@pytest.mark.parametrize(("biases", "gate"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("parts", [2, 3])
def test_cutting_alone_changes_nothing(biases: bool, gate: bool, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.compress.methods.segment.GAP", 0.0)
    before = layer(biases=biases, gate=gate)
    size = LayerPlan(num_experts=EXPERTS * parts, width=WIDTH // parts, top_k=TOP_K * parts)
    after = segment(replace(before, route=route(TOP_K * parts)), size, score="heapr", parts=parts)
    assert after.experts.num_experts == EXPERTS * parts
    assert after.experts.width == WIDTH // parts
    torch.testing.assert_close(routed(after, TOP_K * parts), routed(before, TOP_K), rtol=1e-4, atol=1e-5)


def test_the_parts_of_highest_score_stay_whatever_expert_they_are_of() -> None:
    state, h_TEF, u_TED = measured(make_state(top_k=TOP_K))
    scores_EF = slow_scores(state, "heapr", h_TEF, u_TED)
    index_TK, weight_TK = route(TOP_K)(state.router, state.sample.router_inputs_TD)
    state = replace(state, route=route(4), sample=replace(state.sample, index_TK=index_TK, weight_TK=weight_TK))
    parts = []
    for expert in range(EXPERTS):
        order = sorted(range(WIDTH), key=lambda neuron: -float(scores_EF[expert, neuron]))
        for rank in range(3):
            neurons = sorted(order[2 * rank : 2 * rank + 2])
            parts.append((sum(float(scores_EF[expert, neuron]) for neuron in neurons), expert, rank, neurons))
    best = sorted(sorted(parts, key=lambda part: -part[0])[:10], key=lambda part: part[1:3])
    after = segment(state, LayerPlan(num_experts=10, width=2, top_k=4), score="heapr", parts=3)
    assert after.centres_M is not None
    assert after.centres_M.tolist() == [expert for _, expert, _, _ in best]
    for number, (_, expert, _, neurons) in enumerate(best):
        torch.testing.assert_close(after.experts.up_EFD[number], state.experts.up_EFD[expert, neurons])
        down_DF = state.experts.down_EDF[expert][:, neurons]
        ratio = after.experts.down_EDF[number] / down_DF
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4, atol=1e-5)
    note = after.notes["segment"]
    assert isinstance(note, dict)
    assert note["parts_by_expert"] == [sum(part[1] == expert for part in best) for expert in range(EXPERTS)]
    kept = sum(part[0] for part in best) / sum(part[0] for part in parts)
    assert note["share_of_score"] == pytest.approx(kept, rel=1e-5)


def test_what_a_part_weighs_is_made_up_for() -> None:
    """The factor of a part is the least-squares one between what it weighs now and what its expert weighed."""
    state = replace(layer(), route=route(4))
    after = segment(state, LayerPlan(num_experts=10, width=2, top_k=4), score="heapr", parts=3)
    index_TK, weight_TK = route(4)(after.router, state.sample.router_inputs_TD)
    assert after.centres_M is not None
    for part, expert in enumerate(after.centres_M.tolist()):
        both = own = 0.0
        for token in range(len(index_TK)):
            now = sum(float(weight_TK[token, slot]) for slot in range(4) if int(index_TK[token, slot]) == part)
            sample = state.sample
            was = sum(
                float(sample.weight_TK[token, slot])
                for slot in range(TOP_K)
                if int(sample.index_TK[token, slot]) == expert
            )
            both, own = both + now * was, own + now * now
        if own:
            ratio = float(after.experts.down_EDF[part].norm())
            columns = [
                n
                for n in range(WIDTH)
                if any(torch.equal(state.experts.up_EFD[expert, n], row) for row in after.experts.up_EFD[part])
            ]
            assert ratio == pytest.approx(
                both / own * float(state.experts.down_EDF[expert][:, columns].norm()), rel=1e-4
            )


def test_lesser_parts_come_after_better_ones_in_the_router() -> None:
    state = replace(layer(num_experts=4, hidden=3), route=route(4))
    inputs_TD = torch.cat((torch.ones(64, 1), 0.3 * state.sample.inputs_TD[:, 1:]), dim=1)  # (1, 0, 0) is shared
    state = replace(state, sample=replace(state.sample, inputs_TD=inputs_TD))
    after = segment(state, LayerPlan(num_experts=6, width=2, top_k=4), score="heapr", parts=3)
    assert after.centres_M is not None
    logits_TM = inputs_TD @ after.router["block.gate.weight"].T
    owners = after.centres_M.tolist()
    pairs = [(m, m + 1) for m in range(5) if owners[m] == owners[m + 1]]
    assert pairs
    note = after.notes["segment"]
    assert isinstance(note, dict)
    for better, lesser in pairs:
        apart = logits_TM[:, better] - logits_TM[:, lesser]
        torch.testing.assert_close(apart, torch.full_like(apart, note["gap"]), rtol=0.05, atol=0)


def test_groups_keep_equal_shares() -> None:
    state = replace(layer(groups=2), route=route(4))
    after = segment(state, LayerPlan(num_experts=10, width=2, top_k=4), score="heapr", parts=3)
    assert after.centres_M is not None
    assert sum(owner < EXPERTS // 2 for owner in after.centres_M.tolist()) == 5


@pytest.mark.parametrize(
    "size", [LayerPlan(num_experts=EXPERTS, width=4), LayerPlan(num_experts=5), LayerPlan(num_experts=EXPERTS)]
)
def test_where_nothing_can_be_cut_experts_become_narrower_or_fewer(size: LayerPlan) -> None:
    state = replace(layer(), route=route(TOP_K))
    after = segment(state, size, score="heapr", parts=4)
    assert after.experts.num_experts == size.num_experts
    assert after.experts.width == (size.width or WIDTH)
    assert after.router["block.gate.weight"].shape[0] == size.num_experts


def test_a_score_that_is_not_there() -> None:
    with pytest.raises(UnknownName, match="score"):
        segment(layer(), LayerPlan(num_experts=8, width=3, top_k=2), score="nothing", parts=2)
