"""How commands print: tables for people, JSON for programs, both to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer

#: Columns of a table where standard output is no terminal, so that nothing is cut.
_WIDTH = 200


def print_json(content: Any) -> None:
    """Print anything that JSON can hold."""
    typer.echo(_encodable(json.dumps(content, indent=2, ensure_ascii=False)))


def _encodable(text: str) -> str:
    """Return a text with bytes of file names that are no UTF-8 in escapes, which JSON reads as what they were."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def print_text(text: str = "") -> None:
    """Print a line."""
    typer.echo(_encodable(text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, footer: Sequence[str] | None = None) -> None:
    """Print a table: the first column is for names, all others are for numbers.

    Args:
        columns: headings; one that ends in a colon (which is not printed) is for text.
        rows: cells.
        footer: a last row under a line.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE,
        show_edge=False,
        show_footer=footer is not None,
        pad_edge=False,
        header_style="bold",
        footer_style="bold",
    )
    for number, column in enumerate(columns):
        is_text = number == 0 or column.endswith(":")
        table.add_column(
            column.removesuffix(":"),
            Text(footer[number]) if footer is not None else "",
            justify="left" if is_text else "right",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(_encodable(cell)) for cell in row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)
    console.print(table)


def number(value: float | None, digits: int) -> str:
    """Write a number with so many digits after the point, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Write a share as a percentage with one digit after the point, or a dash for None."""
    return "-" if value is None else f"{100 * value:.1f} %"
