"""Decide, without touching weights, what every layer becomes: Target + Profile -> Plan; and check a plan that is given.

Three things decide. The recipe's allocator shares out the bytes among the layers. Then each pass that chooses by
statistics alone names the experts that stay (`coterie.compress.methods.load_decide`). What hangs on weights or on the
token sample is left to the passes, when they have the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from coterie.amounts import parse_share
from coterie.compress.allocators.problem import Allocation, Problem, load_allocator
from coterie.compress.check import check_layers, check_prediction, check_widths
from coterie.compress.integers import check_integers, check_joined, loader_of
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.memory_budget import weights_budget
from coterie.compress.methods import load_decide, load_pass, needs_of
from coterie.compress.output import result_config
from coterie.compress.plan import Mtp, Plan
from coterie.compress.prices import Prices
from coterie.compress.quantisers import check_quantiser
from coterie.compress.recipes import Recipe, Step, get_recipe
from coterie.compress.request import Request
from coterie.compress.source import Source
from coterie.compress.state import Measured
from coterie.compress.target import Reader, Target
from coterie.compress.weights import BLOCK_STEPS, at_widths, bytes_saved, check_types
from coterie.compress.width_prices import priced_widths
from coterie.errors import ArchitectureMismatch, Infeasible, InputError, StaleArtifact
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.ragged import places_of
from coterie.model.arch.run_settings import Running
from coterie.model.disk.encodings.integer_types import INTEGERS
from coterie.model.disk.manifest import RouterForm
from coterie.profile.measure import check_predicts
from coterie.profile.profile import Profile, summed
from coterie.profile.statistics import needs_gradients


def plan(
    model: str | Path,
    profile: Profile | str | Path | None = None,
    *,
    keep: float | str | None = None,
    experts: int | None = None,
    width: int | None = None,
    budget: str | int | None = None,
    params: str | int | None = None,
    active_params: str | int | None = None,
    bits: float | None = None,
    type: str | None = None,
    recipe: str | Recipe | None = None,
    router: RouterForm = "plain",
    seed: int = 0,
    mtp: Mtp = "keep",
    multiple_of: int | None = None,
    prices: Prices | str | Path | None = None,
    target: Reader | None = None,
    experts_only: bool = False,
    running: Running | None = None,
) -> Plan:
    """Decide what every layer becomes. Exactly one of `keep`, `experts`, `width`, `budget`, `bits` and `type` says it.

    Args:
        model: a model folder or hub id; only headers are read.
        profile: a profile of the same model; with it the plan names the experts that stay, wherever statistics are
            enough to choose them. A ragged recipe cannot do without.
        keep: share of the experts to keep in each layer, or of the width of each expert, above 0 and up to 1, or
            like "50%".
        experts: experts to keep in each layer.
        width: hidden neurons to keep in each expert, for a recipe that slims them.
        budget: largest size of the weight files, such as "12GiB", "800MB" or a number of bytes.
        params: most parameters in all, such as "15B"; for recipes that change the number of experts or their width.
        active_params: most parameters that one token uses, such as "2B"; for the same.
        bits: most bits that a number of a matrix takes, for a recipe that stores weights in fewer.
        type: the type that matrices are stored in, for such a recipe, see `coterie.compress.target.Target.type`.
        recipe: name of a recipe, ``"module:attribute"`` of your own, or the recipe itself; None for the usual one, see
            `coterie.compress.target.Target.usual_recipe`.
        router: form of the router: "plain", "mean", "refit" or "map", see `Plan`.
        seed: seed of everything random in the passes.
        mtp: what becomes of prediction layers (MTP): "keep" with the experts that the last layer keeps, or "drop".
        multiple_of: the number of experts or their width, whichever the recipe lowers, is the nearest multiple of this.
        prices: what storing each matrix in each type would cost (`coterie.price`), or the folder of that, for a recipe
            that chooses types by it; without them it says no more than how large the result is.
        target: who is to read weights in fewer bits, "gguf", "packed" or "compressed-tensors", see
            `coterie.compress.target.Target.reader`.
        experts_only: store those of routed experts alone in fewer bits, and leave all other weights as they are.
        running: how the result is to run in llama.cpp, where `budget` is for all memory that this takes, not for the
            weights alone: keys, values and buffers are put aside, see `coterie.compress.memory_budget`.

    Raises:
        InputError: not exactly one target, one out of range or not for this recipe, or no profile for a ragged one.
        Infeasible: too few experts for the router, a width that the config cannot say, or a budget below the smallest
            result; names the nearest target.
        UnknownName: no such recipe.
        StaleArtifact: the profile is of another model.
    """
    share = None if keep is None else parse_share(keep)
    budget = weights_budget(model, budget, running, target)
    size = Target(
        keep=share, experts=experts, width=width, budget=budget, params=params,
        active_params=active_params, bits=bits, type=type, multiple_of=multiple_of, reader=target,
        experts_only=experts_only,
    )  # fmt: skip
    request = Request(recipe=get_recipe(size.recipe_meant(recipe)), target=size, router=router, seed=seed)
    request.check()
    source = Source.open(model, mtp=mtp, fetch="samples", target=target or "gguf")
    if isinstance(profile, str | Path):
        profile = Profile.load(profile, model_digest=source.checkpoint.digest)
    if profile is None and request.recipe.allocator == "ragged":
        outline(source, request)
        raise InputError(
            f"recipe {request.recipe.name} ranks the hidden neurons of all layers by what was measured: give a profile "
            "that was made with --gradients"
        )
    if prices is not None and not request.recipe.takes_prices:
        raise InputError(f"recipe {request.recipe.name} does not choose types by what they cost; leave the prices out")
    if isinstance(prices, str | Path):
        prices = Prices.load(prices, model_digest=source.checkpoint.digest)
    sized = make_plan(source, request, profile)
    if prices is None:
        return sized
    check_prices(source, request.recipe, prices)
    return with_types(source, sized, request, prices)


def make_plan(source: Source, request: Request, profile: Profile | None) -> Plan:
    """Make a plan for a model that is open; see `plan`. With a profile it names experts where statistics are enough."""
    if profile is not None:
        check_profile(profile, source, request.recipe.needs)
    outlined = outline(source, request, profile)
    return outlined if profile is None else with_choices(outlined, source.architecture.layers, profile)


def outline(source: Source, request: Request, profile: Profile | None = None) -> Plan:
    """Say how large each layer becomes; no expert is named yet.

    Raises:
        InputError, Infeasible, UnknownName: what is asked for cannot be; see `plan`.
        ArchitectureMismatch: the model predicts no next token, and the recipe needs the gradient of that loss.
    """
    request.check()
    for name, _ in request.passes:
        load_pass(name)
    recipe = request.recipe
    if recipe.allocator == "ragged":
        places_of(source.conversion, source.architecture, [names.experts for names in source.tensors])
    if needs_gradients(recipe.needs):
        check_predicts(source.architecture)
    inputs = {"model": source.checkpoint.digest}
    if profile is not None:
        inputs["text"] = profile.text_digest
    allocation = allocate(source, request, profile)
    unweighed = Plan(
        recipe=recipe.name,
        router=request.router,
        passes=request.passes,
        result_steps=recipe.result_steps,
        layers=allocation.layers,
        types=allocation.types,
        quantiser=recipe.quantiser,
        untouched=source.untouched_prefixes(),
        mtp=source.mtp,
        original_bytes=source.original.num_bytes,
        predicted_bytes=0,
        original_parameters=sum(info.num_elements for info in source.original.tensors.values()),
        predicted_parameters=0,
        seed=request.seed,
        inputs=inputs,
    )
    return weighed(source, unweighed)


def allocate(
    source: Source,
    request: Request,
    profile: Profile | None = None,
    prices: Prices | None = None,
) -> Allocation:
    """Share out the bytes among the layers.

    Without a profile, what a ragged recipe gets only says that the target can be met, and how large the result is; and
    so it is without prices for a recipe that goes by them.
    """
    problem = problem_of(source, request, profile, prices)
    return load_allocator(request.recipe.allocator)(problem)


def problem_of(
    source: Source,
    request: Request,
    profile: Profile | None = None,
    prices: Prices | None = None,
) -> Problem:
    """Return what is to be shared out among the layers of a model."""
    return Problem(
        architecture=source.architecture,
        sizing=source.sizing(keeps_rows=request.router == "map"),
        target=request.target,
        passes=request.recipe.passes,
        profile=profile,
        find_weights=lambda: tuple(
            weight for weight in source.weights if weight.kind == "expert" or not request.target.experts_only
        ),
        damages=None if prices is None else prices.damages,
        widths={} if prices is None else prices.widths,
        shares=prices.shares if prices is not None and request.by_expert else {},
    )


def completed(source: Source, outlined: Plan, request: Request | None, profile: Profile) -> Plan:
    """Return an outline made before anything was measured, with all that is known once a profile is there.

    Args:
        source: the original.
        outlined: what each layer becomes.
        request: what was asked for; None where a plan was given, whose layers are as they are to be.
        profile: what was measured.
    """
    if request is not None and request.recipe.allocator == "ragged":
        outlined = weighed(source, replace(outlined, layers=allocate(source, request, profile).layers))
    inputs = {**outlined.inputs, "text": profile.text_digest}
    return with_choices(replace(outlined, inputs=inputs), source.architecture.layers, profile)


def with_types(source: Source, outlined: Plan, request: Request, prices: Prices) -> Plan:
    """Return an outline with the types and the widths that matrices get, now that it is known what each would cost."""
    allocation = allocate(source, request, prices=prices)
    chosen = replace(
        outlined, layers=allocation.layers, types=allocation.types, damage=allocation.damage, gap=allocation.gap
    )
    return weighed(source, chosen)


def check_prices(source: Source, recipe: Recipe, prices: Prices) -> None:
    """Raise StaleArtifact where prices that an earlier version measured do not say what a recipe goes by."""
    with_widths = {layer.index for layer in source.architecture.layers if priced_widths(layer.width)}
    narrow = (weight for weight in source.weights if weight.width_axis is not None and weight.layer in with_widths)
    if recipe.narrows and not (prices.widths and prices.shares) and any(narrow):
        raise StaleArtifact(
            f"recipe {recipe.name} goes by what narrower experts would cost, which these prices do not say: an earlier "
            "version measured them; run coterie price again, or take --recipe coterie-bits"
        )
    for weight in source.weights:
        if (shares := prices.shares.get(weight.pattern)) is not None and len(shares) != len(weight.names):
            raise StaleArtifact(
                f"the prices are of {len(shares)} experts in {weight.pattern}, and the model has {len(weight.names)}; "
                "run coterie price again"
            )


def with_choices(plan: Plan, layers: Sequence[MoELayer], profile: Profile) -> Plan:
    """Return a plan in which every pass that chooses by statistics alone has named the experts that stay."""
    peaks_LE = profile.all_layers("output_peak") if any(name == "protect" for name, _ in plan.passes) else None
    decided = []
    for layer, each in zip(layers, plan.layers, strict=True):
        statistics = profile.statistics[layer.index]
        measured = Measured(
            statistics=summed(statistics),
            by_domain=statistics,
            peaks_LE=peaks_LE,
        )
        decided.append(choose(layer, each, plan.passes, measured))
    return replace(plan, layers=tuple(decided))


def choose(layer: MoELayer, plan: LayerPlan, passes: Sequence[Step], measured: Measured) -> LayerPlan:
    """Let each pass decide what it can about a layer; experts that the plan names already stay as they are named."""
    for name, options in passes:
        decide = load_decide(name)
        if decide is not None and (plan.experts is None or plan.widths is not None):
            plan = decide(layer, plan, measured, **options)
    return plan


def checked(source: Source, plan: Plan) -> Plan:
    """Return a plan that was saved, perhaps edited, with its bytes counted anew, for the model that it is to run on.

    Raises:
        StaleArtifact: it was made from another model.
        UnknownName, InputError: a pass that there is not.
        Infeasible: a layer, expert or number that cannot be; says which, and the nearest that can.
    """
    if plan.inputs.get("model") != source.checkpoint.digest:
        raise StaleArtifact(
            f"the plan was made from another model ({str(plan.inputs.get('model'))[:12]}; {source.checkpoint.path} is "
            f"{source.checkpoint.digest[:12]}); run coterie plan again"
        )
    for name, _ in plan.passes:
        load_pass(name)
    check_layers(source, plan)
    return weighed(source, plan)


def weighed(source: Source, plan: Plan) -> Plan:
    """Return a plan with the bytes and the parameters of its result counted from the headers.

    Raises:
        Infeasible, ArchitectureMismatch: config.json cannot say what the plan does.
    """
    if plan.packed:
        if plan.ragged:
            check_widths(source, plan)
        counts = [layer.num_experts for layer in source.architecture.layers]
        check_types(at_widths(source.weights, plan.layers), plan, counts)
        check_quantiser(plan.quantiser)
        if any(kind in INTEGERS for kind in plan.types.values()):
            check_integers(source.weights, plan.types)
            check_joined(source)
            if plan.result_steps:
                raise Infeasible(
                    f"{plan.result_steps[0][0]} trains float16 scales of GGML's types, and the plan stores integers "
                    "for compressed-tensors: leave it out"
                )
    elif steps := [name for name, _ in plan.result_steps if name in BLOCK_STEPS]:
        raise Infeasible(f"{steps[0]} trains what is stored in blocks, and the plan stores nothing so: leave it out")
    result_config(source, plan)
    vllm_only = plan.integers and loader_of(source.weights, plan.types) == "vllm"
    check_prediction(source, plan)
    sizing = source.sizing(keeps_rows=plan.mapped)
    weights = at_widths(source.weights, plan.layers) if plan.packed else ()
    return replace(
        plan,
        predicted_bytes=sizing.num_bytes(plan.layers) - bytes_saved(weights, plan.types),
        predicted_parameters=sizing.num_parameters(plan.layers),
        original_bytes=source.original.num_bytes,
        mtp=source.mtp,
        untouched=source.untouched_prefixes(),
        vllm_only=vllm_only,
    )


def needs_of_plan(plan: Plan) -> tuple[str, ...]:
    """Return the statistics that the passes of a plan read, sorted."""
    return tuple(sorted({need for name, options in plan.passes for need in needs_of(name, **options)}))


def check_profile(profile: Profile, source: Source, needs: Iterable[str]) -> None:
    """Raise StaleArtifact for the profile of another model, ArchitectureMismatch where it lacks what a recipe needs."""
    if profile.model_digest != source.checkpoint.digest:
        raise StaleArtifact(
            f"the profile was made from another model ({profile.model_digest[:12]}; {source.checkpoint.path} is "
            f"{source.checkpoint.digest[:12]}); run coterie profile again"
        )
    check_statistics(profile.statistics[0].keys(), needs, asked=profile.asked)


def check_sequential(name: str, needs: Iterable[str]) -> None:
    """Raise InputError where one layer cannot be compressed before the next is measured.

    Args:
        name: of the recipe.
        needs: statistics that it reads.
    """
    statistics = set(needs)
    if needs_gradients(statistics):
        raise InputError(
            f"recipe {name} needs gradients of the loss, which come from behind: they are measured before any layer is "
            "compressed; leave the inputs original"
        )
    if "output_peak" in statistics:
        raise InputError(
            f"recipe {name} keeps super experts, which are known when every layer of the model was measured: leave the "
            "inputs original, or the recipe without +protect"
        )


_NO_SCORES = "the model records no router scores; use a recipe that compares outputs, such as reap or hc-smoe"

#: Why a statistic may be missing from a profile.
_REASONS = {
    "logit_sum": _NO_SCORES,
    "logit_product": _NO_SCORES,
    "tcess": _NO_SCORES,
    "tcess_tokens": _NO_SCORES,
    "easy_ep": "the block's output is not simply added to the residual stream; use reap",
}


def check_statistics(measured: Iterable[str], needs: Iterable[str], *, asked: Iterable[str] | None = None) -> None:
    """Check that what a recipe needs was measured.

    Args:
        measured: statistics that there are.
        needs: those that are needed.
        asked: those that were to be measured; None for all that are needed.

    Raises:
        InputError: it was not asked for.
        ArchitectureMismatch: the model does not show it.
    """
    missing = sorted(set(needs) - set(measured))
    if needs_gradients(missing):
        raise InputError(
            f"the recipe needs {', '.join(missing)}, which are measured where the gradient of the loss is sent back "
            "through the model: run coterie profile with --gradients, or leave the profile out"
        )
    if asked is not None and not set(missing) <= set(asked):
        raise InputError(
            f"the recipe needs {', '.join(missing)}, which the profile does not hold: run coterie profile with "
            f"--statistics {','.join(missing)}, with --recipe and its name or with neither, or leave the profile out"
        )
    if missing:
        reasons = sorted({_REASONS.get(name, "the model does not show it") for name in missing})
        raise ArchitectureMismatch(
            f"the recipe needs {', '.join(missing)}, which the profile does not hold: {'; '.join(reasons)}"
        )
