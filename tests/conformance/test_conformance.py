"""Every recipe and every tiny family keeps the promises; and the checks see it when one does not."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from coterie.compress import methods, recipes
from coterie.compress.methods.select import slice_router
from coterie.testing import check_family, check_method, tiny_families


@pytest.mark.parametrize("recipe", sorted(recipes.RECIPES))
def test_recipe_keeps_its_promises(recipe):
    check_method(recipe)


@pytest.mark.parametrize("model_type", tiny_families())
def test_family_goes_all_the_way(model_type):
    check_family(model_type, thorough=False)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", tiny_families())
def test_family_goes_all_the_way_with_every_recipe_and_router_form(model_type):
    check_family(model_type)


def keep(state, kept_M):
    expert_map_E = torch.full_like(state.expert_map_E, -1)
    expert_map_E[kept_M] = torch.arange(len(kept_M))
    router = slice_router(state, kept_M)
    return replace(state, experts=state.experts.select(kept_M), router=router, expert_map_E=expert_map_E)


def keep_first(state, size):
    return keep(state, torch.arange(size.num_experts))


def keep_most_used(state, size):
    return keep(state, state.statistics["usage"].argsort(descending=True)[: size.num_experts].sort().values)


def touch_at_full_size(state, size):
    kept = keep_most_used(state, size)
    return replace(kept, experts=kept.experts.map(lambda tensor: tensor * 1.001))


def add_noise(state, size):
    kept = keep_most_used(state, size)
    if size.num_experts == state.layer.num_experts:
        return kept
    return replace(kept, experts=kept.experts.map(lambda tensor: tensor + 1e-3 * torch.randn_like(tensor)))


def forget_the_map(state, size):
    return replace(keep_most_used(state, size), expert_map_E=torch.arange(state.layer.num_experts))


def keep_least_used(state, size):
    return keep(state, state.statistics["usage"].argsort()[: size.num_experts].sort().values)


def swap_router_rows(state, size):
    kept = keep_most_used(state, size)
    return replace(kept, router={name: tensor.flip(0) for name, tensor in kept.router.items()})


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (touch_at_full_size, "keep 1: .*experts.* is not bit-identical"),
        (swap_router_rows, "keep 1: .*gate.* is not bit-identical"),
        (add_noise, "equal input, unequal bytes"),
        (forget_the_map, "expert_map .* does not reach each of 4 experts"),
        (keep_first, "another order of the experts changes the logits"),
        (keep_least_used, "without unused copies of experts changes the logits"),
    ],
)
def test_broken_method_is_caught(monkeypatch, function, complaint):
    module = ModuleType("broken_method")
    module.run, module.needs = function, lambda: ("usage",)
    monkeypatch.setitem(sys.modules, "broken_method", module)
    monkeypatch.setitem(methods.PASSES, "broken", "broken_method:run")
    broken = replace(recipes.RECIPES["frequency"], name="broken", passes=(("broken", {}),))
    monkeypatch.setitem(recipes.RECIPES, "broken", broken)
    with pytest.raises(AssertionError, match=complaint):
        check_method("broken")


def test_broken_slimming_is_caught(monkeypatch):
    def keep_first_neurons(state, size, *, score):
        width = size.width
        tensors = {
            name: tensor if name == "down_bias_ED" else tensor[..., :width] if name == "down_EDF" else tensor[:, :width]
            for name, tensor in state.experts.tensors().items()
        }
        return replace(state, experts=replace(state.experts, **tensors))

    monkeypatch.setattr("coterie.compress.methods.slim.slim", keep_first_neurons)
    with pytest.raises(AssertionError, match="without neurons that do nothing changes the logits"):
        check_method("easy-slim")
