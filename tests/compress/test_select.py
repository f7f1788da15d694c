from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.select import select, top_experts
from coterie.compress.state import LayerState
from coterie.errors import UnknownName


def slow_reap(state: LayerState) -> list[float]:
    """REAP straight from its definition: the mean of g |f(x)| over the tokens routed to the expert."""
    scores = []
    for expert in range(state.layer.num_experts):
        values = []
        for token, row in enumerate(state.sample.index_TK.tolist()):
            for slot, chosen in enumerate(row):
                if chosen == expert:
                    x = state.sample.inputs_TD[token : token + 1]
                    norm = float(state.original.output(expert, x).double().norm())
                    values.append(float(state.sample.weight_TK[token, slot]) * norm)
        scores.append(sum(values) / len(values) if values else 0.0)
    return scores


def test_reap_keeps_the_experts_with_the_highest_mean_gated_norm(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=10, seed=3)
    after = select(before, LayerPlan(num_experts=4), score="reap")
    scores = slow_reap(before)
    best = sorted(sorted(range(10), key=lambda expert: -scores[expert])[:4])
    assert after.centres_M is not None
    assert after.centres_M.tolist() == best
    assert after.notes["select"]["score"] == pytest.approx(scores)  # type: ignore[index]


def test_frequency_keeps_the_most_chosen_and_slices_experts_and_router_alike(state: Callable[..., LayerState]) -> None:
    before = state(biases=True, seed=1)
    counts = torch.bincount(before.sample.index_TK.flatten(), minlength=8)
    after = select(before, LayerPlan(num_experts=3), score="frequency")
    kept = after.centres_M
    assert kept is not None
    assert counts[kept].min() >= max(counts[e] for e in range(8) if e not in kept.tolist())
    for name, tensor in after.experts.tensors().items():
        assert torch.equal(tensor, before.experts.tensors()[name][kept])
    assert torch.equal(after.router["block.gate.weight"], before.router["block.gate.weight"][kept])
    for expert in range(8):
        expected = kept.tolist().index(expert) if expert in kept.tolist() else -1
        assert after.expert_map_E[expert] == expected


def test_an_expert_that_was_never_chosen_scores_zero(state: Callable[..., LayerState]) -> None:
    before = state(seed=2)
    statistics = dict(before.statistics)
    statistics["usage"] = statistics["usage"].clone()
    statistics["reap"] = statistics["reap"].clone()
    statistics["usage"][5] = statistics["reap"][5] = 0
    after = select(replace(before, statistics=statistics), LayerPlan(num_experts=7), score="reap")
    assert after.expert_map_E[5] == -1


def test_an_unknown_score_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean reap"):
        select(None, LayerPlan(num_experts=1), score="reep")  # type: ignore[arg-type]


@given(
    values=st.lists(st.integers(0, 5), min_size=12, max_size=12),
    groups=st.sampled_from([1, 2, 3, 4]),
    share=st.integers(1, 3),
)
def test_each_router_group_keeps_its_best_share_and_ties_go_to_the_first(
    values: list[int], groups: int, share: int
) -> None:
    chosen = top_experts(torch.tensor(values, dtype=torch.float64), share * groups, groups).tolist()
    size = 12 // groups
    expected: list[int] = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        expected += sorted(sorted(members, key=lambda e: (-values[e], e))[:share])
    assert chosen == expected
