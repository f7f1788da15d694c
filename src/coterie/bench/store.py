"""The store: one JSON line a finished cell, on the disk before the next one counts as begun."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coterie.artifact import full_disk, sync
from coterie.errors import CorruptArtifact

log = logging.getLogger(__name__)


class Store:
    """Finished cells by key; only one process writes to it.

    A line that a crash left half written is the last one; it is removed, and its cell is computed again.
    """

    def __init__(self, path: Path) -> None:
        """Read the cells that are there.

        Raises:
            CorruptArtifact: a line before the last is none of ours.
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
                self.cells[entry["key"]] = entry
            except (ValueError, KeyError, TypeError):
                raise CorruptArtifact(
                    f"{path}, line {number} is not a cell; remove that line and its cell is computed again"
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
