"""Kept predictions: what a base predicts after every token of a text, computed once, in a file.

Many models are compared with one base on one text when methods are. The base's log-probabilities are then the same
every time; they are kept as float32, as they were computed, so that scores do not change by it.

Legend: N sequences, B of them in a batch, S tokens of a sequence, T = S - 1 predicted tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from coterie.amounts import format_bytes
from coterie.artifact import atomic_path, check_file, digest_of, file_digest, open_artifact, write_artifact
from coterie.errors import CorruptArtifact
from coterie.fields import Fields
from coterie.model.stream.likelihood import row_slices, widened

log = logging.getLogger(__name__)

#: Largest file of kept predictions; beyond it the base's head is applied anew for every model.
KEPT_BYTES = 4 * 2**30

_KIND = "predictions"


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionShape:
    """How many predictions a file holds: N sequences, T tokens of each, V scores of each of these."""

    sequences: int
    tokens: int
    vocabulary: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the file: log-probabilities in float32, then the likeliest tokens as int32."""
        return 4 * self.sequences * self.tokens * (self.vocabulary + 1)

    def place(self, sequence: int, token: int) -> int:
        """Return where the log-probabilities after one token of a sequence begin, in bytes."""
        return 4 * (sequence * self.tokens + token) * self.vocabulary

    def likeliest_place(self, sequence: int, token: int) -> int:
        """Return where the likeliest token after one token of a sequence is, in bytes."""
        return 4 * (self.sequences * self.tokens * self.vocabulary + sequence * self.tokens + token)


class KeptPredictions(AbstractContextManager["KeptPredictions"]):
    """An open file of predictions.

    Attributes:
        masked: whether any log-probability is -inf.
    """

    def __init__(self, path: Path, shape: PredictionShape, *, masked: bool) -> None:
        self.masked = masked
        self._shape = shape
        self._file: BinaryIO = path.open("rb", buffering=0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, first: int, count: int, positions: slice) -> tuple[Tensor, Tensor]:
        """Return what the base predicts at some positions of some sequences.

        Args:
            first: number of the first sequence.
            count: B, how many.
            positions: which positions; its last one is left out, see `coterie.model.stream.reading.predictions`.

        Returns:
            Log-probabilities (B, P - 1, V), float32, and the likeliest tokens (B, P - 1), int64.
        """
        # Read into memory and not mapped: pages of a mapped file would count as the process's own.
        shape, length = self._shape, positions.stop - positions.start - 1
        log_p_BTV = np.empty((count, length, shape.vocabulary), np.float32)
        likeliest_BT = np.empty((count, length), np.int32)
        for row in range(count):
            self._fill(shape.place(first + row, positions.start), log_p_BTV[row])
            self._fill(shape.likeliest_place(first + row, positions.start), likeliest_BT[row])
        return torch.from_numpy(log_p_BTV), torch.from_numpy(likeliest_BT).long()

    def _fill(self, place: int, target: np.ndarray[Any, Any]) -> None:
        self._file.seek(place)
        view, filled = memoryview(target).cast("B"), 0  # type: ignore[arg-type]
        while filled < len(view):
            count: int = self._file.readinto(view[filled:])  # type: ignore[attr-defined]
            if not count:
                raise EOFError(f"{self._file.name} ends at byte {place + filled}")
            filled += count


class KeptPredictionsWriter:
    """Takes predictions part by part, as they are computed."""

    def __init__(self, file: BinaryIO, shape: PredictionShape) -> None:
        file.truncate(shape.num_bytes)
        self.masked = False
        self._file = file
        self._shape = shape

    def put(self, first: int, positions: slice, logits_BPV: Tensor) -> None:
        """Write the base's logits at some positions, see `KeptPredictions.read`; the last position is not written."""
        for row, logits_PV in enumerate(logits_BPV):
            for rows in row_slices(len(logits_PV) - 1, logits_PV.shape[-1]):
                part_TV = logits_PV[:-1][rows]
                log_p_TV = widened(part_TV).log_softmax(-1).float()
                self.masked = self.masked or bool(log_p_TV.isneginf().any())
                token = positions.start + rows.start
                self._write(self._shape.place(first + row, token), log_p_TV)
                self._write(self._shape.likeliest_place(first + row, token), part_TV.argmax(-1).int())

    def _write(self, place: int, values: Tensor) -> None:
        self._file.seek(place)
        self._file.write(values.cpu().contiguous().numpy().tobytes())


def open_predictions(folder: Path, inputs: Mapping[str, str], shape: PredictionShape) -> KeptPredictions | None:
    """Open kept predictions, or return None where there are none that are whole and made from the same.

    Args:
        folder: where they are kept.
        inputs: all that decides what they are, digests and names.
        shape: how many there must be.
    """
    path = _path(folder, inputs)
    if not path.is_file():
        return None
    values = path.with_suffix(".bin")
    try:
        artifact = open_artifact(path, kind=_KIND, inputs=inputs)
        body = Fields(artifact.body, where=str(path))
        with body.all_read():
            masked = body.yes_or_no("masked")
        if values.name not in artifact.files:
            raise CorruptArtifact(f"{path} does not name {values.name}")
        check_file(folder, values.name, artifact.files[values.name], owner=path.name)
        if values.stat().st_size != shape.num_bytes:
            raise CorruptArtifact(f"{values} has {values.stat().st_size} bytes, predictions take {shape.num_bytes}")
    except CorruptArtifact as error:
        log.warning("%s; it is made again", error)
        return None
    log.info("what the base predicts is read from %s", values)
    return KeptPredictions(values, shape, masked=masked)


@contextmanager
def keep_predictions(
    folder: Path, inputs: Mapping[str, str], shape: PredictionShape
) -> Iterator[KeptPredictionsWriter]:
    """Within the block, a writer takes predictions; after it they are there for `open_predictions`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, inputs)
    values = path.with_suffix(".bin")
    with atomic_path(values) as temporary, temporary.open("wb") as file:
        writer = KeptPredictionsWriter(file, shape)
        yield writer
    body = {"masked": writer.masked}
    write_artifact(path, kind=_KIND, body=body, inputs=inputs, files={values.name: file_digest(values)})
    log.info("what the base predicts is kept in %s, %s", values, format_bytes(shape.num_bytes))


def _path(folder: Path, inputs: Mapping[str, str]) -> Path:
    return folder / f"predictions-{digest_of(dict(inputs))[:16]}.json"
