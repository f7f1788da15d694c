"""Plain numbers: every element by itself, in one of the formats that safetensors names. No torch until a tensor comes.

Rounding is torch's: to the nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coterie.model.disk.tensors import DTYPE_BITS, TORCH_NAMES, Encoding, bytes_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """One number after the other.

    Attributes:
        dtype: their format, a key of `coterie.model.disk.tensors.DTYPE_BITS`.

    Raises:
        ValueError: no such format.
    """

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            raise ValueError(f"dtype is {self.dtype!r}: it should be one of {', '.join(DTYPE_BITS)}")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensor in this format; the same one where it has it."""
        import torch

        return {"": tensor.to(getattr(torch, TORCH_NAMES[self.dtype]))}

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor as it is."""
        return stored[""]

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return format and shape of what is stored."""
        return {"": (self.dtype, shape)}

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of this shape."""
        return bytes_of(self.dtype, shape)

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that rows lie by themselves, as everything else here."""
        return self, ()

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {"encoding": "plain", "dtype": self.dtype}
