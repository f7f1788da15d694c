"""How long the cells of a bench take: what cells of the same recipe took says it best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coterie.bench.cells import Cell


class CellTimes:
    """What cells took so far, in seconds, and what others will take by that."""

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Learn from finished cells, as the store holds them."""
        self._seconds: dict[tuple[str, ...], list[float]] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Learn from one more cell; from one that was not done nothing is learnt."""
        if entry["status"] != "done":
            return
        seconds = entry["seconds"]["compress"] + entry["seconds"]["evaluate"]
        for key in ((entry["model"], entry["recipe"]), (entry["recipe"],), (entry["model"],), ()):
            self._seconds.setdefault(key, []).append(seconds)

    def expected(self, cell: Cell) -> float:
        """Return the seconds of a cell: the mean of those most like it, 1 where nothing is known yet."""
        for key in ((cell.model.name, cell.recipe), (cell.recipe,), (cell.model.name,), ()):
            if key in self._seconds:
                return max(1e-3, sum(self._seconds[key]) / len(self._seconds[key]))
        return 1.0

    def left(self, cells: Sequence[Cell], *, jobs: int) -> float:
        """Return the seconds until so many workers have done all of these cells, at least those of the longest."""
        each = [self.expected(cell) for cell in cells]
        return max(sum(each) / max(1, jobs), *each, 0.0) if each else 0.0
