"""Recipes: methods of papers (and our own) as lists of steps. A new method that reuses steps is one entry here.

No torch here: what a recipe measures stands beside it, and `check_method` holds it to what its passes need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from coterie.compress.allocators import ALLOCATORS
from coterie.errors import Infeasible, InputError, UnknownName

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


#: Steps that train the whole result: as plain numbers, and in blocks.
TRAINING_STEPS = ("distill", "distill-blocks")

#: A step with its options.
Step = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to measure, who shares out the bytes, and what to do: steps on each layer, then steps on the whole result.

    Attributes:
        name: what the user types.
        summary: one line.
        paper: arXiv id, or None.
        measures: statistics that are read, sorted; None for those that the passes say they need.
        allocator: who decides what each layer gets, one of `coterie.compress.allocators.ALLOCATORS`.
        passes: (name, options) of what is done to each layer, in order; names of `coterie.compress.methods.PASSES`, or
            ``"module:attribute"``. In recipes that merge experts ``merge-router`` stands for the router's form.
        result_steps: (name, options) of what is done to the whole result at the end, in order; names of
            `coterie.compress.result_steps.RESULT_STEPS`.
        quantiser: (name, options) of what chooses the codes of weights that are stored in fewer bits, a name of
            `coterie.compress.quantisers.QUANTISERS`; None where weights stay plain numbers.
    """

    name: str
    summary: str = ""
    paper: str | None = None
    measures: tuple[str, ...] | None = None
    allocator: str = "fewer"
    passes: tuple[Step, ...]
    result_steps: tuple[Step, ...] = ()
    quantiser: Step | None = None

    def __post_init__(self) -> None:
        if self.allocator not in ALLOCATORS:
            raise UnknownName("allocator", self.allocator, ALLOCATORS)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that are read, sorted."""
        if self.measures is not None:
            return self.measures
        from coterie.compress.methods import needs_of

        return tuple(sorted({need for name, options in self.passes for need in needs_of(name, **options)}))

    @property
    def merges(self) -> bool:
        """Whether experts are merged, so that the router can be a map; else they are dropped, slimmed or cut."""
        return any(name == "merge-router" for name, _ in self.passes)

    @property
    def trains(self) -> bool:
        """Whether the whole result is trained at the end."""
        return trains_in(self.result_steps)

    @property
    def prices(self) -> bool:
        """Whether matrices are measured first, so that their types can be chosen by that."""
        return ALLOCATORS[self.allocator].meter is not None

    @property
    def takes_prices(self) -> bool:
        """Whether that is what every matrix would cost in every type, which may be known (`coterie.price`)."""
        return self.allocator in ("mixed-types", "mixed-widths")

    @property
    def searches(self) -> bool:
        """Whether the types that matrices get can be searched on from (`coterie.compress.search`)."""
        return self.allocator == "mixed-types"

    @property
    def narrows(self) -> bool:
        """Whether experts get widths of their own where weights are stored in fewer bits."""
        return self.allocator == "mixed-widths"

    @property
    def packs(self) -> bool:
        """Whether its results are what no GGUF file holds, whoever reads them."""
        return self.narrows or self.allocator == "shared-base"

    def with_router(self, router: str) -> tuple[Step, ...]:
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
        action = "map their router rows to" if router == "map" else "average their router rows with"
        does = {"fewer": "drops experts", "parts": "cuts experts into parts"}.get(self.allocator, "keeps all experts")
        raise Infeasible(
            f"recipe {self.name} {does}, so there is nothing to {action}; use --router plain or --router refit"
        )


def trains_in(result_steps: Iterable[Step]) -> bool:
    """Tell whether one of the steps on the whole result trains it."""
    return any(name in TRAINING_STEPS for name, _ in result_steps)


def _recipe(
    name: str,
    summary: str,
    paper: str | None,
    *passes: str | Step,
    measures: str = "",
    allocator: str = "fewer",
    distill: bool = False,
) -> Recipe:
    listed = tuple((entry, {}) if isinstance(entry, str) else entry for entry in passes)
    return Recipe(
        name=name, summary=summary, paper=paper, measures=tuple(measures.split()), allocator=allocator, passes=listed,
        result_steps=(("distill", {}),) if distill else (),
    )  # fmt: skip


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _recipe(
            "coterie",
            "cut experts into parts, keep those that the loss needs, re-fit, distil",
            None,
            ("segment", {"score": "energy", "parts": 4}), "refit-joint",
            distill=True,
            measures="gated_hidden_square gradient_energy tokens", allocator="parts",
        ),
        _recipe(
            "coterie-local",
            "cut, re-fit and reconstruct layer by layer; never holds the whole result",
            None,
            ("segment", {"score": "energy", "parts": 4}), "refit-joint", "reconstruct",
            measures="gated_hidden_square gradient_energy tokens", allocator="parts",
        ),
        _recipe(
            "coterie-slim",
            "make all experts narrower by the same amount, re-fit, distil",
            None,
            ("slim", {"score": "energy"}), "refit-joint",
            distill=True,
            measures="gated_hidden_square gradient_energy tokens", allocator="narrower",
        ),
        _recipe(
            "coterie-ragged",
            "every expert with a width of its own, re-fit, distil; loads with Coterie only",
            None,
            ("slim", {"score": "energy"}), "refit-joint",
            allocator="ragged", distill=True,
            measures="gated_hidden_square gradient_energy tokens",
        ),
        _recipe(
            "frequency",
            "keep the experts that most tokens chose",
            None,
            ("select", {"score": "frequency"}),
            measures="usage",
        ),
        _recipe(
            "gate-mass",
            "keep the experts with most routing weight",
            None,
            ("select", {"score": "gate-mass"}),
            measures="gate_mass",
        ),
        _recipe(
            "ean",
            "keep the experts with the largest outputs in all",
            "2606.15716",
            ("select", {"score": "ean"}),
            measures="output_norm",
        ),
        _recipe(
            "man",
            "keep the experts with the largest mean output",
            "2606.15716",
            ("select", {"score": "man"}),
            measures="output_norm usage",
        ),
        _recipe(
            "msan",
            "keep those with the largest mean square output",
            "2606.15716",
            ("select", {"score": "msan"}),
            measures="output_square usage",
        ),
        _recipe(
            "reap",
            "keep the experts that add most where chosen",
            "2510.13999",
            ("select", {"score": "reap"}),
            measures="reap usage",
        ),
        _recipe(
            "easy-ep",
            "keep the experts that turn the residual stream, all domains alike",
            "2504.06792",
            ("select", {"score": "easy-ep"}),
            measures="easy_ep",
        ),
        _recipe(
            "tcess",
            "keep the experts that the router scores highest (PreMoe)",
            "2505.17639",
            ("select", {"score": "tcess", "patterns": True}),
            measures="tcess tcess_tokens tokens",
        ),
        _recipe("leave-one-out", "keep the experts whose absence changes the output most", None, "leave-one-out"),
        _recipe(
            "naee",
            "search the subset that keeps the output nearest",
            "2402.14800",
            "subset-search",
            measures="reap usage",
        ),
        _recipe(
            "average",
            "group by up and gate weights around the most used, average equally",
            None,
            ("cluster", {"rule": "mergemoe"}), ("average", {"weights": "equal"}), "merge-router",
            measures="usage",
        ),
        _recipe(
            "m-smoe",
            "group by router scores around the most used, align neurons, average",
            "2310.01334",
            ("cluster", {"rule": "m-smoe"}), "align", "average", "merge-router",
            measures="logit_product usage",
        ),
        _recipe(
            "hc-smoe",
            "group by a tree over mean outputs, average",
            "2410.08589",
            ("cluster", {"rule": "hc-smoe"}), "average", "merge-router",
            measures="mean_output tokens usage",
        ),
        _recipe(
            "mergemoe",
            "group by up and gate weights around the most used, average, solve for down",
            "2510.14436",
            ("cluster", {"rule": "mergemoe"}), "average", "refit-down", "merge-router",
            measures="usage",
        ),
        _recipe(
            "mergemoe-output",
            "group by a tree over mean outputs, average, solve for down",
            "2510.14436",
            ("cluster", {"rule": "hc-smoe"}), "average", "refit-down", "merge-router",
            measures="mean_output tokens usage",
        ),
        _recipe(
            "ream",
            "group around the most salient from the top down, align neurons, average by saliency",
            "2604.04356",
            ("cluster", {"rule": "ream"}), ("align", {"by": "weights+activations"}), ("average", {"weights": "reap"}),
            "merge-router",
            measures="logit_product reap usage",
        ),
        _recipe(
            "sub-moe",
            "group by k-means over outputs, project on a shared subspace, average",
            "2506.23266",
            ("cluster", {"rule": "k-means", "features": "token-outputs"}), ("subspace", {"energy": 0.99}), "average",
            "merge-router",
            measures="usage",
        ),
        _recipe(
            "ppp",
            "group by k-means over mean outputs, say how many groups there are, average",
            None,
            ("cluster", {"rule": "ppp"}), "average", "merge-router",
            measures="mean_output tokens usage",
        ),
        _recipe(
            "easy-slim",
            "keep in each expert the neurons that add most where chosen",
            None,
            ("slim", {"score": "activation"}),
            measures="hidden_square", allocator="narrower",
        ),
        _recipe(
            "heapr",
            "keep in each expert the neurons that the loss depends on most",
            "2509.22299",
            ("slim", {"score": "heapr"}),
            measures="channel_gradient hidden_square usage", allocator="narrower",
        ),
        _recipe(
            "heapr-ragged",
            "rank the neurons of all experts and layers together, each expert gets a width of its own",
            "2509.22299",
            ("slim", {"score": "heapr"}),
            allocator="ragged",
            measures="channel_gradient hidden_square usage",
        ),
        _recipe(
            "moe-slimming",
            "keep in each expert the channels with the largest activations; fewer bits in a second run",
            "2606.18304",
            "slim-activations",
            allocator="narrower",
        ),
        Recipe(
            name="nearest",
            summary="store all matrices in one type, each number the nearest, scales fitted by what comes in",
            measures=(), passes=(), allocator="one-type", quantiser=("nearest", {}),
        ),
        Recipe(
            name="gptq",
            summary="store all matrices in one type, later columns make good the error of earlier ones",
            paper="2210.17323",
            measures=(), passes=(), allocator="one-type", quantiser=("gptq", {}),
        ),
        Recipe(
            name="gptaq",
            summary="gptq, which makes good what the layers before have changed as well",
            paper="2504.02692",
            measures=(), passes=(), allocator="one-type", quantiser=("corrected-gptq", {}),
        ),
        Recipe(
            name="pmq",
            summary="a type for each expert by how often it is chosen and how far its output is off, gptq",
            paper="2410.06270",
            measures=(), passes=(), allocator="pmq", quantiser=("gptq", {}),
        ),
        Recipe(
            name="mxmoe",
            summary="a type for each projection of each expert by how far the layer's output is off, gptq",
            paper="2505.05799",
            measures=(), passes=(), allocator="mxmoe", quantiser=("gptq", {}),
        ),
        Recipe(
            name="alphaq",
            summary="a type for each projection of each expert by how heavy-tailed its spectrum is, gptq",
            paper="2606.04980",
            measures=(), passes=(), allocator="alphaq", quantiser=("gptq", {}),
        ),
        Recipe(
            name="bitsmoe-bits",
            summary="a type for each projection of each expert by spectral energy in a shared basis, gptq",
            paper="2606.00079",
            measures=(), passes=(), allocator="bitsmoe-bits", quantiser=("gptq", {}),
        ),
        Recipe(
            name="edgemoe",
            summary="the lower of two types for the experts that matter least, each number the nearest",
            paper="2308.14352",
            measures=(), passes=(), allocator="edgemoe", quantiser=("nearest", {}),
        ),
        Recipe(
            name="shared-base",
            summary="a base for all experts of a layer, a low-rank difference for each (D2-MoE); for --target packed",
            paper="2502.17298",
            measures=(), passes=(), allocator="shared-base", quantiser=("corrected-gptq", {}),
        ),
        Recipe(
            name="coterie-bits",
            summary="give each matrix the type that the loss needs, gptq, make good what changed before it, distil",
            measures=(), passes=(), allocator="mixed-types", quantiser=("corrected-gptq", {}),
            result_steps=(("distill-blocks", {}),),
        ),
        Recipe(
            name="coterie-bits-width",
            summary="coterie-bits, which takes neurons out of experts as well; for --target packed",
            measures=(), passes=(), allocator="mixed-widths", quantiser=("corrected-gptq", {}),
            result_steps=(("distill-blocks", {}),),
        ),
    )
}  # fmt: skip


#: What may follow the name of a recipe that drops experts, after a "+": a pass that comes first, and what it reads.
EXTRAS: dict[str, tuple[str, ...]] = {"protect": ("output_peak",)}

#: Passes that drop experts, and keep those that are protected.
PRUNING_PASSES = ("select", "leave-one-out", "subset-search")


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Return a recipe by name ("reap", "reap+protect"), or your own: ``"my_module:RECIPE"``, or the recipe itself.

    Raises:
        UnknownName: no such recipe, with the nearest names.
        InputError: protection for a recipe that drops no experts, or ``module:attribute`` that is no recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    name, plus, extra = recipe.partition("+")
    base = _imported(name) if ":" in name else RECIPES.get(name)
    if base is None:
        raise UnknownName("recipe", name, RECIPES)
    if not plus:
        return base
    if extra not in EXTRAS:
        raise UnknownName("addition to a recipe", extra, EXTRAS)
    if not any(entry in PRUNING_PASSES for entry, _ in base.passes):
        raise InputError(f"recipe {name} drops no experts, so there is none to protect; leave out +{extra}")
    measures = None if base.measures is None else tuple(sorted({*base.measures, *EXTRAS[extra]}))
    return replace(base, name=recipe, measures=measures, passes=((extra, {}), *base.passes))


def _imported(name: str) -> Recipe:
    module, _, attribute = name.partition(":")
    try:
        imported = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"recipe {name} cannot be imported ({type(error).__name__}: {error}); write module:attribute of a "
            "coterie.compress.recipes.Recipe, with the module on PYTHONPATH"
        ) from error
    if not isinstance(imported, Recipe):
        raise InputError(f"{name} is a {type(imported).__name__}, not a coterie.compress.recipes.Recipe")
    return replace(imported, name=name)


def training_tokens(name: str, effort: str, train_tokens: int | None, *, trains: bool) -> int:
    """Return how many tokens a result is trained on.

    Args:
        name: of the recipe.
        effort: one of `EFFORTS`.
        train_tokens: in place of what the effort says; None for that.
        trains: whether the recipe trains its result at all.

    Raises:
        UnknownName: no such effort.
        InputError: less than no tokens, or tokens for a recipe that trains nothing.
    """
    if train_tokens is None:
        if effort not in EFFORTS:
            raise UnknownName("effort", effort, EFFORTS)
        return EFFORTS[effort] if trains else 0
    if train_tokens < 0:
        raise InputError(f"a result cannot be trained on {train_tokens} tokens; give 0 or more")
    if train_tokens and not trains:
        raise InputError(f"recipe {name} trains nothing: leave --train-tokens out, or take a recipe such as coterie")
    return train_tokens
