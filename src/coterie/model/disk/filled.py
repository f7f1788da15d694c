"""Read ragged checkpoints: every expert has a width of its own, stored as it is and read filled up with zeros.

A hidden neuron whose gate, up and down weights are zero adds nothing, so what is read computes what was stored. The
config counts the full width, which the files do not hold: stock loaders refuse such a checkpoint instead of computing
something else. Nothing here imports torch until a tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coterie.errors import CorruptCheckpoint
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import RaggedWidths
from coterie.model.disk.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Padded:
    """A tensor that is filled up with zeros along one axis as it is read."""

    stored: TensorInfo
    axis: int
    shape: tuple[int, ...]

    def unpack(self, read: Callable[[TensorInfo], Tensor]) -> Tensor:
        """Return the value; `read` reads one tensor as it is stored."""
        import torch

        tensor = read(self.stored)
        whole = torch.zeros(self.shape, dtype=tensor.dtype)
        whole.narrow(self.axis, 0, tensor.shape[self.axis]).copy_(tensor)
        return whole

    def slice_rows(self, start: int, stop: int) -> Padded | None:
        """Return how rows along the first axis are made; None where that is the axis that is filled up."""
        stored = None if self.axis == 0 else self.stored.slice_rows(start, stop)
        return None if stored is None else replace(self, stored=stored, shape=(stop - start, *self.shape[1:]))


def filled_up(checkpoint: Checkpoint, ragged: RaggedWidths | None) -> Checkpoint:
    """Return a view of a checkpoint in which all experts have the full width; the same object when it is not ragged.

    Args:
        checkpoint: what `Checkpoint.open` returned.
        ragged: what its manifest says of widths; None for any other checkpoint.

    Raises:
        CorruptCheckpoint: an expert is wider than the manifest allows.
    """
    if ragged is None:
        return checkpoint
    full = ragged.width
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        axis = _axis_of(name, ragged.axes)
        tensors[name] = info
        if axis is not None and info.shape[axis] != full:
            if info.shape[axis] > full:
                raise CorruptCheckpoint(
                    f"{checkpoint.path}: {name} {list(info.shape)} is wider than the {full} of the manifest"
                )
            shape = (*info.shape[:axis], full, *info.shape[axis + 1 :])
            tensors[name] = replace(
                info, shape=shape, begin=0, end=0, packed=Padded(stored=info, axis=axis, shape=shape)
            )
    return replace(checkpoint, tensors=tensors)


def _axis_of(name: str, axes: Mapping[str, int]) -> int | None:
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            pattern = ".".join((*parts[:position], "*", *parts[position + 1 :]))
            if pattern in axes:
                return axes[pattern]
    return None
