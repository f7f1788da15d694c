"""Open a checkpoint as one of plain numbers, whatever it is stored as."""

from __future__ import annotations

import logging
from pathlib import Path

from coterie.amounts import format_bytes
from coterie.model.disk.checkpoint import Checkpoint, Fetch
from coterie.model.disk.filled import filled_up
from coterie.model.disk.manifest import Manifest
from coterie.model.disk.quantized import dequantized

log = logging.getLogger(__name__)


def open_checkpoint(
    model: str | Path, *, output_dtype: str = "bfloat16", allow_pickle: bool = False, fetch: Fetch = "weights"
) -> Checkpoint:
    """Open a checkpoint as one of plain numbers: what is stored in 8 or 4 bits is dequantised as it is read.

    Experts of a ragged checkpoint are filled up with zeros to the same width.

    Args:
        model: a model folder or a hub id.
        output_dtype: number format that quantised tensors are given; others keep theirs.
        allow_pickle: read weights that are stored as pickles.
        fetch: what of the weights of a hub id is fetched, see `Checkpoint.open`.

    Raises:
        NotACheckpoint, CorruptCheckpoint: no such model, or a damaged one.
        UnsupportedDtype: quantised in a way that cannot be undone here, or an unknown `output_dtype`.
    """
    stored = Checkpoint.open(model, allow_pickle=allow_pickle, fetch=fetch)
    plain = dequantized(stored, output_dtype)
    if plain is not stored:
        sizes = f"{format_bytes(stored.num_bytes)} there, {format_bytes(plain.num_bytes)} as {output_dtype}"
        log.info("%s is stored quantised and read as plain numbers: %s", stored.path, sizes)
    manifest = Manifest.read(plain.path)
    return filled_up(plain, None if manifest is None else manifest.ragged)
