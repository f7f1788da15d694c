"""An expert's tensor cut to the expert's own width, and filled up with zeros as it is read.

A hidden neuron whose gate, up and down weights are zero adds nothing, so what is read computes what was stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from coterie.errors import ArchitectureMismatch
from coterie.model.disk.tensors import Encoding

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Ragged:
    """The first entries along one axis, in another encoding.

    Attributes:
        axis: the axis that the width runs along.
        width: entries that are stored.
        full: entries that are read.
        inner: how what is left is stored.

    Raises:
        ValueError: wider than full.
    """

    axis: int
    width: int
    full: int
    inner: Encoding

    def __post_init__(self) -> None:
        if self.axis < 0 or not 0 <= self.width <= self.full:
            raise ValueError(f"width is {self.width} along axis {self.axis}: it should be from 0 to {self.full}")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Cut a tensor of the full width.

        Raises:
            ArchitectureMismatch: what would be cut off is not zero.
        """
        self._narrowed(tuple(tensor.shape))
        if tensor.narrow(self.axis, self.width, self.full - self.width).any():
            raise ArchitectureMismatch(
                f"{list(tensor.shape)}: axis {self.axis} is not the width of an expert; please report it"
            )
        return self.inner.pack(tensor.narrow(self.axis, 0, self.width))

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor in its full width."""
        import torch

        tensor = self.inner.unpack(stored)
        filled = torch.zeros(*tensor.shape[: self.axis], self.full, *tensor.shape[self.axis + 1 :], dtype=tensor.dtype)
        filled.narrow(self.axis, 0, self.width).copy_(tensor)
        return filled

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return formats and shapes of what is stored of a tensor of the full width."""
        return self.inner.stored(self._narrowed(shape))

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of what is stored of a tensor of the full width."""
        return self.inner.num_bytes(self._narrowed(shape))

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say how rows lie by themselves, where the width runs along another axis."""
        inner = None if self.axis == 0 else self.inner.rows(self._narrowed(shape), count)
        return None if inner is None else (replace(self, inner=inner[0]), inner[1])

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {
            "encoding": "ragged", "axis": self.axis, "width": self.width, "full": self.full,
            "inner": self.inner.config(),
        }  # fmt: skip

    def _narrowed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.axis >= len(shape) or shape[self.axis] != self.full:
            raise ArchitectureMismatch(f"{list(shape)}: axis {self.axis} is not {self.full}, the width of an expert")
        return (*shape[: self.axis], self.width, *shape[self.axis + 1 :])
