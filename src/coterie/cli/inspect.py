"""``coterie inspect``: what is inside a model, what it weighs, what would fit."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli import options
from coterie.cli.output import percent, print_json, print_table, print_text
from coterie.cli.ways import print_ways

if TYPE_CHECKING:
    from coterie.model.arch.inspect import BudgetFit, Inspection, MoEBlock

#: Columns of what stands before a fact.
_LABEL = 17


def inspect(
    model: options.Model,
    budget: Annotated[str | None, typer.Option(help="List the ways to fit into it, like 12GiB or 800MB.")] = None,
    budget_for: options.BudgetFor = "file",
    context: Annotated[
        int | None, typer.Option(help="For --run and --budget-for memory: tokens of a sequence.")
    ] = None,
    batch: options.Batch = None,
    kv_type: options.KvType = None,
    run: Annotated[
        bool,
        typer.Option("--run", help="Forecast a coterie run: whether it fits, and how fast it is about to be."),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="For --run: memory that it may take, like 6GiB.", show_default="three quarters of what is free"
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="For --run: which experts this model's tokens chose (coterie run --save-trace).",
            show_default="those of the bundled models",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="For --run: tokens of the prompt before the first token.", show_default="512")
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="For --run: how keys and values are kept, as coterie run has it.",
            show_default="auto",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Show what is in a model and what would fit.

    With --budget it lists the ways to meet it, fewer bits and fewer experts, and what each is about to cost.

    With --run it says what generating within --memory is about to be like; experts are read for some seconds, to see
    how fast the disk is, and products are computed.

    All else reads only config.json and the headers of the weight files.
    """
    if run:
        given = {"--budget": budget, "--batch": batch, "--kv-type": kv_type}
        if names := [name for name, value in given.items() if value is not None]:
            raise typer.BadParameter("it is not for --run, whose budget is --memory", param_hint=names[0])
        _forecast(model, memory, context, trace, prompt_tokens, kv, json=json)
        return
    options.only_with("--run", {"--memory": memory, "--trace": trace, "--prompt-tokens": prompt_tokens, "--kv": kv})
    how = options.running(budget, budget_for, context, batch, kv_type)
    listed = None
    if budget is None:
        from coterie.model.arch.inspect import inspect as look

        inspection = look(model)
    else:
        from coterie.compress.ways import inspect_with_ways

        inspection, listed = inspect_with_ways(model, budget, running=how)
    if json:
        print_json(inspection.to_json() | ({} if listed is None else {"ways": listed.content()}))
        return
    _print(inspection)
    if listed is not None:
        print_text()
        print_ways(listed)


def _forecast(
    model: str,
    memory: str | None,
    context: int | None,
    trace: Path | None,
    prompt_tokens: int | None,
    kv: str | None,
    *,
    json: bool,
) -> None:
    """Forecast a run, and print that."""
    from coterie.cli.forecast import print_forecast
    from coterie.run.engine import default_memory
    from coterie.run.forecast import forecast
    from coterie.run.prepare import CONTEXT

    said = forecast(
        model,
        memory=default_memory() if memory is None else memory,
        context=CONTEXT if context is None else context,
        trace=trace,
        prompt_tokens=prompt_tokens,
        kv=kv or "auto",
    )
    if json:
        print_json(said.to_json())
    else:
        print_forecast(said)


def _print(inspection: "Inspection") -> None:
    from coterie.amounts import format_bytes, format_count

    with_experts = f"{len(inspection.moe_layers)} of them with experts"
    print_text(f"{inspection.path}: {inspection.model_type}, {inspection.layers} layers, {with_experts}")
    for line in _layer_lines(inspection.moe_layers):
        print_text(line)
    if inspection.prediction:
        print_text(f"prediction layers (MTP), run by other programs: {', '.join(inspection.prediction)}")
    for note in inspection.awkward:
        print_text(f"note: {note}")
    print_text()
    total = inspection.total
    print_table(
        ("part", "parameters", "bytes", "share of bytes"),
        [
            (part, format_count(amount.parameters), format_bytes(amount.bytes), percent(amount.bytes / total.bytes))
            for part, amount in inspection.parts.items()
            if amount.bytes
        ],
        footer=("all", format_count(total.parameters), format_bytes(total.bytes), "100.0 %"),
    )
    print_text()
    tied = "tied" if inspection.tied_embeddings else "not tied"
    active = format_count(inspection.active_parameters)
    print_text(f"a token uses     {active} parameters (embeddings in whole; {tied})", indent=_LABEL)
    stored = ", ".join(f"{name} {format_bytes(size)}" for name, size in inspection.bytes_by_dtype.items())
    print_text(f"stored as        {stored}", indent=_LABEL)
    print_text(f"files on disk    {format_bytes(inspection.file_bytes)}", indent=_LABEL)
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in inspection.estimates.items())
    print_text(
        f"it would take    {sizes} (int8, int4: experts in groups of 128 with scale and zero; rest bf16)", indent=_LABEL
    )
    if inspection.budget is not None:
        print_text(f"a budget of      {_budget_line(inspection.budget)}", indent=_LABEL)


def _layer_lines(layers: "tuple[MoEBlock, ...]") -> Iterator[str]:
    def facts(layer: "MoEBlock") -> tuple[int, ...]:
        return layer.num_experts, layer.router_rows, layer.top_k, layer.width, layer.hidden_size

    for (experts, rows, top_k, width, hidden), group in groupby(layers, key=facts):
        members = list(group)
        first, last = members[0], members[-1]
        where = first.block if first is last else f"{first.block} to {last.block}"
        mapped = "" if rows == experts else f" (behind a map of {rows})"
        yield f"{where}: {experts} experts{mapped}, {top_k} a token, width {width}, model width {hidden}"


def _budget_line(fit: "BudgetFit") -> str:
    from coterie.amounts import format_bytes
    from coterie.model.disk.encodings.ggml import SIZES, bits_of

    least = min(map(bits_of, SIZES))
    fewer_bits = f"all experts at {fit.bits:.2f} bits a number (coterie compress --budget)"
    if fit.bits < least:
        fewer_bits = f"at {least:.2f} bits a number, the fewest, all experts are still too large"
    elif fit.bits > 16:
        fewer_bits = "all experts as they are"
    return f"{format_bytes(fit.limit)}: {fewer_bits}; {_fewer_experts(fit)}"


def _fewer_experts(fit: "BudgetFit") -> str:
    from coterie.amounts import format_bytes
    from coterie.model.arch.shapes import awkward_shapes

    if fit.feasible:
        notes = "".join(f"; {note}: --multiple-of chooses others" for note in awkward_shapes(fit.experts))
        largest = f"{fit.experts} experts a layer fit (--keep {fit.keep:.3g}), {format_bytes(fit.bytes)}"
        return f"or {largest}{notes}"
    return (
        f"it cannot be met by keeping fewer experts: the least that can be routed, {fit.smallest_experts} a layer, "
        f"takes {format_bytes(fit.smallest)}"
    )
