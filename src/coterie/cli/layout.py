"""Text in a given number of columns: lines, and tables that lose nothing however narrow they get.

A width of None is no limit. Widths are those of a terminal, where some letters take two columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: Between two columns of a table.
_GAP = "  "
#: The longest text that a table keeps whole, tried one after another: a word, or a piece of a name between the places
#: where it is best broken.
_WHOLE = (None, 16, 12)


def text_width(text: str) -> int:
    """Return how many columns a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def wrap(text: str, width: int | None, *, indent: int = 0, inside_words: bool = False) -> list[str]:
    """Return a text as lines of at most `width` columns.

    Args:
        text: one line or more.
        width: columns.
        indent: spaces before all lines but the first of each line of the text.
        inside_words: break long words too, after marks like a slash or anywhere; else they stay whole, as a path that
            somebody will copy has to.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        lines += [line] if width is None or text_width(line) <= width else _wrap_line(line, width, indent, inside_words)
    return lines


def _wrap_line(line: str, width: int, indent: int, inside_words: bool) -> Iterator[str]:
    indent = min(indent, width // 2)
    current, space = "", ""
    for word in re.findall(r"\s+|\S+", line):
        if word.isspace():
            space = word
            continue
        is_broken = inside_words and text_width(word) > width - (indent if current else 0)
        for part in _pieces(word) if is_broken else (word,):
            if current.strip() and text_width(current + space + part) > width:
                yield current
                current, space = " " * indent, ""
            current += space + part
            space = ""
            while inside_words and text_width(current) > width:
                cut = _fitting(current, width)
                yield current[:cut]
                current = " " * indent + current[cut:]
    yield current


def _fitting(text: str, width: int) -> int:
    """Return how many letters of a text fit, at least one."""
    count = len(text)
    while count > 1 and text_width(text[:count]) > width:
        count -= 1
    return count


def _pieces(word: str) -> list[str]:
    """Return a word in pieces between which it is best broken: after marks, and before capitals as in CamelCase."""
    return re.findall(r".+?(?:(?<=[/_,.:+\-])|(?<=[a-z\d])(?=[A-Z][a-z])|$)", word)


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    cells: Sequence[str]
    is_text: bool

    @property
    def widest(self) -> int:
        return max(map(text_width, (self.heading, *self.cells)))

    def narrowest(self, whole: int | None) -> int:
        """Return the least width where pieces of so many columns stay whole, or all words; numbers always do."""
        heading = max((text_width(word) for word in self.heading.split()), default=0)
        if not self.is_text:
            return max(heading, *map(text_width, self.cells), 1)
        words = (word for cell in self.cells for word in cell.split())
        parts = (part for word in words for part in ((word,) if whole is None else _pieces(word)))
        longest = max(map(text_width, parts), default=0)
        return max(heading, longest if whole is None else min(longest, whole), 1)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table; `is_strong` for headings and footers."""

    text: str
    is_strong: bool = False


def table_lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int | None,
    footer: Sequence[str] | None = None,
    rule: str = "─",
) -> list[Line]:
    """Return a table as lines of at most `width` columns.

    Headings and text are wrapped where the table is too wide; numbers never are. Where that is not enough, every row
    becomes a paragraph with a line for each column.

    Args:
        columns: headings; one that ends in a colon (which is not shown) is for text, and so is the first.
        rows: cells.
        width: columns.
        footer: a last row under a line.
        rule: what the lines are drawn with.
    """
    shown = [*rows, *([] if footer is None else [footer])]
    table = [
        _Column(heading.removesuffix(":"), [row[number] for row in shown], number == 0 or heading.endswith(":"))
        for number, heading in enumerate(columns)
    ]
    widths = _fit(table, width)
    if widths is None:
        assert width is not None
        return [line for row in shown for line in _paragraph(table, row, width)][:-1]

    def written(cells: Sequence[str], is_strong: bool = False) -> Iterator[Line]:
        for line in _row(table, cells, widths):
            yield Line(line, is_strong)

    straight = Line(rule * (sum(widths) + len(_GAP) * (len(widths) - 1)))
    lines = [*written([column.heading for column in table], True), straight]
    for row in rows:
        lines += written(row)
    if footer is not None:
        lines += [straight, *written(footer, True)]
    return lines


def _fit(table: Sequence[_Column], width: int | None) -> list[int] | None:
    """Return the widths of the columns, taken from the widest first; None where they cannot be narrow enough."""
    widths = [column.widest for column in table]
    if width is None:
        return widths
    space = width - len(_GAP) * (len(table) - 1)
    for whole in _WHOLE:
        least = [column.narrowest(whole) for column in table]
        if sum(least) <= space:
            break
    else:
        return None
    while sum(widths) > space:
        number = max((n for n in range(len(table)) if widths[n] > least[n]), key=lambda n: widths[n])
        widths[number] -= 1
    return widths


def _row(table: Sequence[_Column], cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    wrapped = [wrap(cell, width, inside_words=True) for cell, width in zip(cells, widths, strict=True)]
    for number in range(max(map(len, wrapped))):
        texts = [lines[number] if number < len(lines) else "" for lines in wrapped]
        padded = []
        for text, width, column in zip(texts, widths, table, strict=True):
            space = " " * (width - text_width(text))
            padded.append(text + space if column.is_text else space + text)
        yield _GAP.join(padded).rstrip()


def _paragraph(table: Sequence[_Column], row: Sequence[str], width: int) -> Iterator[Line]:
    for line in wrap(row[0], width, inside_words=True):
        yield Line(line, is_strong=True)
    start = min(max(text_width(column.heading) for column in table[1:]) + 4, max(width - 12, 2))
    for column, cell in zip(table[1:], row[1:], strict=True):
        before = f"  {column.heading}".ljust(start)
        for line in wrap(f"{before}{cell}", width, indent=start, inside_words=True):
            yield Line(line)
    yield Line("")
