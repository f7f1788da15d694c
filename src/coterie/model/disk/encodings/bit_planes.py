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
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, TensorInfo, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

#: The fewest and the most bits that planes say of a number, and bits of the base plane.
_BASE, _MOST = 2, 4

#: Bytes of a scale, a float16.
_SCALE = 2

#: Steps that are tried for a group, as shares of the one at which its largest number is the largest level.
_SHARES = tuple(0.4 + 0.05 * place for place in range(13))


@dataclass(frozen=True, kw_only=True, slots=True)
class BitPlanes:
    """One tensor of bytes, in which the last axis, of C columns, is one of C / group times the bytes of a group.

    Bytes are not where their numbers were: the order is that of planes, over the whole tensor.

    Attributes:
        bits: of a number, 2 to 4.
        group: columns that share a scale in each plane, a multiple of 32.
        dtype: format of what is unpacked.

    Raises:
        ValueError: bits, groups or a number format that cannot be.
    """

    bits: int = _MOST
    group: int = 32
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if not _BASE <= self.bits <= _MOST:
            raise ValueError(f"bits is {self.bits}: it should be {_BASE} to {_MOST}")
        if self.group < 32 or self.group % 32:
            raise ValueError(f"group is {self.group}: it should be a multiple of 32")
        if self.dtype not in ("BF16", "F16", "F32"):
            raise ValueError(f"dtype is {self.dtype!r}: it should be BF16, F16, F32")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the bytes: base codes at the steps with the least error, then the signs of what is missing.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        import torch

        from coterie.model.disk.encodings.ggml.bits import pack_bits
        from coterie.model.disk.encodings.ggml.block_type import as_half, half_bytes

        [(_, extents)] = self.stored(tuple(tensor.shape)).values()
        weight_GB = tensor.to(torch.float32).reshape(-1, self.group)
        step_G = _best_steps(weight_GB)
        code_GB = _nearest(weight_GB, step_G)
        parts = [half_bytes(step_G), pack_bits(code_GB, _BASE, self.group // 4)]
        missing_GB = weight_GB - _base_values(code_GB, step_G)
        for _ in range(self.bits - _BASE):
            scale_G = as_half(missing_GB.abs().mean(dim=-1))
            negative_GB = missing_GB < 0
            parts += [half_bytes(scale_G), pack_bits(negative_GB, 1, self.group // 8)]
            missing_GB = missing_GB - _signed(negative_GB, scale_G)
        return {"": torch.cat([part.flatten() for part in parts]).reshape(extents)}

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values."""
        import torch

        byte_K = stored[""]
        return self._values(byte_K.flatten(), self.shape_of(tuple(byte_K.shape))).to(
            getattr(torch, TORCH_NAMES[self.dtype])
        )

    def unpack_prefix(self, byte_K: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
        """Return the values in fewer bits, of the first bytes of a tensor alone.

        Args:
            byte_K: its bytes from the first on, uint8; those behind ``fewer(bits).num_bytes(shape)`` are not looked at.
            shape: of the tensor.
            bits: how many of each number.

        Raises:
            ValueError: there are fewer bytes, or it has fewer bits.
        """
        import torch

        lower = self.fewer(bits)
        if len(byte_K) < lower.num_bytes(shape):
            raise ValueError(
                f"{len(byte_K)} bytes are no {list(shape)} in {bits} bits: that takes the first "
                f"{lower.num_bytes(shape)}"
            )
        return lower._values(byte_K, shape).to(getattr(torch, TORCH_NAMES[self.dtype]))

    def fewer(self, bits: int) -> BitPlanes:
        """Return the encoding whose bytes are the first ones of this one's.

        Raises:
            ValueError: it has fewer bits.
        """
        if bits > self.bits:
            raise ValueError(f"{self.bits} bits are stored of each number, so {bits} cannot be read")
        return replace(self, bits=bits)

    def _values(self, byte_K: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the values of the first bytes of a tensor, float32."""
        from coterie.model.disk.encodings.ggml.bits import unpack_bits
        from coterie.model.disk.encodings.ggml.block_type import halves

        groups, at = math.prod(shape) // self.group, 0

        def take(size: int) -> Tensor:
            nonlocal at
            part_GK = byte_K[at : at + groups * size].reshape(groups, size)
            at += groups * size
            return part_GK

        scale_G = halves(take(_SCALE))
        value_GB = _base_values(unpack_bits(take(self.group // 4), _BASE, self.group // 4), scale_G)
        for _ in range(self.bits - _BASE):
            scale_G = halves(take(_SCALE))
            value_GB += _signed(unpack_bits(take(self.group // 8), 1, self.group // 8), scale_G)
        return value_GB.reshape(shape)

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return format and shape of the bytes.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        if len(shape) < 2 or min(shape) < 1 or shape[-1] % self.group:
            raise UnsupportedDtype(
                f"{list(shape)} cannot be stored in planes of bits: that takes matrices, columns a multiple of "
                f"{self.group}"
            )
        return {"": ("U8", (*shape[:-1], shape[-1] // self.group * self._group_bytes))}

    @property
    def _group_bytes(self) -> int:
        """Bytes of a group, in all planes."""
        return self.group * self.bits // 8 + _SCALE * (self.bits - _BASE + 1)

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor whose bytes have this one.

        Raises:
            UnsupportedDtype: no tensor has.
        """
        if len(stored) < 2 or min(stored) < 1 or stored[-1] % self._group_bytes:
            raise UnsupportedDtype(f"{list(stored)} holds no whole groups of {self._group_bytes} bytes")
        return (*stored[:-1], stored[-1] // self._group_bytes * self.group)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that rows do not lie by themselves: each plane is of the whole tensor."""
        return None

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {"encoding": "bit-planes", "bits": self.bits, "group": self.group, "dtype": self.dtype}


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


def _best_steps(weight_GB: Tensor) -> Tensor:
    """Return the steps (G) of those that are tried at which the base plane has the least error; float16 holds them."""
    import torch

    from coterie.model.disk.encodings.ggml.block_type import as_half, ratio

    largest_G = weight_GB.abs().amax(dim=-1) / 1.5
    best_G, least_G = torch.zeros_like(largest_G), torch.full_like(largest_G, torch.inf)
    for share in _SHARES:
        level_GB = _base_values(_nearest(weight_GB, largest_G * share), torch.ones_like(largest_G))
        # The best step for these codes.
        step_G = as_half(ratio((level_GB * weight_GB).sum(dim=-1), level_GB.square().sum(dim=-1)))
        error_G = (weight_GB - _base_values(_nearest(weight_GB, step_G), step_G)).square().sum(dim=-1)
        better_G = error_G < least_G
        best_G, least_G = torch.where(better_G, step_G, best_G), torch.where(better_G, error_G, least_G)
    return best_G


def _nearest(weight_GB: Tensor, step_G: Tensor) -> Tensor:
    """Return the base codes (G, B) that are nearest to numbers, 0 to 3."""
    from coterie.model.disk.encodings.ggml.block_type import ratio

    return (ratio(weight_GB, step_G[:, None]).floor() + 2).clamp(0, 3)


def _base_values(code_GB: Tensor, step_G: Tensor) -> Tensor:
    """Return the values of base codes: halves of steps from -3 to 3."""
    import torch

    return (code_GB.to(torch.float32) - 1.5) * step_G[:, None]


def _signed(negative_GB: Tensor, scale_G: Tensor) -> Tensor:
    """Return what a plane of signs adds."""
    import torch

    return (1 - 2 * negative_GB.to(torch.float32)) * scale_G[:, None]
