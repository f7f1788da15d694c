"""Every recipe and every tiny family keeps the promises; and the checks see it when one does not."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from coterie.compress import methods, recipes
from coterie.compress.methods.select import slice_router
from coterie.errors import ArchitectureMismatch
from coterie.testing import check_family, check_method, conformance, tiny_families
from coterie.testing.describe import describe_family
from coterie.testing.families import ONE_WIDTH, SOFTMAX_OVER_ALL, UNROUTABLE

#: Every pass, every allocator, and training; the other recipes combine what these do in other ways.
CORE_RECIPES = (
    "coterie", "coterie-local", "coterie-ragged", "easy-slim", "leave-one-out", "m-smoe", "mergemoe",
    "moe-slimming", "naee", "reap", "sub-moe",
)  # fmt: skip
#: Recipes that change experts; those that store them in fewer bits have tests of their own (`test_pack.py`).
STRUCTURAL = tuple(name for name, recipe in recipes.RECIPES.items() if recipe.quantiser is None)
#: Every layout of experts on disk and in memory, every kind of router, hybrids, a nested config, a tied head.
CORE_FAMILIES = (
    "deepseek_v2", "deepseek_v3", "gemma4_text", "gpt_oss", "granitemoe", "jamba", "mixtral", "muse_spark",
    "nemotron_h", "olmoe", "qwen3_next", "zaya",
)  # fmt: skip


#: Those of the core that run every time: both layouts of experts, a shared expert, biases.
QUICK = {"easy-slim", "deepseek_v3", "gpt_oss"}

LONG = pytest.mark.long


def core_first(core, names):
    """Return parameters of a test: the quick ones, and the others where all of them are asked for."""
    rest = [*core, *(name for name in names if name not in core)]
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.families) for name in rest]


def test_core_recipes_meet_every_pass_and_every_allocator():
    core, every = ([recipes.RECIPES[name] for name in names] for names in (CORE_RECIPES, STRUCTURAL))
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


@pytest.mark.parametrize("recipe", core_first(CORE_RECIPES, STRUCTURAL))
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


def keep_largest(state, size):
    """By the norm of the down projection."""
    norms_E = state.experts.down_EDF.double().square().sum((1, 2))
    return keep(state, norms_E.argsort(descending=True)[: size.num_experts].sort().values)


def keep_drawn(state, size):
    generator = torch.Generator().manual_seed(1000 * state.seed + state.layer.index)
    return keep(state, torch.randperm(state.layer.num_experts, generator=generator)[: size.num_experts].sort().values)


def keep_drawn_by_chance(state, size):
    return keep(state, torch.randperm(state.layer.num_experts)[: size.num_experts].sort().values)


def keep_drawn_in_no_order(state, size):
    """The router's rows are not those of the experts."""
    kept = keep_drawn(state, size)
    return replace(kept, router={name: tensor.flip(0) for name, tensor in kept.router.items()})


def keep_drawn_without_map(state, size):
    """No expert is sent to the last one."""
    kept = keep_drawn(state, size)
    if size.num_experts == state.layer.num_experts:
        return kept
    return replace(kept, expert_map_E=kept.expert_map_E.clamp(max=size.num_experts - 2))


def keep_least_chosen(state, size):
    """Reads the sample alone."""
    counts_E = torch.bincount(state.sample.index_TK.flatten(), minlength=state.layer.num_experts + 1)[:-1]
    return keep(state, counts_E[: state.layer.num_experts].argsort()[: size.num_experts].sort().values)


def check(monkeypatch, function, needs):
    """Check a recipe of one pass."""
    module = ModuleType("own_method")
    module.run, module.needs = function, lambda: needs
    monkeypatch.setitem(sys.modules, "own_method", module)
    monkeypatch.setitem(methods.PASSES, "own", "own_method:run")
    monkeypatch.setitem(recipes.RECIPES, "own", recipes.Recipe(name="own", passes=(("own", {}),)))
    check_method("own")


@pytest.mark.parametrize(
    ("function", "needs", "complaint"),
    [
        (touch_at_full_size, ("usage",), "keep 1: .*experts.* is not bit-identical"),
        (swap_router_rows, ("usage",), "keep 1: .*gate.* is not bit-identical"),
        (add_noise, ("usage",), "equal input, unequal bytes"),
        (forget_the_map, ("usage",), r"expert_map \[0, .*\] names expert 4 of 4: one of the passes"),
        pytest.param(keep_first, ("usage",), "another order of the experts changes the logits", marks=LONG),
        pytest.param(keep_least_used, ("usage",), "without unused copies of experts changes the logits", marks=LONG),
        # What says that it needs nothing is believed where it is true.
        pytest.param(keep_least_used, (), "without unused copies of experts changes the logits", marks=LONG),
        pytest.param(keep_least_chosen, (), "without unused copies of experts changes the logits", marks=LONG),
        pytest.param(keep_first, (), "another order of the experts changes the logits", marks=LONG),
        pytest.param(keep_drawn_by_chance, (), "equal input, unequal bytes", marks=LONG),
        (keep_drawn_in_no_order, (), "keep 1: .*gate.* is not bit-identical"),
        (keep_drawn_without_map, (), "expert_map .* does not reach each of 4 experts"),
    ],
)
def test_broken_method_is_caught(monkeypatch, function, needs, complaint):
    with pytest.raises((AssertionError, ArchitectureMismatch), match=complaint):
        check(monkeypatch, function, needs)


@pytest.mark.long
@pytest.mark.parametrize(
    ("function", "needs", "promises"),
    [
        (keep_largest, (), ["order"]),
        (keep_drawn, (), []),
        (keep_most_used, ("usage",), ["order", "redundant"]),
        (keep_most_used, (), ["order", "redundant"]),
    ],
)
def test_what_a_method_must_promise_follows_from_what_it_reads(monkeypatch, function, needs, promises):
    asked, require_close = [], conformance._require_close

    def note(found, expected, what):
        asked.append("order" if "another order" in what else "redundant")
        require_close(found, expected, what)

    monkeypatch.setattr(conformance, "_require_close", note)
    check(monkeypatch, function, needs)
    assert asked == promises


@pytest.mark.long
@pytest.mark.parametrize("recipe", [name for name in STRUCTURAL if not recipes.RECIPES[name].needs])
def test_recipes_of_ours_that_need_no_statistic_read_the_sample(monkeypatch, recipe):
    asked = []
    monkeypatch.setattr(conformance, "_require_close", lambda found, expected, what: asked.append(what))
    check_method(recipe)
    assert any("without unused copies" in what or "without neurons that do nothing" in what for what in asked)


@pytest.mark.long
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
