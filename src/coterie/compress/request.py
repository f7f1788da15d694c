"""What is asked for, checked before anything heavy is imported. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from coterie.amounts import check_seed
from coterie.compress.recipes import Recipe, Step
from coterie.compress.target import Target
from coterie.errors import InputError
from coterie.model.disk.manifest import RouterForm

#: Targets that earlier versions did not have: left out where nobody asks for them, so that their runs go on.
_NEW = ("bits", "type", "reader", "experts_only")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be made, how small, and with which router.

    Attributes:
        recipe: what to measure and to do.
        target: how small.
        router: form of the router, see `coterie.compress.plan.Plan`.
        seed: seed of everything random in the passes.
        search: generations of the search for types at most; 0 for none.
    """

    recipe: Recipe
    target: Target
    router: RouterForm = "plain"
    seed: int = 0
    search: int = 0

    @property
    def passes(self) -> tuple[Step, ...]:
        """What is done to each layer."""
        return self.recipe.with_router(self.router)

    @property
    def by_expert(self) -> bool:
        """Whether experts can have types of their own: in the packed form, where types are not searched for."""
        return self.target.reader == "packed" and not self.search

    def check(self) -> None:
        """Raise InputError, Infeasible or UnknownName for what no model could be given."""
        check_seed(self.seed)
        self.target.check(self.recipe)
        self.recipe.with_router(self.router)
        if self.search < 0:
            raise InputError(f"--search {self.search} is no number of generations; give 0 or more")
        if self.search and not self.recipe.searches:
            raise InputError(
                f"--search goes on from the types that coterie-bits chooses, and the recipe is {self.recipe.name}: say "
                "--recipe coterie-bits, or leave --search out"
            )

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return {
            "recipe": self.recipe.name,
            "allocator": self.recipe.allocator,
            "passes": [[name, dict(options)] for name, options in self.passes],
            "result_steps": [[name, dict(options)] for name, options in self.recipe.result_steps],
            "target": {name: value for name, value in asdict(self.target).items() if name not in _NEW or value},
            **({} if self.recipe.quantiser is None else {"quantiser": list(self.recipe.quantiser)}),
            "router": self.router,
            "seed": self.seed,
            **({"search": self.search} if self.search else {}),
        }
