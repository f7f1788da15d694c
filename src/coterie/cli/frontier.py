"""``coterie frontier``: what can be had for how many bytes, and what it is expected to cost."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options
from coterie.cli.output import percent, print_json, print_table, print_text


def frontier(
    model: options.Model,
    prices: Annotated[Path, typer.Argument(metavar="PRICES", help="Folder that `coterie price` made for this model.")],
    budgets: Annotated[
        str | None, typer.Option(help="List these sizes, like 12GiB,8GiB; shares of the model when left out.")
    ] = None,
    target: options.BlocksTarget = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw it, as an SVG file like frontier.svg.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List sizes, and the divergence to expect at each.

    Beside each mixture of types stands the best single type that is no larger. No weights are touched: this takes
    seconds.
    """
    if picture is not None:
        from coterie.report.frontier import check_picture

        check_picture(picture, {"model folder": [model], "prices": [prices]})
    from coterie.compress.frontier import frontier as run

    listed = run(model, prices, budgets=None if budgets is None else options.names(budgets), target=target or "gguf")
    if picture is not None:
        from coterie.report.frontier import write_picture

        write_picture(listed, picture, title=Path(model).name)
    if json:
        print_json(listed.content())
        return
    from coterie.amounts import format_bytes

    rows, narrows = [], any(point.neurons < 1 for point in listed.mixed)
    for point in listed.mixed:
        plain = listed.plain_within(point.num_bytes)
        main = max(point.types, key=lambda kind: point.types[kind], default="")
        rows.append(
            (
                format_bytes(point.num_bytes),
                percent(point.num_bytes / listed.original_bytes),
                f"{point.expected_kl:.2g}",
                f"{main} and {len(point.types) - 1} more" if len(point.types) > 1 else main,
                *((percent(point.neurons),) if narrows else ()),
                "-" if plain is None else f"{plain.expected_kl:.2g}",
                "-" if plain is None else plain.name,
            )
        )
    print_table(
        ("bytes", "share", "mixed: KL", "mostly", *(("neurons",) if narrows else ()), "one type: KL", "which"), rows
    )
    if picture is not None:
        print_text()
        print_text(f"drawn in {picture}")
