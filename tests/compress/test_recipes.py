import pytest

from coterie.compress.methods import PASSES, load_pass, needs_of
from coterie.compress.recipes import RECIPES, get_recipe
from coterie.errors import Infeasible, UnknownName
from coterie.profile.statistics import STATISTICS, load_statistic


def test_every_pass_in_the_table_loads_and_is_used() -> None:
    used = {name for recipe in RECIPES.values() for name, _ in recipe.passes}
    assert used == set(PASSES)
    assert all(callable(load_pass(name)) for name in PASSES)


def test_every_statistic_in_the_table_loads() -> None:
    assert all(callable(load_statistic(name)) for name in STATISTICS)


def test_needs_are_the_union_over_passes() -> None:
    assert get_recipe("hc-smoe").needs == ("mean_output", "tokens", "usage")
    assert get_recipe("reap").needs == ("reap", "usage")
    assert needs_of("align") == ()


def test_a_map_skips_only_the_pass_that_collapses_the_router() -> None:
    recipe = get_recipe("mergemoe")
    assert [name for name, _ in recipe.with_router("plain")] == ["cluster", "average", "refit-down", "merge-router"]
    assert [name for name, _ in recipe.with_router("map")] == ["cluster", "average", "refit-down"]


def test_a_map_makes_no_sense_for_dropped_experts() -> None:
    with pytest.raises(Infeasible, match="use --router plain"):
        get_recipe("reap").with_router("map")


@pytest.mark.parametrize(("name", "near"), [("mergemo", "mergemoe"), ("hcsmoe", "hc-smoe"), ("frequent", "frequency")])
def test_a_misspelt_recipe_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownName, match=f"did you mean .*{near}"):
        get_recipe(name)


def test_unknown_passes_statistics_and_routers_are_refused() -> None:
    with pytest.raises(UnknownName, match="pass 'avrage'"):
        load_pass("avrage")
    with pytest.raises(UnknownName, match="statistic 'usages'"):
        load_statistic("usages")
    with pytest.raises(UnknownName, match="router form 'plane'; did you mean plain"):
        get_recipe("mergemoe").with_router("plane")
