"""Routing among the experts that are in memory, against a routing that never knew of others."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.run.restriction import Restriction, restricted


def route(scores, ready, top_k, *, normalised):
    """Choose by a softmax of scores, of experts in memory alone: one token, in float64."""
    share = np.exp(scores - scores.max())
    share /= share.sum()
    chosen = sorted((expert for expert in range(len(scores)) if ready[expert]), key=lambda e: -scores[e])[:top_k]
    total = sum(share[expert] for expert in chosen) if normalised else 1.0
    return {expert: share[expert] / total for expert in chosen}


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 12), st.booleans())
def test_a_softmax_router_chooses_as_if_there_were_no_other_experts(seed, top_k, num_ready, normalised):
    draws = np.random.default_rng(seed)
    scores, ready = draws.normal(size=(3, 12)) * 2, np.zeros(12, dtype=bool)
    ready[draws.permutation(12)[:num_ready]] = True
    usual = [route(row, np.ones(12, dtype=bool), top_k, normalised=normalised) for row in scores]
    index, weight = restricted(
        torch.tensor([list(row) for row in usual]), torch.tensor([list(row.values()) for row in usual]).float(),
        torch.tensor(ready), torch.tensor(scores).float(), count=top_k,
    )  # fmt: skip
    for row, numbers, weights in zip(scores, index.tolist(), weight.tolist(), strict=True):
        expected = route(row, ready, top_k, normalised=normalised)
        got = {number: value for number, value in zip(numbers, weights, strict=True) if number < 12}
        assert got.keys() == expected.keys()
        assert all(abs(got[number] - expected[number]) < 1e-4 for number in got)
        assert all(value == 0 for number, value in zip(numbers, weights, strict=True) if number == 12)


def test_without_scores_those_that_are_missing_are_left_out():
    index, weight = restricted(
        torch.tensor([[4, 1, 9], [0, 2, 3]]), torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]),
        torch.tensor([True, True] + [False] * 8), None, count=3,
    )  # fmt: skip
    assert index.tolist() == [[10, 1, 10], [0, 10, 10]]
    torch.testing.assert_close(weight, torch.tensor([[0, 1.0, 0], [1.0, 0, 0]]))


def test_of_a_share_the_largest_weights_stay_and_no_expert_stays_no_expert():
    index, weight = restricted(
        torch.tensor([[4, 1, 9, 10]]), torch.tensor([[0.2, 0.5, 0.3, 0.0]]), torch.ones(10, dtype=torch.bool), None,
        count=2,
    )  # fmt: skip
    assert index.tolist() == [[10, 1, 9, 10]]
    torch.testing.assert_close(weight, torch.tensor([[0, 0.625, 0.375, 0]]))


def test_what_is_missing_is_noted_by_layer():
    class Memory:
        def ready(self, layer):
            return np.array([layer == 1, True, False, True])

    restriction = Restriction(Memory(), {})
    index = torch.tensor([[0, 2], [1, 4]])
    for layer in (0, 1):
        restriction.apply(layer, torch.zeros(2, 8), index, torch.ones(2, 2))
    assert restriction.missing == {(0, 0), (0, 2), (1, 2)}
