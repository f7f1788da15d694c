"""``coterie plan``: decide, without touching weights, what every layer gets."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli import options
from coterie.cli.output import percent, print_json, print_table, print_text

if TYPE_CHECKING:
    from coterie.compress.plan import Plan
    from coterie.compress.state import LayerSize


def plan(
    model: options.Model,
    profile: Annotated[
        Path | None, typer.Argument(metavar="PROFILE", help="Folder of a profile of the same model.")
    ] = None,
    keep: options.Keep = None,
    experts: options.Experts = None,
    width: options.Width = None,
    budget: options.Budget = None,
    recipe: options.Recipe = "coterie",
    router: options.Router = "plain",
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option(help="File for the plan, like plan.json.")] = None,
    json: options.Json = False,
) -> None:
    """Decide what every layer gets.

    No weights are touched: this takes seconds.
    """
    options.check_one_target(keep, experts, width, budget)
    from coterie.compress.plan import plan as decide

    made = decide(
        model,
        profile,
        keep=keep,
        experts=experts,
        width=width,
        budget=budget,
        recipe=recipe,
        router=router,
        seed=seed,
    )
    if out is not None:
        made.save(out)
    if json:
        print_json(made.body() | {"inputs": dict(made.inputs)})
        return
    print_plan(made)
    if out is not None:
        print_text(f"plan written to {out}")


def _width_text(size: "LayerSize") -> str:
    if size.widths is not None:
        mean = sum(size.widths) / len(size.widths)
        return f" of width {min(size.widths)} to {max(size.widths)}, {mean:.1f} on average"
    chosen = "" if size.top_k is None else f", {size.top_k} for each token"
    return "" if size.width is None else f" of width {size.width}{chosen}"


def print_plan(made: "Plan") -> None:
    """Print what a plan does and how small that is."""
    from coterie.amounts import format_bytes, format_count

    print_text(f"recipe {made.recipe}, router {made.router}, seed {made.seed}")
    start = 0
    for size, group in groupby(made.sizes):
        count = len(list(group))
        where = f"MoE layer {start}" if count == 1 else f"MoE layers {start} to {start + count - 1}"
        print_text(f"{where}: {size.num_experts} experts{_width_text(size)}")
        start += count
    for name in made.untouched:
        print_text(f"{name}: copied as it is; the model does not run it")
    print_text()
    print_table(
        ("", "before", "after", "ratio"),
        [
            (
                "bytes",
                format_bytes(made.original_bytes),
                format_bytes(made.predicted_bytes),
                percent(made.predicted_bytes / made.original_bytes),
            ),
            (
                "parameters",
                format_count(made.original_parameters),
                format_count(made.predicted_parameters),
                percent(made.predicted_parameters / made.original_parameters),
            ),
        ],
    )
    print_text()
