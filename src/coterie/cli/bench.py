"""``coterie bench``: measure many methods on models, cell by cell."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.complete import complete_recipes, complete_routers
from coterie.cli.output import print_json, print_markdown, print_text


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model folders, GGUF files or hub ids.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for what is found; one that is there goes on.")],
    text: Annotated[
        str,
        typer.Option(metavar="TEXT", help=f"Folder with calibration text: {options.FORMATS}; or hf:NAME, a data set."),
    ],
    test: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="Folder with test text, and *.qa.jsonl files of questions; or hf:NAME, a data set."
        ),
    ],
    recipes: Annotated[
        str,
        typer.Option(
            help="Recipes separated by commas, or all; see `coterie recipes`.", autocompletion=complete_recipes
        ),
    ] = "all",
    routers: Annotated[
        str,
        typer.Option(
            help="Router forms separated by commas; each goes with the recipes that have a use for it.",
            autocompletion=complete_routers,
        ),
    ] = "plain,map",
    removed: Annotated[
        str, typer.Option(help="Shares of the expert parameters to remove, separated by commas.")
    ] = "0.25,0.5,0.625,0.75",
    seeds: Annotated[int, typer.Option(help="Draws of the calibration text; the table has their spread.")] = 3,
    tokens: options.Tokens = 131_072,
    test_tokens: Annotated[
        int | None,
        typer.Option(help="Test tokens in all, shared by the domains; the whole text when left out."),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="Questions of each domain at most; all when left out, none with 0.")
    ] = None,
    on: options.On = "all",
    seq_len: options.SequenceLength = 512,
    sample_tokens: options.SampleTokens = 8_192,
    effort: Annotated[
        str, typer.Option(help="How long recipes that distil train the result: fast, balanced or thorough.")
    ] = "balanced",
    jobs: Annotated[int, typer.Option(help="Worker processes, each with one thread; 0 works in this one.")] = 1,
    device: options.Device = "cpu",
    max_memory: options.MaxMemory = None,
    allow_pickle: options.AllowPickle = False,
    keep_results: Annotated[
        bool, typer.Option("--keep-results", help="Keep the compressed checkpoints, in OUT/results.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Compare recipes on models: what each costs at every size.

    Tables (Markdown), results (JSON) and a plot (SVG) go to OUT. Every finished cell is kept there: ended early, the
    same command goes on, and one that asks for more computes only what is new.
    """
    from coterie.bench.run import bench as run

    results = run(
        models,
        out,
        text=text,
        test=test,
        recipes=recipes,
        routers=options.names(routers),
        removed=_shares(removed),
        seeds=seeds,
        tokens=tokens,
        test_tokens=test_tokens,
        questions=questions,
        on=on,
        seq_len=seq_len,
        sample_tokens=sample_tokens,
        effort=effort,
        jobs=jobs,
        device=device,
        max_memory=max_memory,
        allow_pickle=allow_pickle,
        keep_results=keep_results,
    )
    if json:
        print_json({"out": str(out), "computed": results.computed, "cells": list(results.cells)})
    else:
        print_markdown(results.summary)
        print_text(f"tables, also by domain, results and plot written to {out}")
    if results.failed:
        for cell in results.failed:
            line = f"{cell['model']}, {cell['method']}, {cell['removed']:g} removed, seed {cell['seed']}"
            typer.echo(f"failed: {line}: {cell['reason']}", err=True)
        raise typer.Exit(1)


def _shares(listed: str) -> list[float]:
    try:
        return [float(share) for share in options.names(listed)]
    except ValueError:
        raise typer.BadParameter(
            f"{listed!r} are no numbers separated by commas, like 0.25,0.5", param_hint="--removed"
        ) from None
