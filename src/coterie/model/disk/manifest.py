"""The manifest of a checkpoint that Coterie wrote: coterie.json beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coterie.artifact import read_artifact

MANIFEST = "coterie.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the body of the manifest of a checkpoint that Coterie wrote, or None for any other checkpoint."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    return read_artifact(path, kind="manifest")[0]


def ragged_part(manifest: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return what the body of a manifest says of widths that differ by expert, for `coterie.model.disk.filled`."""
    return None if manifest is None else manifest.get("ragged")
