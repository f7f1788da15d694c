"""How commands print: tables for people, JSON for programs, both to standard output.

Text is as wide as the terminal, or as COLUMNS says; in a pipe or a file without that, every row of a table is one line,
as programs that read lines expect.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import typer

from coterie.cli.layout import table_lines, wrap

#: Columns that text is given at least; where there are fewer, it is the terminal that breaks lines.
_NARROWEST = 20


def print_json(content: Any) -> None:
    """Print anything that JSON can hold."""
    typer.echo(_encodable(json.dumps(content, indent=2, ensure_ascii=False)))


def _encodable(text: str) -> str:
    """Return a text with bytes of file names that are no UTF-8 in escapes, which JSON reads as what they were."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def width() -> int | None:
    """Return the columns that text may take; None for no limit."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdigit() and int(asked[:9]) > 0:
        return max(int(asked[:9]), _NARROWEST)
    return max(shutil.get_terminal_size().columns, _NARROWEST) if sys.stdout.isatty() else None


def print_text(text: str = "", *, indent: int = 0) -> None:
    """Print a line; where it is too long, it goes on in others, `indent` spaces to the right."""
    for line in wrap(_encodable(text), width(), indent=indent):
        typer.echo(line)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, footer: Sequence[str] | None = None) -> None:
    """Print a table: the first column is for names, all others are for numbers.

    Args:
        columns: headings; one that ends in a colon (which is not printed) is for text.
        rows: cells.
        footer: a last row under a line.
    """
    cells = [[_encodable(cell) for cell in row] for row in rows]
    rule = "─" if (sys.stdout.encoding or "").lower().startswith("utf") else "-"
    for line in table_lines(columns, cells, width=width(), footer=footer, rule=rule):
        # What is no terminal gets the text alone: echo leaves styles out there.
        typer.echo(typer.style(line.text, bold=True) if line.is_strong and line.text else line.text)


def print_markdown(text: str) -> None:
    """Print Markdown with tables as it is where there is room without limit, else with its tables made to fit."""
    if width() is None:
        typer.echo(_encodable(text))
        return
    table: list[list[str]] = []
    for line in [*text.split("\n"), ""]:
        if line.startswith("| "):
            table.append([cell.strip() for cell in line[2:].removesuffix(" |").split(" | ")])
            continue
        if table:
            print_table(table[0], table[2:])
            table = []
        print_text(line)


def number(value: float | None, digits: int) -> str:
    """Write a number with so many digits after the point, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Write a share as a percentage with one digit after the point, or a dash for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def with_error(value: float | None, error: float | None, digits: int, *, sign: bool = False) -> str:
    """Write a number with its standard error, where there is one, and with a plus before it where a sign is asked for.

    Both have so many digits after the point, like ``+0.512 ± 0.031``; a dash stands for None.
    """
    text = "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"
