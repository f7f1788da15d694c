"""The store: one JSON line a finished cell, on the disk before the next one counts as begun.

Lines are read strictly: of a cell that was done all numbers, of another one why it was not.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coterie.artifact import full_disk, sync
from coterie.compress.recipes import ROUTERS
from coterie.errors import CorruptArtifact
from coterie.evaluate.scorecard import read_scores
from coterie.fields import Fields

log = logging.getLogger(__name__)


class Store:
    """Finished cells by key; only one process writes to it.

    A line that a crash left half written is the last one; it is removed, and its cell is computed again.
    """

    def __init__(self, path: Path) -> None:
        """Read the cells that are there.

        Raises:
            CorruptArtifact: a line before the last is none of ours, or a field of it is missing, unknown or of another
                type.
        """
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            log.warning("%s ended within a line; the cell of that line is computed again", path)
            with path.open("r+b") as file:
                file.truncate(len(content) - len(torn))
                os.fsync(file.fileno())
        for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
            try:
                entry = json.loads(line)
                _check_cell(Fields(entry, where="the line"))
                self.cells[entry["key"]] = entry
            except (ValueError, RecursionError, CorruptArtifact) as error:
                raise CorruptArtifact(
                    f"{path}, line {number} is not a cell ({error}); remove that line and its cell is computed again"
                ) from None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append a cell; a later one of the same key counts instead of an earlier one."""
        line = json.dumps(entry, ensure_ascii=False, allow_nan=True) + "\n"
        new = not self.path.exists()
        with full_disk(f"{self.path} was written"), self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(self.path.parent)
        self.cells[str(entry["key"])] = dict(entry)


def read_seconds(path: Path) -> float:
    """Return the seconds that a profile of a bench took, from the file beside it.

    Raises:
        CorruptArtifact: it does not say so.
    """
    try:
        took = Fields(json.loads(path.read_text(encoding="utf-8")), where="it")
        return took.number("seconds", least=0)
    except (ValueError, RecursionError, CorruptArtifact) as error:
        raise CorruptArtifact(
            f"{path} does not say how long the profile took ({error}); remove it and the profile is made again"
        ) from None


def _check_cell(cell: Fields) -> None:
    with cell.all_read():
        for name in ("key", "model", "model_digest", "method", "recipe"):
            cell.text(name)
        cell.text("router", tuple(ROUTERS))
        cell.whole("seed", least=None)
        if not 0 < (removed := cell.number("removed")) < 1:
            raise cell.wrong("removed", removed, "should be a share between 0 and 1")
        seconds = cell.nested("seconds")
        if cell.text("status", ("done", "failed", "infeasible")) == "done":
            _check_numbers(cell, seconds)
            return
        for name in ("error", "reason"):
            cell.text(name)
        if cell.said("traceback"):
            cell.text("traceback")
        for name in seconds.names():
            seconds.number(name, least=0)


def _check_numbers(cell: Fields, seconds: Fields) -> None:
    """Check what a cell says that was done."""
    read_scores(cell)
    for domain in cell.each_by_name("domains").values():
        with domain.all_read():
            read_scores(domain)
    cell.whole("bytes")
    for name in ("bytes_ratio", "logits_error"):
        if not cell.null(name):
            cell.number(name, least=0)
    cell.wholes("num_experts")
    if cell.said("trained") and not cell.null("trained"):  # early versions did not say it
        cell.yes_or_no("trained")
    cell.text("loads_with", ("transformers", "coterie"))
    if not cell.null("peak_bytes"):
        cell.whole("peak_bytes")
    with seconds.all_read():
        for name in ("profile", "compress", "evaluate"):
            seconds.number(name, least=0)
        stages = seconds.nested("stages")
        for name in stages.names():
            stages.number(name, least=0)
