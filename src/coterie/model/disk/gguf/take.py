"""Which rows of a matrix on disk a tensor of a GGUF file is, and in which order; there and back.

A vector counts as a matrix of one column. R rows, C columns, G groups of rows. No torch until a tensor comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Take:
    """How a matrix is taken from one on disk.

    Attributes:
        input_first: the matrix lies on disk with its input axis first.
        groups: its rows fall into so many groups of the same size.
        rows: which rows of each group are taken, in this order; None for all as they are.
        turned: each group is transposed at last.
        stacked: groups become matrices of a stack.
    """

    input_first: bool = False
    groups: int = 1
    rows: tuple[int, ...] | None = None
    turned: bool = False
    stacked: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the matrix is taken as it is."""
        return self == Take()

    def keeps_blocks(self, axis: int) -> bool:
        """Tell whether blocks along this axis on disk, -1 or -2, lie along rows of what is taken, as they have to."""
        return axis == (-2 if self.input_first else -1) and not self.turned

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of what is taken from a matrix of this shape on disk."""
        if self.input_first:
            rows, columns = columns, rows
        taken = rows // self.groups if self.rows is None else len(self.rows)
        if self.turned:
            taken, columns = columns, taken
        return (self.groups, taken, columns) if self.stacked else (self.groups * taken, columns)

    def of(self, tensor: Tensor) -> Tensor:
        """Return what is taken of a matrix, or of a vector: (G, R, C), rows and columns as in a file."""
        matrix = tensor if tensor.ndim == 2 else tensor.reshape(-1, 1)
        if self.input_first:
            matrix = matrix.T
        groups_GRC = matrix.reshape(self.groups, -1, matrix.shape[-1])
        if self.rows is not None:
            groups_GRC = groups_GRC[:, list(self.rows)]
        return groups_GRC.transpose(1, 2) if self.turned else groups_GRC


def put_together(takes: Sequence[Take], parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return the matrix, or the vector, that parts were taken of.

    Args:
        takes: how; together they take every row once.
        parts: what was taken, in any shape.
        shape: of the matrix.
    """
    import torch

    rows, columns = (*shape, 1)[:2]
    if takes[0].input_first:
        rows, columns = columns, rows
    groups_GRC = torch.empty(takes[0].groups, rows // takes[0].groups, columns, dtype=parts[0].dtype)
    for take, part in zip(takes, parts, strict=True):
        count = groups_GRC.shape[1] if take.rows is None else len(take.rows)
        taken = part.reshape(take.groups, *((columns, count) if take.turned else (count, columns)))
        chosen = slice(None) if take.rows is None else list(take.rows)
        groups_GRC[:, chosen] = taken.transpose(1, 2) if take.turned else taken
    matrix = groups_GRC.reshape(rows, columns)
    return (matrix.T if takes[0].input_first else matrix).reshape(shape)
