"""The matrices that a GGUF file's tensors are put together from, read one by one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from coterie.export import blocks
from coterie.export.tensors import Output, Part
from coterie.model.disk.checkpoint import Checkpoint, TensorReader


class Pieces:
    """Reads what a tensor of the file is put together from.

    Args:
        reader: of the checkpoint as plain numbers.
        stored: of the checkpoint as it is stored, for bytes that go over as they are.
        checkpoint: the one that is read as plain numbers.
    """

    def __init__(self, reader: TensorReader, stored: TensorReader, checkpoint: Checkpoint) -> None:
        self._reader = reader
        self._stored = stored
        self._tensors = checkpoint.tensors

    def of(self, output: Output) -> Iterator[torch.Tensor | memoryview]:
        """Yield a tensor's pieces in order: numbers that are still to be encoded, or bytes as they are."""
        for part in output.parts:
            if output.copied:
                stored = blocks.stored_bytes(self._tensors[part.source], partial(_read, self._stored, part=part))
                yield blocks.bytes_of(_taken(stored, part).numpy())
            else:
                yield from self._numbers(part)

    def _numbers(self, part: Part) -> Iterator[torch.Tensor]:
        shape = self._tensors[part.source].shape
        if part.index is None and part.take.is_whole and len(shape) == 2:
            rows = max(1, blocks.CHUNK // max(1, shape[1]))
            for start in range(0, shape[0], rows):
                yield self._reader.read_rows(part.source, start, min(start + rows, shape[0]))
            return
        yield _taken(_read(self._reader, part.source, part), part)


def _read(reader: TensorReader, name: str, part: Part) -> torch.Tensor:
    if part.index is None:
        return reader.read(name)
    return reader.read_rows(name, part.index, part.index + 1)[0]


def _taken(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    return tensor if part.take.is_whole else part.take.of(tensor).contiguous()
