"""Recipes: methods of papers (and our own) as lists of passes. A new method that reuses passes is one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coterie.compress.methods import needs_of
from coterie.errors import Infeasible, UnknownName


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A named list of passes.

    Attributes:
        name: what the user types.
        summary: one line.
        paper: arXiv id, or None.
        merges: True when experts are merged, so that the router can be a map; False when they are dropped.
        passes: (pass name, options), in order. Merging recipes end with ``merge-router``, which a mapped router skips.
    """

    name: str
    summary: str
    paper: str | None
    merges: bool
    passes: tuple[tuple[str, Mapping[str, Any]], ...]

    def with_router(self, router: str) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Return the passes for a router form.

        Raises:
            UnknownName: neither "plain" nor "map".
            Infeasible: a mapped router for a recipe that drops experts.
        """
        if router not in ("plain", "map"):
            raise UnknownName("router form", router, ("plain", "map"))
        if router == "plain":
            return self.passes
        if not self.merges:
            raise Infeasible(
                f"recipe {self.name} drops experts, so there is nothing to map their router rows to; use --router plain"
            )
        return tuple(entry for entry in self.passes if entry[0] != "merge-router")

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that the passes read, sorted."""
        return tuple(sorted({need for name, options in self.passes for need in needs_of(name, **options)}))


def _recipe(name: str, summary: str, paper: str | None, *passes: str | tuple[str, Mapping[str, Any]]) -> Recipe:
    listed = tuple((entry, {}) if isinstance(entry, str) else entry for entry in passes)
    merges = any(entry[0] == "merge-router" for entry in listed)
    return Recipe(name=name, summary=summary, paper=paper, merges=merges, passes=listed)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe("frequency", "keep the experts that most tokens chose", None, ("select", {"score": "frequency"})),
        _recipe("reap", "keep the experts that add most where chosen", "2510.13999", ("select", {"score": "reap"})),
        _recipe(
            "m-smoe",
            "group by router scores around the most used, align neurons, average",
            "2310.01334",
            ("cluster", {"rule": "m-smoe"}), "align", "average", "merge-router",
        ),
        _recipe(
            "hc-smoe",
            "group by a tree over mean outputs, average",
            "2410.08589",
            ("cluster", {"rule": "hc-smoe"}), "average", "merge-router",
        ),
        _recipe(
            "mergemoe",
            "group by up and gate weights around the most used, average, solve for down",
            "2510.14436",
            ("cluster", {"rule": "mergemoe"}), "average", "refit-down", "merge-router",
        ),
    )
}  # fmt: skip


def get_recipe(name: str) -> Recipe:
    """Return a recipe; raises UnknownName with the nearest names."""
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]
