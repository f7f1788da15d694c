"""Read ragged checkpoints: every expert has a width of its own, stored as it is and read filled up with zeros.

How is said by `coterie.model.disk.encodings.ragged`. The config counts the full width, which the files do not hold:
stock loaders refuse such a checkpoint instead of computing something else. No torch here.
"""

from __future__ import annotations

from dataclasses import replace

from coterie.errors import CorruptCheckpoint
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.plain import Plain
from coterie.model.disk.encodings.ragged import Ragged
from coterie.model.disk.manifest import RaggedWidths
from coterie.model.disk.patterns import matching
from coterie.model.disk.tensors import Packed, TensorInfo


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
        pattern = matching(name, ragged.axes)
        axis = None if pattern is None else ragged.axes[pattern]
        tensors[name] = info
        if axis is not None and info.shape[axis] != full:
            if info.shape[axis] > full:
                raise CorruptCheckpoint(
                    f"{checkpoint.path}: {name} {list(info.shape)} is wider than the {full} of the manifest"
                )
            inner = info.packed or Packed(encoding=Plain(dtype=info.dtype), stored={"": info})
            encoding = Ragged(axis=axis, width=info.shape[axis], full=full, inner=inner.encoding)
            packed = Packed(encoding=encoding, stored=inner.stored)
            shape = (*info.shape[:axis], full, *info.shape[axis + 1 :])
            tensors[name] = replace(info, shape=shape, begin=0, end=0, packed=packed)
    return replace(checkpoint, tensors=tensors)
