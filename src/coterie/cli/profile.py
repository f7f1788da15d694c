"""``coterie profile``: run text through a model once and keep what was measured."""

from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli import options
from coterie.cli.complete import complete_recipes, complete_statistics
from coterie.cli.output import print_json, print_table, print_text


def profile(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the profile.")],
    text: Annotated[
        str,
        typer.Option(metavar="TEXT", help=options.TEXT_HELP),
    ],
    tokens: options.Tokens = 131_072,
    seq_len: options.SequenceLength = 512,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    domains: options.Domains = None,
    sample_tokens: options.SampleTokens = 8_192,
    statistics: Annotated[
        str | None,
        typer.Option(
            help="Measure only these statistics, like usage,reap; see also --recipe.",
            autocompletion=complete_statistics,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Measure only what these recipes need, like reap,heapr; see `coterie recipes`.",
            autocompletion=complete_recipes,
        ),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also measure gradients of the loss: three to four times as long.")
    ] = False,
    on: options.On = "all",
    max_memory: options.MaxMemory = None,
    allow_pickle: options.AllowPickle = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Run text through a model and keep what was seen.

    Measured is all that any recipe reads of a forward pass, or what you name. One layer is in memory at a time. Ended
    early, the same command goes on from the last finished layer.
    """
    from coterie.profile.shares import parse_domains

    weights = None if domains is None else parse_domains(domains)
    statistic_names = _named_statistics(statistics, recipe)
    from coterie.profile.run import profile as run

    settings: dict[str, Any] = {
        "text": text,
        "tokens": tokens,
        "seq_len": seq_len,
        "seed": seed,
        "device": device,
        "sample_tokens": sample_tokens,
        "weights": weights,
        "statistics": statistic_names,
        "gradients": gradients,
        "on": on,
        "max_memory": max_memory,
        "allow_pickle": allow_pickle,
    }
    if dry_run:
        from coterie.profile.dry_run import dry_run as foretell

        outlook = foretell(model, out, **settings)
        if json:
            print_json(outlook.content())
            return
        for sentence in (*outlook.sentences(), "dry run: nothing was written"):
            print_text(sentence)
        return
    measured = run(model, out, **settings)
    counts = dict(zip(measured.domains, measured.num_tokens, strict=True))
    if json:
        print_json(
            {
                "path": str(out),
                "model_digest": measured.model_digest,
                "text_digest": measured.text_digest,
                "num_tokens": counts,
                "on": measured.on,
                "seq_len": measured.seq_len,
                "seed": measured.seed,
                "statistics": list(measured.asked),
                "layers": len(measured.layers),
                "sample_tokens": len(measured.samples[0].inputs_TD),
            }
        )
        return
    print_table(
        ("domain", "tokens"),
        [(domain, f"{count:,}") for domain, count in counts.items()],
        footer=("all", f"{sum(counts.values()):,}"),
    )
    print_text()
    print_text(f"profile of {len(measured.layers)} MoE layers written to {out}")


def _named_statistics(statistics: str | None, recipes: str | None) -> set[str] | None:
    """Return the statistics that are named and those that recipes need; None where neither option is given."""
    if statistics is None and recipes is None:
        return None
    from coterie.compress.recipes import get_recipe

    names = set(options.names(statistics or ""))
    return names.union(*(get_recipe(name).needs for name in options.names(recipes or "")))
