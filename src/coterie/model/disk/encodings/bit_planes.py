"""Weights in planes of bits, each finer than those before: a prefix of the bytes is the same tensor in fewer bits.

The base plane says two bits a number: -3, -1, 1 or 3 times half a step, a step for each group of numbers of a row.
Every plane behind it says the sign of what is still missing, which counts as much as the mean magnitude of that in its
group (D2MoE, arXiv:2504.15299). All bytes of the base plane of a tensor come first, then all of the third bit, then of
the fourth. So whoever reads as many of the first bytes as the tensor takes in fewer bits has it in fewer bits: memory
can be given to the weights that matter just now without a second copy of any.

Legend: G groups, B numbers of one, K bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.encodings.plane_types import BASE_BITS, MOST_BITS, group_bytes
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, TensorInfo, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.model.disk.encodings.plane_groups import Planes

#: Groups that are unpacked at once.
_GROUPS_AT_ONCE = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class BitPlanes:
    """One tensor of bytes, in which an axis of C columns is one of C / group times the bytes of a group.

    Bytes are not where their numbers were: the order is that of planes, over the whole tensor, and in a plane that of
    groups, which follow each other along the axis first.

    Attributes:
        bits: of a number, 2 to 4.
        group: columns that share a scale in each plane, a multiple of 32.
        axis: the axis that groups run along, from behind: -1, or -2 where matrices lie transposed.
        dtype: format of what is unpacked.

    Raises:
        ValueError: bits, groups, an axis or a number format that cannot be.
    """

    bits: int = MOST_BITS
    group: int = 32
    axis: int = -1
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if not BASE_BITS <= self.bits <= MOST_BITS:
            raise ValueError(f"bits is {self.bits}: it should be {BASE_BITS} to {MOST_BITS}")
        if self.group < 32 or self.group % 32:
            raise ValueError(f"group is {self.group}: it should be a multiple of 32")
        if self.axis not in (-1, -2):
            raise ValueError(f"axis is {self.axis}: it should be -1 or -2")
        if self.dtype not in ("BF16", "F16", "F32"):
            raise ValueError(f"dtype is {self.dtype!r}: it should be BF16, F16, F32")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the bytes of the nearest numbers in all bits, all columns weighing the same.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        import torch

        from coterie.model.disk.encodings.ggml.rounding import round_to_nearest

        self.stored(tuple(tensor.shape))
        row_RC = tensor.transpose(self.axis, -1).to(torch.float32)
        weight_1RC = row_RC.reshape(1, -1, row_RC.shape[-1])
        importance_1C = torch.ones(1, weight_1RC.shape[-1], device=tensor.device)
        byte_1RK, _ = round_to_nearest(weight_1RC, importance_1C, self._type)
        byte_RK = byte_1RK.reshape(*row_RC.shape[:-1], -1)
        return {"": self.in_planes(byte_RK.transpose(self.axis, -1))}

    def in_planes(self, byte_RK: Tensor) -> Tensor:
        """Return the bytes plane by plane, from those group by group along the axis; the shape stays.

        Args:
            byte_RK: the bytes of groups, as quantisers return them (`coterie.model.disk.encodings.plane_groups`).
        """
        import torch

        byte_GK = byte_RK.transpose(self.axis, -1).reshape(-1, self._group_bytes)
        parts = torch.split(byte_GK, self._type.part_bytes, dim=-1)
        return torch.cat([part.flatten() for part in parts]).reshape(byte_RK.shape)

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values."""
        byte_K = stored[""]
        return self._values(byte_K.flatten(), self.shape_of(tuple(byte_K.shape)))

    def unpack_prefix(self, byte_K: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        """Return the values in fewer bits, of the first bytes of a tensor alone.

        Args:
            byte_K: its bytes from the first on, uint8; those behind ``fewer(bits).num_bytes(shape)`` are not looked at.
            shape: of the tensor.
            bits: how many of each number.

        Raises:
            ValueError: there are fewer bytes, or it has fewer bits.
        """
        lower = self.fewer(bits)
        if len(byte_K) < lower.num_bytes(shape):
            raise ValueError(
                f"{len(byte_K)} bytes are no {list(shape)} in {bits} bits: that takes the first "
                f"{lower.num_bytes(shape)}"
            )
        return lower._values(byte_K, shape)

    def fewer(self, bits: int) -> BitPlanes:
        """Return the encoding whose bytes are the first ones of this one's.

        Raises:
            ValueError: it has fewer bits.
        """
        if bits > self.bits:
            raise ValueError(f"{self.bits} bits are stored of each number, so {bits} cannot be read")
        return replace(self, bits=bits)

    def _values(self, byte_K: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the values of the first bytes of a tensor."""
        import torch

        kind, groups = self._type, math.prod(shape) // self.group
        sizes = [groups * size for size in kind.part_bytes]
        planes = torch.split(byte_K[: sum(sizes)], sizes)
        parts = [plane.reshape(groups, size) for plane, size in zip(planes, kind.part_bytes, strict=True)]
        value_GB = torch.empty(groups, self.group, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        # Some groups at a time: what is unpacked passes through float32.
        for start in range(0, groups, _GROUPS_AT_ONCE):
            some = slice(start, start + _GROUPS_AT_ONCE)
            value_GB[some] = kind.unpack(torch.cat([part[some] for part in parts], dim=-1)[None])[0]
        turned = list(shape)
        turned[self.axis], turned[-1] = shape[-1], shape[self.axis]
        return value_GB.reshape(turned).transpose(self.axis, -1).contiguous()

    @property
    def _type(self) -> Planes:
        from coterie.model.disk.encodings.plane_groups import Planes

        return Planes(name=f"PLANES{self.bits}_G{self.group}", bits=self.bits, block=self.group)

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return format and shape of the bytes.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        if len(shape) < 2 or shape[self.axis] % self.group:
            raise UnsupportedDtype(
                f"{list(shape)} cannot be stored in planes of bits: that takes matrices, axis {self.axis} a multiple "
                f"of {self.group}"
            )
        extents = list(shape)
        extents[self.axis] = shape[self.axis] // self.group * self._group_bytes
        return {"": ("U8", tuple(extents))}

    @property
    def _group_bytes(self) -> int:
        """Bytes of a group, in all planes."""
        return group_bytes(self.bits, self.group)

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor whose bytes have this one.

        Raises:
            UnsupportedDtype: no tensor has.
        """
        if len(stored) < 2 or stored[self.axis] % self._group_bytes:
            raise UnsupportedDtype(
                f"{list(stored)} holds no whole groups of {self._group_bytes} bytes along axis {self.axis}"
            )
        extents = list(stored)
        extents[self.axis] = stored[self.axis] // self._group_bytes * self.group
        return tuple(extents)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that rows do not lie by themselves: each plane is of the whole tensor."""
        return None

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {
            "encoding": "bit-planes",
            "bits": self.bits,
            "group": self.group,
            "axis": self.axis,
            "dtype": self.dtype,
        }


def read_in_fewer_bits(folder: Path, info: TensorInfo, bits: int) -> Tensor:
    """Return a tensor of a checkpoint in fewer bits than it is stored in; no more of its file is read than that takes.

    Args:
        folder: of the checkpoint.
        info: the tensor, as `coterie.model.disk.open.open_checkpoint` lists it.
        bits: how many of each number.

    Raises:
        ValueError: it is not stored in planes of bits, or in fewer of them.
        CorruptCheckpoint: its file ends before.
    """
    import torch

    encoding = None if info.packed is None else info.packed.encoding
    if info.packed is None or not isinstance(encoding, BitPlanes):
        raise ValueError(f"{info.name} is not stored in planes of bits: its first bytes are not the whole of it")
    stored, size = info.packed.stored[""], encoding.fewer(bits).num_bytes(info.shape)
    with (folder / stored.shard).open("rb") as file:
        file.seek(stored.begin)
        prefix = bytearray(file.read(size))
    if len(prefix) < size:
        raise CorruptCheckpoint(f"{folder / stored.shard} ends within {stored.name}: fetch it again")
    return encoding.unpack_prefix(torch.frombuffer(prefix, dtype=torch.uint8), info.shape, bits)
