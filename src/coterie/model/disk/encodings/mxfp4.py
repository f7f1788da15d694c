"""Pairs of 4-bit floats in groups along the input axis, each with a power of two (OCP Microscaling Formats 1.0).

A stack of matrices is stored output axis first, while the full-precision layout has the input axis first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coterie.errors import UnsupportedDtype
from coterie.model.disk.encodings import scaled
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

#: What is stored of a tensor, by suffix.
BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4:
    """``*_blocks`` (N, rows, groups, bytes) and ``*_scales`` (N, rows, groups) of a stack (N, columns, rows).

    Attributes:
        group: columns that share a scale.
        scales: format of the scales, "U8" or "F8_E8M0".
        dtype: format of what is unpacked.

    Raises:
        ValueError: no such format, or a group that is not even.
    """

    group: int = 32
    scales: str = "U8"
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if self.scales not in scaled.EXPONENTS or self.group < 2 or self.group % 2:
            raise ValueError(f"scales are {self.scales!r} and groups {self.group} wide: no such encoding is known")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Round a stack (N, C, R) to the nearest numbers; see `coterie.model.disk.encodings.scaled`.

        Raises:
            UnsupportedDtype: a shape or a number that cannot be stored so.
        """
        blocks = self.stored(tuple(tensor.shape))[BLOCKS][1]
        bytes_NRc, scale_NRh = scaled.pack_matrices(tensor.transpose(1, 2), (1, self.group), "U8", self.scales)
        return {BLOCKS: bytes_NRc.view(blocks), SCALES: scale_NRh}

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values (N, C, R).

        Raises:
            UnsupportedDtype: a value is too large for `dtype`.
        """
        import torch

        blocks = stored[BLOCKS]
        num_matrices, rows, groups, size = blocks.shape
        out = torch.empty(num_matrices, groups * size * 2, rows, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        scaled.unpack_matrices(
            blocks.view(num_matrices, rows, -1), scaled.scale_values(stored[SCALES]), (1, size * 2), "U8",
            out.transpose(1, 2),
        )  # fmt: skip
        return out

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return formats and shapes of blocks and scales.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        if len(shape) != 3 or min(shape) < 1 or shape[1] % self.group:
            raise UnsupportedDtype(
                f"{list(shape)} cannot be stored in groups of {self.group}: that takes a stack of matrices, its "
                "second axis a multiple of that"
            )
        num_matrices, columns, rows = shape
        grid = (num_matrices, rows, columns // self.group)
        return {BLOCKS: ("U8", (*grid, self.group // 2)), SCALES: (self.scales, grid)}

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of blocks and scales of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that matrices of the stack lie by themselves."""
        return self, ()

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {"encoding": "mxfp4", "group": self.group, "scales": self.scales, "dtype": self.dtype}
