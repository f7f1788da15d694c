"""The quick stand-in for a router decides as the router does, or is not used.

Legend: E experts, M of them, T tokens, K chosen experts.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coterie.compress.methods.select import slice_router
from coterie.compress.quick_route import QuickRoute, find_quick_route
from coterie.compress.state import LayerState

#: Families whose routers are softmax or sigmoid of one linear map, with and without biases and scales.
QUICK = ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "ernie4_5_moe", "glm4_moe", "granitemoe"]


def exact(state: LayerState) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda rows_M: state.route(slice_router(state, rows_M), state.sample.router_inputs_TD)


def find(state: LayerState, count: int = 4) -> QuickRoute | None:
    num_experts = state.layer.num_experts
    subsets = [torch.arange(num_experts), torch.arange(count), torch.arange(num_experts - count, num_experts)]
    return find_quick_route(
        exact(state), state.router, dict(state.layer.router_tensors), state.sample.router_inputs_TD, subsets,
        top_k=state.layer.top_k,
    )  # fmt: skip


def by_expert(index_TK: Tensor, weight_TK: Tensor, count: int) -> Tensor:
    return torch.zeros(len(index_TK), count + 1).scatter_add_(1, index_TK, weight_TK)[:, :count]


@pytest.mark.parametrize("model_type", QUICK)
def test_it_decides_as_the_familys_own_router_on_every_subset(
    family_state: Callable[..., LayerState], model_type: str
) -> None:
    state = family_state(model_type)
    quick = find(state)
    assert quick is not None
    ask = exact(state)
    for rows in itertools.islice(itertools.combinations(range(8), 4), 0, None, 3):
        rows_M = torch.tensor(rows)
        expected, found = by_expert(*ask(rows_M), 4), by_expert(*quick(rows_M), 4)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert (expected > 0).sum() > 0


def test_what_it_found_is_the_form_of_the_router(family_state: Callable[..., LayerState]) -> None:
    plain, corrected = find(family_state("mixtral")), find(family_state("glm4_moe"))
    assert plain is not None
    assert (plain.sigmoid, plain.normalised, plain.scale) == (False, True, pytest.approx(1))
    assert not plain.choice_E.any()
    assert corrected is not None
    assert (corrected.sigmoid, corrected.normalised) == (True, True)
    assert corrected.choice_E.any(), "the correction bias chooses and does not weigh"


@pytest.mark.parametrize("what", ["squared scores", "noise", "weights of another form", "one more choice"])
def test_a_router_of_another_form_has_none(state: Callable[..., LayerState], what: str) -> None:
    before = state(num_experts=8)

    def other(router, block_TD):
        index_TK, weight_TK = before.route(router, block_TD)
        if what == "squared scores":
            score_TE = (block_TD @ router["block.gate.weight"].T).square().softmax(-1)
            weight_TK, index_TK = score_TE.topk(2)
        elif what == "noise":
            index_TK = torch.where(torch.arange(len(index_TK))[:, None] == 5, (index_TK + 1) % 4, index_TK)
        elif what == "weights of another form":
            weight_TK = weight_TK.sqrt()
        else:
            index_TK, weight_TK = index_TK.repeat(1, 2)[:, :3], weight_TK.repeat(1, 2)[:, :3]
        return index_TK, weight_TK

    assert find(before) is not None
    assert find(replace(before, route=other)) is None


def test_a_router_of_two_matrices_has_none(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=8)
    two = {**before.router, "block.gate.second": before.router["block.gate.weight"].clone()}
    layer = replace(before.layer, router_tensors=(*before.layer.router_tensors, ("block.gate.second", 0)))
    assert find(replace(before, router=two, layer=layer)) is None
