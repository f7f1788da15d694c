"""``coterie card``: write the model card of a result anew."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_text


def card(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a result of `coterie compress`.")],
    scorecard: Annotated[
        Path | None, typer.Option(help="Scorecard of it, made by `coterie evaluate --out`: what it costs.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the original, like owner/name, where it is not known.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--out", help="File for the card; OUT/README.md when left out.")] = None,
    json: options.Json = False,
) -> None:
    """Write the model card of a result anew.

    `coterie compress` writes one already; this adds what was measured since, or the id of the original. A card that was
    edited is not replaced.
    """
    from coterie.evaluate.card import card as write

    path = write(out, scorecard=scorecard, base_model=base_model, file=file)
    if json:
        print_json({"card": str(path)})
        return
    print_text(f"card written to {path}")
