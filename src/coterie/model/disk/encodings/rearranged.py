"""A matrix in parts, or with its rows in another order, as GGUF files have some; or a stack of such matrices.

What is stored is what `coterie.model.disk.gguf.take` takes of it; where it is a stack, of each matrix by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from coterie.model.disk.gguf.take import Take, put_together
from coterie.model.disk.tensors import DTYPE_BITS, TORCH_NAMES, Encoding, bytes_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Rearranged:
    """Parts that together are a matrix, a vector, or a stack of them.

    Attributes:
        takes: how each is taken; every row is in one of them. As JSON content, too.
        shape: of the matrix or vector.
        stack: how many there are in a stack; None where it is none.
        dtype: format of what is put together, a key of `coterie.model.disk.tensors.DTYPE_BITS`.

    Raises:
        ValueError: no such format.
    """

    takes: tuple[Take, ...]
    shape: tuple[int, ...]
    stack: int | None = None
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            raise ValueError(f"dtype is {self.dtype!r}: it should be one of {', '.join(DTYPE_BITS)}")
        takes = [take if isinstance(take, Take) else _take_from(take) for take in self.takes]
        object.__setattr__(self, "takes", tuple(takes))

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the parts."""
        import torch

        rounded = tensor.to(getattr(torch, TORCH_NAMES[self.dtype]))
        matrices = [rounded] if self.stack is None else list(rounded)
        stored = self.stored(tuple(tensor.shape))
        return {
            str(index): torch.stack([take.of(matrix) for matrix in matrices]).reshape(stored[str(index)][1])
            for index, take in enumerate(self.takes)
        }

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return what the parts are together."""
        import torch

        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        parts = [stored[str(index)].to(dtype) for index in range(len(self.takes))]
        if self.stack is None:
            return put_together(self.takes, parts, self.shape)
        whole = torch.empty(self.stack, *self.shape, dtype=dtype)
        for index in range(self.stack):
            whole[index] = put_together(self.takes, [part[index] for part in parts], self.shape)
        return whole

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return format and shape of each part."""
        stacked = () if self.stack is None else (self.stack,)
        stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        for index, take in enumerate(self.takes):
            extents = take.shape(*(*self.shape, 1)[:2])
            stored[str(index)] = (
                self.dtype,
                (*stacked, *(extents if len(self.shape) > 1 else (math.prod(extents),))),
            )
        return stored

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of this shape."""
        return bytes_of(self.dtype, shape)

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that matrices of a stack lie by themselves, and rows of one do not."""
        return None if self.stack is None else (replace(self, stack=count), ())

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        takes = [{**asdict(take), "rows": None if take.rows is None else list(take.rows)} for take in self.takes]
        content = {"takes": takes, "shape": list(self.shape), "stack": self.stack, "dtype": self.dtype}
        return {"encoding": "rearranged", **content}


def _take_from(content: Mapping[str, Any]) -> Take:
    rows = content["rows"]
    return Take(**{**content, "rows": None if rows is None else tuple(rows)})
