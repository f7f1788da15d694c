"""``coterie recipes``: the recipes that there are."""

from coterie.cli import options
from coterie.cli.output import print_json, print_table


def recipes(json: options.Json = False) -> None:
    """List the ways to choose or merge experts."""
    from coterie.compress.recipes import RECIPES

    listed = [
        {
            "name": recipe.name,
            "kind": "merge" if recipe.merges else "drop",
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
                "merge" if recipe.merges else "drop",
                recipe.summary,
                "-" if recipe.paper is None else f"arXiv {recipe.paper}",
                ", ".join(recipe.needs),
            )
            for recipe in RECIPES.values()
        ],
    )
