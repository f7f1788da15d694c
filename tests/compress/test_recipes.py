import pytest

from coterie.compress.methods import PASSES, load_pass, needs_of
from coterie.compress.recipes import EXTRAS, RECIPES, ROUTERS, get_recipe
from coterie.errors import Infeasible, InputError, UnknownName
from coterie.profile.statistics import STATISTICS, load_statistic


def test_every_pass_in_the_table_loads_and_is_used() -> None:
    used = {name for recipe in RECIPES.values() for name, _ in recipe.passes} | set(EXTRAS)
    used |= {name for steps in ROUTERS.values() for name, _ in steps}
    assert used == set(PASSES)
    assert all(callable(load_pass(name)) for name in PASSES)


def test_every_statistic_in_the_table_loads() -> None:
    assert all(callable(load_statistic(name)) for name in STATISTICS)


@pytest.mark.parametrize("name", [*RECIPES, "reap+protect", "naee+protect"])
def test_a_recipe_measures_what_its_passes_read(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.needs == tuple(
        sorted({need for each, options in recipe.passes for need in needs_of(each, **options)})
    )


def test_needs_are_the_union_over_passes() -> None:
    assert get_recipe("hc-smoe").needs == ("mean_output", "tokens", "usage")
    assert get_recipe("reap").needs == ("reap", "usage")
    assert needs_of("align") == ()


def test_a_map_skips_only_the_pass_that_collapses_the_router() -> None:
    recipe = get_recipe("mergemoe")
    assert [name for name, _ in recipe.with_router("plain")] == ["cluster", "average", "refit-down", "merge-router"]
    assert [name for name, _ in recipe.with_router("map")] == ["cluster", "average", "refit-down"]


def test_every_form_of_m_rows_takes_the_place_of_the_centres_rows() -> None:
    merging = [recipe for recipe in RECIPES.values() if recipe.merges]
    assert {recipe.name for recipe in merging} >= {"average", "m-smoe", "hc-smoe", "mergemoe", "ream", "sub-moe", "ppp"}
    for recipe in merging:
        assert [name for name, _ in recipe.passes].count("merge-router") == 1
        for router, steps in ROUTERS.items():
            position = [name for name, _ in recipe.passes].index("merge-router")
            before, after = recipe.passes[:position], recipe.passes[position + 1 :]
            assert recipe.with_router(router) == (*before, *steps, *after)


def test_rows_of_kept_experts_can_be_refitted_but_not_averaged() -> None:
    recipe = get_recipe("reap")
    assert recipe.with_router("refit") == (*recipe.passes, ("refit-router", {}))
    with pytest.raises(Infeasible, match=r"nothing to average .* use --router plain or --router refit"):
        recipe.with_router("mean")


def test_a_map_makes_no_sense_for_dropped_experts() -> None:
    with pytest.raises(Infeasible, match="use --router plain"):
        get_recipe("reap").with_router("map")


@pytest.mark.parametrize(("name", "near"), [("mergemo", "mergemoe"), ("hcsmoe", "hc-smoe"), ("frequent", "frequency")])
def test_a_misspelt_recipe_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownName, match=f"did you mean .*{near}"):
        get_recipe(name)


def test_protection_comes_before_the_passes_of_a_recipe_that_drops_experts() -> None:
    recipe = get_recipe("reap+protect")
    assert recipe.name == "reap+protect"
    assert [name for name, _ in recipe.passes] == ["protect", "select"]
    assert recipe.needs == ("output_peak", "reap", "usage")
    for name in ("naee", "leave-one-out", "tcess"):
        assert get_recipe(f"{name}+protect").passes == (("protect", {}), *get_recipe(name).passes)
    with pytest.raises(InputError, match="mergemoe drops no experts, so there is none to protect"):
        get_recipe("mergemoe+protect")
    with pytest.raises(UnknownName, match="addition to a recipe 'protekt'; did you mean protect"):
        get_recipe("reap+protekt")
    with pytest.raises(UnknownName, match=r"recipe 'raep'; did you mean .*reap"):
        get_recipe("raep+protect")


def test_unknown_passes_statistics_and_routers_are_refused() -> None:
    with pytest.raises(UnknownName, match="pass 'avrage'"):
        load_pass("avrage")
    with pytest.raises(UnknownName, match="statistic 'usages'"):
        load_statistic("usages")
    with pytest.raises(UnknownName, match="router form 'plane'; did you mean plain"):
        get_recipe("mergemoe").with_router("plane")
