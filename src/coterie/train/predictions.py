"""What the original model predicts, which a smaller one is trained towards: its most probable tokens, in a file.

Of every prediction the K most probable tokens and their log-probabilities are kept. The loss is the Kullback-Leibler
divergence from the original over those tokens and one class for all others, which is never more than the divergence
over all tokens. Predictions are written as they are made, and read for the sequences of a step alone, so that memory
does not grow with the text; the file is an ordinary safetensors file.

Legend: B sequences, S tokens of a sequence, V vocabulary, K tokens kept of each prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from coterie.artifact import atomic_path
from coterie.errors import CorruptArtifact, CorruptCheckpoint
from coterie.model.disk.header import header_of, read_header

#: The two tensors of a file and their number formats, both of four bytes.
_TOKEN, _LOG_PROBABILITY = "token", "log_probability"
_FORMATS = {_TOKEN: ("I32", np.int32), _LOG_PROBABILITY: ("F32", np.float32)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What the original model predicts behind every token of some sequences.

    Attributes:
        token_BSK: its most probable tokens, int32.
        log_probability_BSK: their log-probabilities in nats, float32.
    """

    token_BSK: Tensor
    log_probability_BSK: Tensor

    @classmethod
    def of(cls, logits_BSV: Tensor, count: int) -> Predictions:
        """Keep the `count` most probable tokens of logits."""
        best = logits_BSV.float().log_softmax(-1).topk(min(count, logits_BSV.shape[-1]), dim=-1)
        return cls(token_BSK=best.indices.int().cpu(), log_probability_BSK=best.values.cpu())

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Put the predictions of some sequences together, of which each part has the next positions."""
        return cls(
            token_BSK=torch.cat([part.token_BSK for part in parts], dim=1),
            log_probability_BSK=torch.cat([part.log_probability_BSK for part in parts], dim=1),
        )

    def select(self, rows_N: Tensor) -> Predictions:
        """Return the predictions of some of the sequences, by their numbers."""
        return Predictions(token_BSK=self.token_BSK[rows_N], log_probability_BSK=self.log_probability_BSK[rows_N])

    def divergence(self, logits_BSV: Tensor) -> Tensor:
        """Return the mean divergence of a model with these logits from the original, nats per token."""
        return self.divergences(logits_BSV).mean()

    def divergences(self, logits_BSV: Tensor) -> Tensor:
        """Return the divergence of a model with these logits from the original behind every token, nats (B, S)."""
        log_q_BSV = logits_BSV.float().log_softmax(-1)
        log_p_BSK = self.log_probability_BSK.to(log_q_BSV.device)
        log_q_BSK = log_q_BSV.gather(-1, self.token_BSK.to(log_q_BSV.device).long())
        p_BSK = log_p_BSK.exp()
        divergence_BS = (p_BSK * (log_p_BSK - log_q_BSK)).sum(-1)
        if log_p_BSK.shape[-1] < log_q_BSV.shape[-1]:
            tiny = torch.finfo(torch.float32).tiny
            rest_p_BS = (1 - p_BSK.sum(-1)).clamp(min=tiny)
            rest_q_BS = (1 - log_q_BSK.exp().sum(-1)).clamp(min=1e-7)
            divergence_BS = divergence_BS + rest_p_BS * (rest_p_BS.log() - rest_q_BS.log())
        return divergence_BS


class PredictionFile:
    """Predictions in a file; no more of it is read than what is asked for.

    Attributes:
        path: the file.
        shape: B, S, K.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CorruptArtifact: it is no whole file of predictions.
        """
        try:
            infos = read_header(path)
        except CorruptCheckpoint as error:
            raise CorruptArtifact(f"{path} holds no predictions: {error}") from error
        formats = {name: (info.dtype, len(info.shape), info.shape) for name, info in infos.items()}
        shape = infos[_TOKEN].shape if _TOKEN in infos else ()
        if formats != {name: (code, 3, shape) for name, (code, _) in _FORMATS.items()}:
            raise CorruptArtifact(f"{path} holds no predictions but {sorted(formats.items())[:3]}; remove it")
        self.path = path
        self.shape: tuple[int, int, int] = (shape[0], shape[1], shape[2])
        self._begins = {name: info.begin for name, info in infos.items()}

    def select(self, rows_N: Tensor) -> Predictions:
        """Read the predictions of some of the sequences, by their numbers.

        Raises:
            CorruptArtifact: the file was cut off meanwhile.
        """
        # Read into memory and not mapped: pages of a mapped file would count as the process's own.
        with self.path.open("rb", buffering=0) as file:
            token_BSK, log_probability_BSK = (self._read(file, name, rows_N.tolist()) for name in _FORMATS)
        return Predictions(token_BSK=token_BSK, log_probability_BSK=log_probability_BSK)

    def _read(self, file: BinaryIO, name: str, rows: list[int]) -> Tensor:
        count, *row_shape = self.shape
        values: np.ndarray[Any, Any] = np.empty((len(rows), *row_shape), _FORMATS[name][1])
        for row, target in zip(rows, values, strict=True):
            if not 0 <= row < count:
                raise IndexError(f"{self.path} holds the predictions of {count} sequences; there is no number {row}")
            file.seek(self._begins[name] + row * target.nbytes)
            view, num_read = memoryview(target).cast("B"), 0
            while num_read < len(view):
                just_read: int = file.readinto(view[num_read:])  # type: ignore[attr-defined]
                if not just_read:
                    raise CorruptArtifact(f"{self.path} ends within the predictions of sequence {row}")
                num_read += just_read
        return torch.from_numpy(values)


class PredictionWriter:
    """Takes the predictions of B sequences, some at a time and in any order."""

    def __init__(self, file: BinaryIO, sequences: int) -> None:
        """Begin; the first predictions that come say how many tokens each sequence has."""
        self._file = file
        self._sequences = sequences
        self._begins: dict[str, int] = {}
        self._row_shape: tuple[int, ...] = ()

    def put(self, first: int, predictions: Predictions) -> None:
        """Write the predictions of sequences from number `first` on."""
        tensors = {_TOKEN: predictions.token_BSK, _LOG_PROBABILITY: predictions.log_probability_BSK}
        if not self._begins:
            self._begin(tuple(tensors[_TOKEN].shape[1:]))
        for name, tensor_BSK in tensors.items():
            values = tensor_BSK.contiguous().numpy().astype(_FORMATS[name][1], copy=False)
            if values.shape[1:] != self._row_shape or not 0 <= first <= self._sequences - len(values):
                raise ValueError(
                    f"predictions of shape {values.shape} from sequence {first} on have no place among "
                    f"{self._sequences} sequences of shape {self._row_shape}"
                )
            self._file.seek(self._begins[name] + first * values[:1].nbytes)
            self._file.write(values.tobytes())

    def _begin(self, row_shape: tuple[int, ...]) -> None:
        self._row_shape = row_shape
        shape, size = (self._sequences, *row_shape), 4 * self._sequences * int(np.prod(row_shape))
        header = header_of({name: (code, shape) for name, (code, _) in _FORMATS.items()})
        self._file.write(header)
        for number, name in enumerate(_FORMATS):
            self._begins[name] = len(header) + number * size
        self._file.truncate(len(header) + len(_FORMATS) * size)


@contextmanager
def writing_predictions(path: Path, sequences: int) -> Iterator[PredictionWriter]:
    """Within the block, a writer takes predictions; after it they are at `path`, which no error leaves half written.

    Raises:
        OutOfSpace: the disk filled up.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield PredictionWriter(file, sequences)
