"""``coterie price``: what storing each matrix in each type of fewer bits would cost."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_table, print_text


def price(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="PRICES", help="Folder for the prices; not there, or empty.")],
    text: Annotated[str, typer.Option(metavar="TEXT", help=options.TEXT_HELP)],
    tokens: options.Tokens = 32_768,
    seq_len: options.SequenceLength = 512,
    seed: options.Seed = 0,
    domains: options.Domains = None,
    device: options.Device = "cpu",
    on: options.On = "all",
    mtp: options.Mtp = None,
    max_memory: options.MaxMemory = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Measure what fewer bits would cost, matrix by matrix.

    The text goes through the model and the gradient of its loss comes back, one layer in memory at a time; `coterie
    frontier`, `plan` and `compress` read what was measured. Ended early, the same command goes on from the last
    finished layer.
    """
    from coterie.profile.shares import parse_domains

    weights = None if domains is None else parse_domains(domains)
    from coterie.compress.prices import price as run

    prices = run(
        model, out, text=text, tokens=tokens, seq_len=seq_len, seed=seed, weights=weights, device=device, on=on,
        mtp=mtp, max_memory=max_memory, allow_pickle=allow_pickle,
    )  # fmt: skip
    if json:
        print_json({"path": str(out), **prices.inputs, **prices.body()})
        return
    totals: dict[str, list[float]] = {}
    for by_type in prices.damages.values():
        for kind, damage in by_type.items():
            totals.setdefault(kind, []).append(damage)
    print_table(
        ("type", "matrices", "expected rise of the loss, nats a token"),
        [(kind, str(len(each)), f"{sum(each):.3g}") for kind, each in totals.items()],
    )
    print_text()
    print_text(f"prices of {len(prices.damages)} matrices on {prices.num_tokens:,} tokens written to {out}")
