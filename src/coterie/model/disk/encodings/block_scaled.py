"""8-bit floats, or pairs of 4-bit ones, with one scale for each block of rows and columns (arXiv:2412.19437, 3.3.2).

The scale multiplies, though its name often ends in ``_scale_inv``. A weight in 8-bit integers is pairs of E2M1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from coterie.errors import UnsupportedDtype
from coterie.model.disk.encodings import scaled
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

#: Formats of the numbers, and of their scales.
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
FP4_DTYPES = ("I8", "F4")
SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0", "U8")

_SCALE = "_scale_inv"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScaled:
    """Small numbers, and a tensor of scales beside them.

    Attributes:
        numbers: format of the numbers: one of `FP8_DTYPES`, or of `FP4_DTYPES` for pairs of 4-bit floats.
        scales: format of the scales, one of `SCALE_DTYPES`.
        block: rows and columns that share a scale, along the last two axes; blocks at the end may be smaller.
        dtype: format of what is unpacked.
        scale_shape: shape of the tensor of scales where it is not the usual one (the weight's, in blocks): one scale,
            one for each matrix, or the same scales for all matrices.

    Raises:
        ValueError: no such format, or a block without extent.
    """

    numbers: str = "F8_E4M3"
    scales: str = "F32"
    block: tuple[int, int] = (128, 128)
    dtype: str = "BF16"
    scale_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.numbers not in (*FP8_DTYPES, *FP4_DTYPES) or self.scales not in SCALE_DTYPES:
            raise ValueError(f"numbers are {self.numbers!r} and scales {self.scales!r}: no such encoding is known")
        if len(self.block) != 2 or min(self.block) < 1:
            raise ValueError(f"block is {self.block}: it should be two whole numbers above 0")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Round a tensor to the nearest numbers; see `coterie.model.disk.encodings.scaled`.

        Raises:
            UnsupportedDtype: a shape or a number that cannot be stored so.
        """
        import torch

        stored = self.stored(tuple(tensor.shape))
        value_NRC = tensor.reshape(-1, *tensor.shape[-2:])
        grid = scaled.grid_of(tensor.shape[-2], tensor.shape[-1], self.block)
        shape = stored[_SCALE][1]
        shared = math.prod(shape) != len(value_NRC) * math.prod(grid)
        bytes_NRc, scale_Ngh = scaled.pack_matrices(value_NRC, self.block, self.numbers, self.scales, shared=shared)
        numbers = bytes_NRc.view(*tensor.shape[:-1], -1).view(getattr(torch, TORCH_NAMES[self.numbers]))
        return {"": numbers, _SCALE: scale_Ngh.reshape(shape)}

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values.

        Raises:
            CorruptCheckpoint: scales that are no powers of two are no finite numbers.
            UnsupportedDtype: a value is too large for `dtype`.
        """
        import torch

        numbers = stored[""]
        if self.scales not in scaled.EXPONENTS:
            scaled.check_scales(stored[_SCALE])
        bytes_ = numbers.view(torch.uint8)
        rows, columns = numbers.shape[-2], numbers.shape[-1] * (2 if self.numbers in FP4_DTYPES else 1)
        bytes_NRc = bytes_.view(-1, rows, numbers.shape[-1])
        grid = scaled.grid_of(rows, columns, self.block)
        scale_Ngh = scaled.scale_values(stored[_SCALE]).view(-1, *grid).expand(len(bytes_NRc), -1, -1)
        out = torch.empty(*numbers.shape[:-1], columns, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        scaled.unpack_matrices(bytes_NRc, scale_Ngh, self.block, self.numbers, out.view(-1, rows, columns))
        return out

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return formats and shapes of numbers and scales.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        halved = self.numbers in FP4_DTYPES
        if len(shape) < 2 or math.prod(shape) == 0 or (halved and shape[-1] % 2):
            raise UnsupportedDtype(
                f"{list(shape)} cannot be stored as {self.numbers} in blocks: that takes two axes or more, none "
                "of them empty" + (", and an even number of columns" if halved else "")
            )
        numbers = (*shape[:-1], shape[-1] // 2) if self.numbers == "I8" else shape
        grid = scaled.grid_of(shape[-2], shape[-1], self.block)
        scales = (*shape[:-2], *grid) if self.scale_shape is None else self.scale_shape
        return {"": (self.numbers, numbers), _SCALE: (self.scales, scales)}

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of numbers and scales of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say how matrices of a stack lie by themselves; rows of a single matrix share scales and do not."""
        if len(shape) < 3:
            return None
        if math.prod(self.stored(shape)[_SCALE][1]) == math.prod(scaled.grid_of(shape[-2], shape[-1], self.block)):
            return replace(self, scale_shape=self.stored(shape)[_SCALE][1]), (_SCALE,)
        own = None if self.scale_shape is None else (count, *self.scale_shape[1:])
        return replace(self, scale_shape=own), ()

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        shape = None if self.scale_shape is None else list(self.scale_shape)
        return {
            "encoding": "block-scaled", "numbers": self.numbers, "scales": self.scales, "block": list(self.block),
            "dtype": self.dtype, "scale_shape": shape,
        }  # fmt: skip
