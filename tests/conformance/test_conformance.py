"""Every recipe and every tiny family keeps the promises; and the checks see it when one does not."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from coterie.compress import methods, recipes
from coterie.compress.methods.select import slice_router
from coterie.testing import check_family, check_method, tiny_families
from coterie.testing.describe import describe_family
from coterie.testing.families import ONE_WIDTH, SOFTMAX_OVER_ALL, UNROUTABLE

#: Every pass, every allocator, and training; the other recipes combine what these do in other ways.
CORE_RECIPES = (
    "coterie", "coterie-local", "coterie-ragged", "easy-slim", "leave-one-out", "m-smoe", "mergemoe", "naee", "reap",
    "sub-moe",
)  # fmt: skip
#: Every layout of experts on disk and in memory, every kind of router, hybrids, a nested config, a tied head.
CORE_FAMILIES = (
    "deepseek_v2", "deepseek_v3", "gemma4_text", "gpt_oss", "granitemoe", "jamba", "mixtral", "muse_spark",
    "nemotron_h", "olmoe", "qwen3_next", "zaya",
)  # fmt: skip


def core_first(core, names):
    """Return parameters of a test: the core ones, and the others where all of them are asked for."""
    return [*core, *(pytest.param(name, marks=pytest.mark.families) for name in names if name not in core)]


def test_core_recipes_meet_every_pass_and_every_allocator():
    core, every = ([recipes.RECIPES[name] for name in names] for names in (CORE_RECIPES, recipes.RECIPES))
    in_turn = {name for steps in (recipes.ROUTERS["refit"], recipes.ROUTERS["mean"]) for name, _ in steps}
    beside = {*recipes.EXTRAS, *in_turn}  # additions and router forms: tests of their own
    assert {name for recipe in core for name, _ in recipe.passes} | beside == set(methods.PASSES)
    for kind in ("allocator", "merges", "trains"):
        assert {getattr(each, kind) for each in core} == {getattr(each, kind) for each in every}, kind


@pytest.mark.families
def test_core_families_have_every_feature_of_all():
    core, every = ([describe_family(name) for name in names] for names in (CORE_FAMILIES, tiny_families()))
    for kind in ("layers", "router", "experts"):
        assert {each for facts in core for each in getattr(facts, kind)} == {
            each for facts in every for each in getattr(facts, kind)
        }, kind
    assert {facts.shared_experts for facts in core} == {True, False}
    for listed in (ONE_WIDTH, SOFTMAX_OVER_ALL, UNROUTABLE):
        assert set(listed) & set(CORE_FAMILIES)


@pytest.mark.parametrize("recipe", core_first(CORE_RECIPES, recipes.RECIPES))
def test_recipe_keeps_its_promises(recipe):
    check_method(recipe)


@pytest.mark.parametrize("model_type", core_first(CORE_FAMILIES, tiny_families()))
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
