"""Load what was written, layer by layer, and compare it with what was computed."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from coterie.errors import ReloadMismatch
from coterie.model.disk.open import open_checkpoint
from coterie.model.stream.stream import Stream

#: Largest difference of logits between the model in flight and the one loaded again, relative to the largest logit.
RELOAD_TOLERANCE = 1e-4


def check_reload(folder: Path, ids_BS: Tensor, expected_BSV: Tensor, *, device: str = "cpu") -> float:
    """Run what was written, layer by layer, and compare its logits with those of the model in flight.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        CorruptCheckpoint: tensors are missing or of the wrong shape.
        ReloadMismatch: the logits differ by more than `RELOAD_TOLERANCE`.
    """
    with Stream(open_checkpoint(folder), device=device, scratch=folder.parent) as stream:
        run = stream.run([stream.logits_job(ids_BS)])
        for _ in run:
            pass
    logits_BSV: Tensor = run.results[0]
    error = float((expected_BSV - logits_BSV).abs().max() / expected_BSV.abs().max().clamp(min=1e-30))
    if not error <= RELOAD_TOLERANCE:
        raise ReloadMismatch(
            f"the checkpoint that was written computes other logits than the model in flight: they differ by "
            f"{error:.2e} of the largest logit (limit {RELOAD_TOLERANCE:.0e}); nothing was kept, please report it"
        )
    return error
