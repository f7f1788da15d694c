"""Markdown that says what it is given, whatever characters are in it."""

from __future__ import annotations

import re
from collections.abc import Sequence


def plain(text: str) -> str:
    """Return a text on one line that no Markdown or HTML is read into."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*_{}\[\]#|<>~&$])", r"\\\1", line)


def code(text: str) -> str:
    """Return a text on one line as code, in a table too."""
    line = "".join(character if character.isprintable() else " " for character in text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(lines: Sequence[str], language: str) -> str:
    """Return a block of code; a line stays one line."""
    text = "\n".join("".join(c if c.isprintable() else " " for c in line) for line in lines)
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already; the first column is for names, the others for numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
