"""Recipes: methods of papers (and our own) as lists of passes. A new method that reuses passes is one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from coterie.compress.methods import PRUNING_PASSES, needs_of
from coterie.errors import Infeasible, InputError, UnknownName
from coterie.profile.statistics.channels import needs_gradients

#: Router forms, and the passes that make each from the router's E rows once experts are merged. All but "map" give M
#: rows, which stock loaders read: the centre's row, the usage-weighted mean of the members' rows, or the better of the
#: two, re-fitted. "map" keeps the E rows.
ROUTERS: dict[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
    "plain": (("merge-router", {}),),
    "mean": (("merge-router", {"rows": "mean"}),),
    "refit": (("merge-router", {"rows": "best"}), ("refit-router", {})),
    "map": (),
}


#: How much a recipe that distils may take: tokens that its result is trained on.
EFFORTS: dict[str, int] = {"fast": 0, "balanced": 262_144, "thorough": 1_048_576}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A named list of passes.

    Attributes:
        name: what the user types.
        summary: one line.
        paper: arXiv id, or None.
        merges: True when experts are merged, so that the router can be a map; False when they are dropped.
        passes: (pass name, options), in order. In merging recipes ``merge-router`` stands for the router's form.
        shrinks: what gets smaller: the number of experts, the width of each, or the number of the parts that they are
            cut into.
        ragged: True when every expert gets a width of its own, from one ranking of the hidden neurons of all layers.
        distills: True when the whole result is trained towards the original's predictions at the end.
    """

    name: str
    summary: str
    paper: str | None
    merges: bool
    passes: tuple[tuple[str, Mapping[str, Any]], ...]
    shrinks: Literal["experts", "width", "parts"] = "experts"
    ragged: bool = False
    distills: bool = False

    def with_router(self, router: str) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Return the passes for a router form, one of `ROUTERS`.

        Raises:
            UnknownName: no such router form.
            Infeasible: a mapped router or mean rows for a recipe that drops experts.
        """
        if router not in ROUTERS:
            raise UnknownName("router form", router, ROUTERS)
        if router == "plain":
            return self.passes
        if self.merges:
            return tuple(
                step for entry in self.passes for step in (ROUTERS[router] if entry[0] == "merge-router" else (entry,))
            )
        if router == "refit":
            return (*self.passes, *ROUTERS[router][1:])
        wanted = "map their router rows to" if router == "map" else "average their router rows with"
        does = {"experts": "drops experts", "width": "keeps all experts", "parts": "cuts experts into parts"}[
            self.shrinks
        ]
        raise Infeasible(
            f"recipe {self.name} {does}, so there is nothing to {wanted}; use --router plain or --router refit"
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that the passes read, sorted."""
        return tuple(sorted({need for name, options in self.passes for need in needs_of(name, **options)}))


