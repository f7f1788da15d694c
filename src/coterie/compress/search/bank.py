"""A bank of rounded matrices: each is rounded to a type when that is first asked for, and kept as the bytes of blocks.

The bytes lie in files that have no name, so that memory does not grow with what is kept and a kill leaves nothing.

Legend: N matrices, R rows (outputs), C columns (inputs), K bytes of a row.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from coterie.model.disk.encodings.ggml import WRAPPED, get_layout, unwrapped
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.stream.spill import Spill


class Bank:
    """Rounded matrices by (name, type)."""

    def __init__(self, scratch: Path | None) -> None:
        """Begin an empty one; its files lie in `scratch`, or in the system's own folder when None."""
        self._spill = Spill(scratch)
        self._spill.begin(hold=False)
        self._bytes: dict[tuple[str, str], tuple[Tensor, int]] = {}

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._bytes

    @torch.no_grad()
    def add(self, name: str, kind: str, matrix_NRC: Tensor, importance_NC: Tensor) -> None:
        """Round matrices to the nearest numbers of a type, and keep them.

        Args:
            name: what they are asked for by.
            kind: the type.
            matrix_NRC: the matrices.
            importance_NC: how much the error of each column weighs.
        """
        byte_NRK, _ = round_to_nearest(matrix_NRC.float(), importance_NC, get_layout(kind))
        self._bytes[name, kind] = self._spill.keep(byte_NRK), matrix_NRC.shape[-1]
        self._spill.release()

    def values(self, name: str, kind: str) -> Tensor:
        """Return rounded matrices (N, R, C), float32, on the CPU."""
        byte_NRK, columns = self._bytes[name, kind]
        wrapped = columns if kind.endswith(WRAPPED) else None
        value_NRC = GgmlBlocks(type=unwrapped(kind), dtype="F32", columns=wrapped).unpack({"": byte_NRK})
        self._spill.release()
        return value_NRC
