"""Progress bars: to stderr, and only when it is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_is_wanted = True


def show_bars(wanted: bool) -> None:
    """Say whether bars are drawn at all, for this process; they are by default."""
    global _is_wanted
    _is_wanted = wanted


def are_bars_drawn() -> bool:
    """Return whether a bar would be seen: stderr is a terminal, and nobody has asked for none."""
    return _is_wanted and sys.stderr.isatty()


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and draw a progress bar meanwhile, where it can be seen."""
    if not are_bars_drawn():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=description, total=total, console=Console(stderr=True), transient=True)
