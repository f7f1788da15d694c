"""Names that a shell completes: recipes, statistics, families. Nothing heavy is imported for them."""

from collections.abc import Callable, Iterable, Iterator

Completed = Iterator[tuple[str, str]]


def complete_recipe(incomplete: str) -> Completed:
    """Yield the recipes that begin so, with what they do."""
    from coterie.compress.recipes import RECIPES

    yield from _beginning((recipe.name, recipe.summary) for recipe in RECIPES.values())(incomplete)


def complete_recipes(incomplete: str) -> Completed:
    """Yield the ways to go on with a list of recipes that is separated by commas."""
    yield from _in_a_list(complete_recipe, incomplete)


def complete_statistics(incomplete: str) -> Completed:
    """Yield the ways to go on with a list of statistics that is separated by commas."""
    from coterie.profile.statistics import MATRICES, STATISTICS

    yield from _in_a_list(_beginning((name, "") for name in (*STATISTICS, *MATRICES)), incomplete)


def complete_routers(incomplete: str) -> Completed:
    """Yield the ways to go on with a list of router forms that is separated by commas."""
    from coterie.compress.recipes import ROUTERS

    yield from _in_a_list(_beginning((name, "") for name in ROUTERS), incomplete)


def complete_family(incomplete: str) -> Completed:
    """Yield the model families that begin so, with the class of their model."""
    from coterie.testing.facts import known_families

    yield from _beginning((family.model_type, family.model_class) for family in known_families().families)(incomplete)


def _beginning(choices: Iterable[tuple[str, str]]) -> Callable[[str], Completed]:
    return lambda incomplete: (choice for choice in choices if choice[0].startswith(incomplete))


def _in_a_list(complete: Callable[[str], Completed], incomplete: str) -> Completed:
    before, comma, last = incomplete.rpartition(",")
    named = before.split(",")
    yield from ((f"{before}{comma}{name}", about) for name, about in complete(last) if name not in named)