def _recipe(
    name: str,
    summary: str,
    paper: str | None,
    *passes: str | tuple[str, Mapping[str, Any]],
    ragged: bool = False,
    distills: bool = False,
) -> Recipe:
    listed = tuple((entry, {}) if isinstance(entry, str) else entry for entry in passes)
    names = {entry[0] for entry in listed}
    shrinks: Literal["experts", "width", "parts"] = (
        "parts" if "segment" in names else "width" if "slim" in names else "experts"
    )
    return Recipe(
        name=name, summary=summary, paper=paper, merges="merge-router" in names, passes=listed,
        shrinks=shrinks, ragged=ragged, distills=distills,
    )  # fmt: skip


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe(
            "coterie",
            "cut experts into parts, keep those that the loss needs, re-fit, distil",
            None,
            ("segment", {"score": "energy", "parts": 4}), "refit-joint",
            distills=True,
        ),
        _recipe(
            "coterie-local",
            "cut, re-fit and reconstruct layer by layer; never holds the whole result",
            None,
            ("segment", {"score": "energy", "parts": 4}), "refit-joint", "reconstruct",
        ),
        _recipe(
            "coterie-slim",
            "make all experts narrower by the same amount, re-fit, distil",
            None,
            ("slim", {"score": "energy"}), "refit-joint",
            distills=True,
        ),
        _recipe(
            "coterie-ragged",
            "every expert with a width of its own, re-fit, distil; loads with Coterie only",
            None,
            ("slim", {"score": "energy"}), "refit-joint",
            ragged=True, distills=True,
        ),
        _recipe("frequency", "keep the experts that most tokens chose", None, ("select", {"score": "frequency"})),
        _recipe("gate-mass", "keep the experts with most routing weight", None, ("select", {"score": "gate-mass"})),
        _recipe("ean", "keep the experts with the largest outputs in all", "2606.15716", ("select", {"score": "ean"})),
        _recipe("man", "keep the experts with the largest mean output", "2606.15716", ("select", {"score": "man"})),
        _recipe("msan", "keep those with the largest mean square output", "2606.15716", ("select", {"score": "msan"})),
        _recipe("reap", "keep the experts that add most where chosen", "2510.13999", ("select", {"score": "reap"})),
        _recipe(
            "easy-ep",
            "keep the experts that turn the residual stream, all domains alike",
            "2504.06792",
            ("select", {"score": "easy-ep"}),
        ),
        _recipe(
            "tcess",
            "keep the experts that the router scores highest (PreMoe)",
            "2505.17639",
            ("select", {"score": "tcess", "patterns": True}),
        ),
        _recipe("leave-one-out", "keep the experts whose absence changes the output most", None, "leave-one-out"),
        _recipe("naee", "search the subset that keeps the output nearest", "2402.14800", "subset-search"),
        _recipe(
            "average",
            "group by up and gate weights around the most used, average equally",
            None,
            ("cluster", {"rule": "mergemoe"}), ("average", {"weights": "equal"}), "merge-router",
        ),
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
        _recipe(
            "mergemoe-output",
            "group by a tree over mean outputs, average, solve for down",
            "2510.14436",
            ("cluster", {"rule": "hc-smoe"}), "average", "refit-down", "merge-router",
        ),
        _recipe(
            "ream",
            "group around the most salient from the top down, align neurons, average by saliency",
            "2604.04356",
            ("cluster", {"rule": "ream"}), ("align", {"by": "weights+activations"}), ("average", {"weights": "reap"}),
            "merge-router",
        ),
        _recipe(
            "sub-moe",
            "group by k-means over outputs, project on a shared subspace, average",
            "2506.23266",
            ("cluster", {"rule": "k-means", "features": "token-outputs"}), ("subspace", {"energy": 0.99}), "average",
            "merge-router",
        ),
        _recipe(
            "ppp",
            "group by k-means over mean outputs, say how many groups there are, average",
            None,
            ("cluster", {"rule": "ppp"}), "average", "merge-router",
        ),
        _recipe(
            "easy-slim",
            "keep in each expert the neurons that add most where chosen",
            None,
            ("slim", {"score": "activation"}),
        ),
        _recipe(
            "heapr",
            "keep in each expert the neurons that the loss depends on most",
            "2509.22299",
            ("slim", {"score": "heapr"}),
        ),
        _recipe(
            "heapr-ragged",
            "rank the neurons of all experts and layers together, each expert gets a width of its own",
            "2509.22299",
            ("slim", {"score": "heapr"}),
            ragged=True,
        ),
    )
}  # fmt: skip


#: What may follow the name of a recipe that drops experts, after a "+": a pass that comes first.
EXTRAS = ("protect",)


def get_recipe(name: str) -> Recipe:
    """Return a recipe, such as "reap" or "reap+protect".

    Raises:
        UnknownName: no such recipe, with the nearest names.
        InputError: protection for a recipe that drops no experts.
    """
    base, plus, extra = name.partition("+")
    if base not in RECIPES:
        raise UnknownName("recipe", base, RECIPES)
    recipe = RECIPES[base]
    if not plus:
        return recipe
    if extra not in EXTRAS:
        raise UnknownName("addition to a recipe", extra, EXTRAS)
    if not any(entry in PRUNING_PASSES for entry, _ in recipe.passes):
        raise InputError(f"recipe {base} drops no experts, so there is none to protect; leave out +{extra}")
    return replace(recipe, name=name, passes=((extra, {}), *recipe.passes))


def training_tokens(recipe: str, effort: str) -> int:
    """Return how many tokens a recipe trains its result on; raises UnknownName."""
    if effort not in EFFORTS:
        raise UnknownName("effort", effort, EFFORTS)
    return EFFORTS[effort] if get_recipe(recipe).distills else 0


def check_sequential(name: str) -> None:
    """Raise InputError where a recipe cannot have one layer compressed before the next is measured."""
    needed = get_recipe(name).needs
    if needs_gradients(needed):
        raise InputError(
            f"recipe {name} needs gradients of the loss, which come from behind: they are measured before any layer is "
            "compressed; leave the inputs original"
        )
    if "output_peak" in needed:
        raise InputError(
            f"recipe {name} keeps super experts, which are known when every layer of the model was measured: leave the "
            "inputs original, or the recipe without +protect"
        )
