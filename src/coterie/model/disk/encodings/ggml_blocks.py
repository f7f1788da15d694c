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
from coterie.model.disk.encodings.ggml import GRAIN, OWN_TYPES, SIZES, WRAPPED, get_layout, get_type, rows_together
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
        columns: numbers of a row, where blocks run on from one row to the next: as many rows as are whole blocks are
            one row of bytes. None where every row has blocks of its own, as in GGUF files.

    Raises:
        UnknownName: no such type can be written.
        ValueError: another axis, a number format that cannot hold what is unpacked, or columns that wrapped blocks
            cannot have.
    """

    type: str
    axis: int = -1
    dtype: str = "BF16"
    columns: int | None = None

    def __post_init__(self) -> None:
        if self.columns is not None and (self.columns < 1 or self.columns % GRAIN):
            raise ValueError(f"columns is {self.columns}: it should be a multiple of {GRAIN}")
        if self.type not in SIZES:
            raise UnknownName("GGML type", self.type, SIZES)
        if self.columns is not None and self.type in OWN_TYPES:
            raise ValueError(f"columns is {self.columns}: blocks of {self.type} do not run on from row to row")
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
        layout = get_layout(self.type if self.columns is None else self.type + WRAPPED)
        byte_NRK, _ = round_to_nearest(weight_NRC, importance_NC, layout)
        return {"": byte_NRK.reshape(*rows.shape[:-2], *byte_NRK.shape[1:]).transpose(self.axis, -1).contiguous()}

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values."""
        import torch

        kind = get_type(self.type)
        if not stored[""].numel():
            return torch.empty(self.shape_of(tuple(stored[""].shape)), dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        byte_RK = stored[""].transpose(self.axis, -1).contiguous()
        blocks = byte_RK.reshape(1, -1, SIZES[self.type][1])
        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        # Some rows at a time: what is unpacked passes through float32.
        values = torch.empty(blocks.shape[1], kind.block, dtype=dtype)
        for start in range(0, len(values), _BLOCKS_AT_ONCE):
            values[start : start + _BLOCKS_AT_ONCE] = kind.unpack(blocks[:, start : start + _BLOCKS_AT_ONCE])[0]
        rows = values.reshape(*byte_RK.shape[:-1], -1)
        if self.columns is not None:
            rows = rows.reshape(*rows.shape[:-2], -1, self.columns)
        return rows.transpose(self.axis, -1).contiguous()

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return format and shape of the bytes.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        block, size = SIZES[self.type]
        if len(shape) < 2:
            raise UnsupportedDtype(f"{list(shape)} cannot be stored as {self.type}: that takes matrices")
        extents = list(shape)
        if self.columns is not None:
            if shape[self.axis] != self.columns or shape[self._rows] % self._together:
                raise UnsupportedDtype(
                    f"{list(shape)} cannot be stored as {self.type} from row to row: that takes {self.columns} numbers "
                    f"along axis {self.axis}, and a multiple of {self._together} along axis {self._rows}"
                )
            extents[self._rows] //= self._together
            extents[self.axis] *= self._together
        elif shape[self.axis] % block:
            raise UnsupportedDtype(
                f"{list(shape)} cannot be stored as {self.type}: that takes matrices, axis {self.axis} a multiple of "
                f"{block}"
            )
        extents[self.axis] = extents[self.axis] // block * size
        return {"": ("U8", tuple(extents))}

    @property
    def _rows(self) -> int:
        """The axis, -1 or -2, along which rows lie."""
        return -3 - self.axis

    @property
    def _together(self) -> int:
        """Rows that are one row of bytes."""
        return 1 if self.columns is None else rows_together(self.type + WRAPPED, self.columns)

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor whose bytes have this one.

        Raises:
            UnsupportedDtype: no tensor has.
        """
        block, size = SIZES[self.type]
        if len(stored) < 2 or stored[self.axis] % size:
            raise UnsupportedDtype(f"{list(stored)} holds no whole blocks of {self.type} along axis {self.axis}")
        extents = list(stored)
        extents[self.axis] = stored[self.axis] // size * block
        if self.columns is not None:
            if extents[self.axis] != self._together * self.columns:
                raise UnsupportedDtype(
                    f"{list(stored)} holds no rows of {self.columns} numbers of {self.type}, {self._together} together "
                    f"along axis {self.axis}"
                )
            extents[self.axis] = self.columns
            extents[self._rows] *= self._together
        return tuple(extents)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that rows lie by themselves where blocks run along another axis, and not from row to row."""
        return None if len(shape) + self.axis == 0 or (self._together > 1 and len(shape) == 2) else (self, ())

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        wrapped = {} if self.columns is None else {"columns": self.columns}
        return {"encoding": "ggml", "type": self.type, "axis": self.axis, "dtype": self.dtype, **wrapped}


#: What can be unpacked to.
_DTYPES = ("BF16", "F16", "F32")

#: Blocks that are unpacked at once.
_BLOCKS_AT_ONCE = 65_536
