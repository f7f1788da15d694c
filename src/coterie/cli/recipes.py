"""``coterie recipes``: the recipes that there are."""

from typing import TYPE_CHECKING

from coterie.cli import options
from coterie.cli.output import print_json, print_table

if TYPE_CHECKING:
    from coterie.compress.recipes import Recipe


def recipes(json: options.Json = False) -> None:
    """List the ways to choose or merge experts."""
    from coterie.compress.recipes import RECIPES

    listed = [
        {
            "name": recipe.name,
            "kind": _kind(recipe),
            "summary": recipe.summary,
            "paper": recipe.paper,
            "needs": list(recipe.needs),
            "passes": [name for name, _ in recipe.passes],
        }
        for recipe in RECIPES.values()
    ]
    if json:
        print_json(listed)
        return
    print_table(
        ("recipe", "kind:", "what it does:", "paper:", "needs:"),
        [
            (
                recipe.name,
                _kind(recipe),
                recipe.summary,
                "-" if recipe.paper is None else f"arXiv {recipe.paper}",
                ", ".join(recipe.needs),
            )
            for recipe in RECIPES.values()
        ],
    )


def _kind(recipe: "Recipe") -> str:
    if recipe.quantiser is not None:
        return "fewer bits"
    if recipe.allocator in ("narrower", "ragged"):
        return "slim"
    return "merge" if recipe.merges else "drop"
