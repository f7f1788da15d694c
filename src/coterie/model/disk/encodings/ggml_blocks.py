"""Weights in blocks of a GGML type, as GGUF files hold them (`coterie.model.disk.encodings.ggml`).

The bytes of a block stand where its numbers stood, along the axis that is summed over when the weight is used; so what
is exported to GGUF is copied byte for byte. Choosing codes well takes more than the weight, see
`coterie.compress.quantisers.gptq`; here they are the nearest ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coterie.errors import UnknownName, UnsupportedDtype
from coterie.model.disk.encodings.ggml import SIZES, get_type
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, bytes_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class GgmlBlocks:
    """One tensor of bytes, in which an axis of C columns is one of C / block times the bytes of a block.

    Attributes:
        type: the name in GGML, like Q4_K.
        axis: the axis that blocks run along, from behind: -1, or -2 where matrices lie transposed.
        dtype: format of what is unpacked.

    Raises:
        UnknownName: no such type can be written.
        ValueError: another axis, or a number format that cannot hold what is unpacked.
    """

    type: str
    axis: int = -1
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if self.type not in SIZES:
            raise UnknownName("GGML type", self.type, SIZES)
        if self.axis not in (-1, -2):
            raise ValueError(f"axis is {self.axis}: it should be -1 or -2")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: it should be {', '.join(_DTYPES)}")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the bytes of the nearest numbers of this type, all columns weighing the same.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        import torch

        from coterie.model.disk.encodings.ggml.rounding import round_to_nearest

        self.stored(tuple(tensor.shape))
        rows = tensor.transpose(self.axis, -1).contiguous()
        weight_NRC = rows.reshape(-1, *rows.shape[-2:]).float()
        importance_NC = torch.ones(len(weight_NRC), weight_NRC.shape[-1])
        byte_NRK, _ = round_to_nearest(weight_NRC, importance_NC, get_type(self.type))
        return {"": byte_NRK.reshape(*rows.shape[:-1], -1).transpose(self.axis, -1).contiguous()}

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values."""
        import torch

        kind = get_type(self.type)
        byte_RK = stored[""].transpose(self.axis, -1).contiguous()
        blocks = byte_RK.reshape(1, -1, SIZES[self.type][1])
        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        # Some rows at a time: what is unpacked passes through float32.
        values = torch.empty(blocks.shape[1], kind.block, dtype=dtype)
        for start in range(0, len(values), _BLOCKS_AT_ONCE):
            values[start : start + _BLOCKS_AT_ONCE] = kind.unpack(blocks[:, start : start + _BLOCKS_AT_ONCE])[0]
        return values.reshape(*byte_RK.shape[:-1], -1).transpose(self.axis, -1).contiguous()

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return format and shape of the bytes.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        block, size = SIZES[self.type]
        if len(shape) < 2 or min(shape) < 1 or shape[self.axis] % block:
            raise UnsupportedDtype(
                f"{list(shape)} cannot be stored as {self.type}: that takes matrices, axis {self.axis} a multiple of "
                f"{block}"
            )
        extents = list(shape)
        extents[self.axis] = shape[self.axis] // block * size
        return {"": ("U8", tuple(extents))}

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor whose bytes have this one.

        Raises:
            UnsupportedDtype: no tensor has.
        """
        block, size = SIZES[self.type]
        if len(stored) < 2 or min(stored) < 1 or stored[self.axis] % size:
            raise UnsupportedDtype(f"{list(stored)} holds no whole blocks of {self.type} along axis {self.axis}")
        extents = list(stored)
        extents[self.axis] = stored[self.axis] // size * block
        return tuple(extents)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that rows lie by themselves where blocks run along another axis."""
        return None if len(shape) + self.axis == 0 else (self, ())

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {"encoding": "ggml", "type": self.type, "axis": self.axis, "dtype": self.dtype}


#: What can be unpacked to.
_DTYPES = ("BF16", "F16", "F32")

#: Blocks that are unpacked at once.
_BLOCKS_AT_ONCE = 65_536
