"""``coterie plan``: decide, without touching weights, what every layer gets."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli import options
from coterie.cli.output import percent, print_json, print_table, print_text
from coterie.cli.ways import print_ways
from coterie.model.disk.manifest import RouterForm

if TYPE_CHECKING:
    from coterie.compress.layer_plan import LayerPlan
    from coterie.compress.plan import Plan


def plan(
    model: options.Model,
    profile: Annotated[
        Path | None, typer.Argument(metavar="PROFILE", help="Folder of a profile of the same model.")
    ] = None,
    keep: options.Keep = None,
    experts: options.Experts = None,
    width: options.Width = None,
    budget: options.Budget = None,
    params: options.Params = None,
    active_params: options.ActiveParams = None,
    budget_for: options.BudgetFor = "file",
    context: options.Context = None,
    batch: options.Batch = None,
    kv_type: options.KvType = None,
    bits: options.Bits = None,
    type: options.Type = None,
    recipe: options.Recipe = None,
    router: options.Router = "plain",
    seed: options.Seed = 0,
    mtp: options.Mtp = None,
    multiple_of: options.MultipleOf = None,
    target: options.Target = None,
    experts_only: options.ExpertsOnly = False,
    prices: options.Prices = None,
    out: Annotated[Path | None, typer.Option(help="File for the plan, like plan.json.")] = None,
    json: options.Json = False,
) -> None:
    """Decide what every layer gets.

    No weights are touched: this takes seconds. With --budget the ways to meet it are listed too and, where prices are
    given, what they cost on this model. The file that --out names can be read, edited, and given to `compress --plan`.
    """
    targets = options.one_target(
        keep=keep, experts=experts, width=width, budget=budget, params=params, active_params=active_params, bits=bits,
        type=type,
    )  # fmt: skip
    how = options.running(budget, budget_for, context, batch, kv_type)
    check_request(model, {**targets, "reader": target}, recipe, router, seed)
    from coterie.outputs import check_output

    if out is not None:
        check_output(out, kind="plan", reads={"model folder": [model], "profile": [profile], "prices": [prices]})
    from coterie.compress.decide import plan as decide

    decided_plan = decide(
        model,
        profile,
        **targets,
        recipe=recipe,
        router=router,
        seed=seed,
        mtp=mtp or "keep",
        multiple_of=multiple_of,
        target=target,
        experts_only=experts_only,
        prices=prices,
        running=how,
    )
    if out is not None:
        decided_plan.save(out)
    listed = None
    if budget is not None:
        from coterie.compress.ways import ways

        listed = ways(model, budget, prices=prices, target=target or "gguf", running=how)
    if json:
        content = decided_plan.body() | {"inputs": dict(decided_plan.inputs)}
        print_json(content if listed is None else content | {"ways": listed.content()})
        return
    print_plan(decided_plan)
    if listed is not None:
        print_ways(listed)
    if out is not None:
        print_text(f"plan written to {out}")


def check_request(
    model: str, targets: Mapping[str, Any], recipe: str | None, router: RouterForm, seed: int, search: int = 0
) -> None:
    """Refuse, before anything heavy is imported, what no model could be given, and what is no model."""
    from coterie.compress.recipes import get_recipe
    from coterie.compress.request import Request
    from coterie.compress.target import Target
    from coterie.model.disk.checkpoint import read_config, resolve

    target = Target(**targets)
    chosen = get_recipe(target.recipe_meant(recipe))
    Request(recipe=chosen, target=target, router=router, seed=seed, search=search).check()
    read_config(resolve(model, weights=False))


def _width_text(layer: "LayerPlan") -> str:
    if layer.widths is not None:
        mean = sum(layer.widths) / len(layer.widths)
        return f" of width {min(layer.widths)} to {max(layer.widths)}, {mean:.1f} on average"
    chosen = "" if layer.top_k is None else f", {layer.top_k} for each token"
    return "" if layer.width is None else f" of width {layer.width}{chosen}"


def _type_texts(plan: "Plan") -> list[str]:
    """Return a line for each type: how many names it is given to, and one of them."""
    by_type: dict[str, list[str]] = {}
    for name, kind in plan.types.items():
        by_type.setdefault(kind, []).append(name)
    return [f"{kind}: {len(names)} weights, such as {names[0]}" for kind, names in by_type.items()]


def _layer_text(layer: "LayerPlan") -> str:
    return f"{layer.num_experts} experts{_width_text(layer)}"


def print_plan(plan: "Plan") -> None:
    """Print what a plan does and how small that is."""
    from coterie.amounts import format_bytes, format_count

    print_text(f"recipe {plan.recipe}, router {plan.router}, seed {plan.seed}")
    start = 0
    for text, group in groupby(plan.layers, key=_layer_text):
        count = len(list(group))
        where = f"MoE layer {start}" if count == 1 else f"MoE layers {start} to {start + count - 1}"
        print_text(f"{where}: {text}")
        start += count
    for text in _type_texts(plan):
        print_text(text)
    if plan.vllm_only:
        print_text("experts of layers are stored in different types: vLLM alone loads that, transformers does not")
    if plan.expected_kl is not None:
        print_text(f"expected divergence from the original: about {plan.expected_kl:.2g} nats a token")
    if plan.gap is not None:
        print_text(f"of that, at most {percent(plan.gap)} could be saved in the same bytes")
    for name in plan.untouched:
        print_text(f"{name}: copied; the model does not run it")
    if plan.mtp is not None:
        said = {"keep": "kept; their experts follow those of the last layer", "drop": "left out"}
        print_text(f"prediction layers (MTP): {said[plan.mtp]}")
    for note in plan.awkward:
        print_text(f"note: {note}; --multiple-of chooses others")
    print_text()
    print_table(
        ("", "before", "after", "ratio"),
        [
            (
                "bytes",
                format_bytes(plan.original_bytes),
                format_bytes(plan.predicted_bytes),
                percent(plan.predicted_bytes / plan.original_bytes),
            ),
            (
                "parameters",
                format_count(plan.original_parameters),
                format_count(plan.predicted_parameters),
                percent(plan.predicted_parameters / plan.original_parameters),
            ),
        ],
    )
    print_text()
