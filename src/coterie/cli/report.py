"""``coterie report``: one page to look at."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import print_json, print_text


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder with profiles, plans, results and scorecards.")],
    out: Annotated[Path | None, typer.Option(help="File for the page, like page.html.")] = None,
    json: options.Json = False,
) -> None:
    """Draw one page from all that a folder holds."""
    from coterie.report.page import report as draw

    page = draw(run, out)
    if json:
        print_json({"page": str(page)})
        return
    print_text(f"page written to {page}")
