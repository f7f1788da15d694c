"""A stack of matrices that lie each by itself, wherever they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coterie.errors import UnsupportedDtype
from coterie.model.disk.tensors import DTYPE_BITS, TORCH_NAMES, Encoding, Packed, bytes_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacked:
    """Tensors that are the rows of one along its first axis; the suffix of each is its number.

    Attributes:
        count: how many.
        dtype: format of the stack, a key of `coterie.model.disk.tensors.DTYPE_BITS`.

    Raises:
        ValueError: no such format, or no tensor.
    """

    count: int
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if self.count < 1 or self.dtype not in DTYPE_BITS:
            raise ValueError(f"count is {self.count} and dtype {self.dtype!r}: no such stack is known")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors."""
        self.stored(tuple(tensor.shape))
        rounded = tensor.to(_dtype(self.dtype))
        return {str(number): rounded[number].clone() for number in range(self.count)}

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the stack."""
        import torch

        whole = torch.empty(self.count, *stored["0"].shape, dtype=_dtype(self.dtype))
        for number in range(self.count):
            whole[number] = stored[str(number)]
        return whole

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return format and shape of each.

        Raises:
            UnsupportedDtype: a shape of another number of them.
        """
        if not shape or shape[0] != self.count:
            raise UnsupportedDtype(f"{list(shape)} is no stack of {self.count}")
        return {str(number): (self.dtype, shape[1:]) for number in range(self.count)}

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of this shape."""
        return bytes_of(self.dtype, shape)

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say nothing: it is not of each tensor that rows are taken, but of them, see `StackedTensors`."""
        return None

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {"encoding": "stacked", "count": self.count, "dtype": self.dtype}


@dataclass(frozen=True, kw_only=True, slots=True)
class StackedTensors(Packed):
    """How a stack is made from tensors; see `coterie.model.disk.tensors.Packed`."""

    def slice_rows(self, shape: tuple[int, ...], start: int, stop: int) -> Packed | None:
        """Return how some of them are a stack; None for none of them."""
        if start == stop:
            return None
        encoding = Stacked(count=stop - start, dtype=str(self.encoding.config()["dtype"]))
        stored = {str(number - start): self.stored[str(number)] for number in range(start, stop)}
        return StackedTensors(encoding=encoding, stored=stored)


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, TORCH_NAMES[name])
