"""A matrix as kernels of the processor multiply with it: integers of 4 or 8 bits, and scales.

With 8 bits every row has a scale, and numbers lie as in the matrix. With 4 bits every group of columns has a scale and
an offset, and numbers lie as the vectors of the processor want them, which differ in width: `isa` says whose. torch
multiplies with either as it is (``aten::_weight_int8pack_mm``, ``aten::_weight_int4pack_mm_for_cpu``), so nothing is
unpacked before it is used (`coterie.run.kernels`).

A value is ``scale * number`` with 8 bits and ``scale * (number - 8) + offset`` with 4; scales and offsets are bfloat16,
as the kernels compute with them. Which numbers are chosen is said by `coterie.model.disk.encodings.kernel_rounding`.

Legend: R rows (outputs), C columns (inputs), G groups of a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from coterie.errors import UnsupportedDtype
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

SCALE = "_scale"

#: Columns that may share a scale with 4 bits.
GROUPS = (32, 64, 128, 256)

#: What the kernels want columns to be a multiple of; and with 4 bits rows.
COLUMNS, ROWS = 32, 16

#: Rows that lie by themselves with 4 bits on any processor, as a multiple of the rows that one of its blocks holds.
_BAND = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelMatrix:
    """Numbers of a matrix, and its scales.

    Attributes:
        bits: of a number, 4 or 8.
        group: columns that share a scale, one of `GROUPS`; None with 8 bits, where all of a row do.
        isa: the processor that numbers of 4 bits lie for, as `this_isa` names it; None with 8 bits, which any reads.
        dtype: format of what is unpacked.

    Raises:
        ValueError: no such encoding.
    """

    bits: int = 8
    group: int | None = None
    isa: str | None = None
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        by_group = self.group in GROUPS and bool(self.isa)
        if self.bits not in (4, 8) or not (by_group if self.bits == 4 else self.group is None and self.isa is None):
            raise ValueError(
                f"{self.bits} bits are in groups of {self.group} for {self.isa}: no kernel is known for that"
            )

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Round a matrix (R, C) to the nearest numbers, with the scales that are best for that.

        Raises:
            UnsupportedDtype: a shape or a number that cannot be stored so, or numbers lie for another processor.
        """
        return self.fit(tensor)[0]

    def fit(self, value_RC: Tensor, *, on_grid: bool = False) -> tuple[dict[str, Tensor], float]:
        """Round a matrix; see `pack`.

        Args:
            value_RC: the matrix.
            on_grid: it was stored in few bits before; scales are looked for with which nothing changes.

        Returns:
            What is stored, by suffix; and the sum of squares of what changed, 0 where nothing did.
        """
        import torch

        from coterie.model.disk.encodings import kernel_rounding

        self.stored(tuple(value_RC.shape))
        self._check_isa()
        rows, columns = value_RC.shape
        shape = (rows, columns // 2) if self.bits == 4 else (rows, columns)
        number_RC = torch.empty(shape, dtype=torch.uint8 if self.bits == 4 else torch.int8)
        scales, wrong = [], 0.0
        for start in range(0, rows, _BAND):
            part = slice(start, start + _BAND)
            value_BC = value_RC[part].to(torch.float32)
            if not bool(torch.isfinite(value_BC).all()):
                raise UnsupportedDtype(
                    f"holds numbers that are not finite, which cannot be stored in {self.bits} bits with scales"
                )
            if self.bits == 4:
                assert self.group is not None
                code_BC, scale_BG2, error = kernel_rounding.by_group(value_BC, self.group, on_grid=on_grid)
                number_RC[part] = _interleaved(code_BC)
                scales.append(scale_BG2)
            else:
                number_RC[part], scale_B, error = kernel_rounding.by_row(value_BC, on_grid=on_grid)
                scales.append(scale_B)
            wrong += error
        scale = torch.cat(scales)
        return {"": number_RC, SCALE: scale.transpose(0, 1).contiguous() if self.bits == 4 else scale}, wrong

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the values (R, C).

        Raises:
            UnsupportedDtype: numbers lie for another processor.
        """
        import torch

        self._check_isa()
        number_RC, scale, dtype = stored[""], stored[SCALE].to(torch.float32), getattr(torch, TORCH_NAMES[self.dtype])
        if self.bits == 8:
            return (number_RC.to(torch.float32) * scale[:, None]).to(dtype)
        assert self.group is not None
        rows, columns = number_RC.shape[0], 2 * number_RC.shape[1]
        out_RC = torch.empty(rows, columns, dtype=dtype)
        for start in range(0, rows, _BAND):
            part = slice(start, start + _BAND)
            code_BGK = _in_order(number_RC[part]).to(torch.float32).view(-1, columns // self.group, self.group)
            scale_BG1, offset_BG1 = scale[:, part].transpose(0, 1)[..., None].unbind(2)
            out_RC[part] = ((code_BGK - 8) * scale_BG1 + offset_BG1).view(-1, columns)
        return out_RC

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return formats and shapes of numbers and scales.

        Raises:
            UnsupportedDtype: a shape that the kernels do not take.
        """
        rows, columns = self._checked(shape)
        if self.bits == 8:
            return {"": ("I8", shape), SCALE: ("BF16", (rows,))}
        assert self.group is not None
        return {"": ("U8", (rows, columns // 2)), SCALE: ("BF16", (columns // self.group, rows, 2))}

    def _checked(self, shape: tuple[int, ...]) -> tuple[int, int]:
        multiple = self.group or COLUMNS
        if len(shape) != 2 or min(shape) < 1 or shape[1] % multiple or (self.bits == 4 and shape[0] % ROWS):
            wants = f"columns a multiple of {multiple}" + (f", rows of {ROWS}" if self.bits == 4 else "")
            raise UnsupportedDtype(f"{list(shape)} cannot be stored in {self.bits} bits: that takes a matrix, {wants}")
        return shape[0], shape[1]

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of all that is stored of a tensor of this shape."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that rows do not lie by themselves: processors want several side by side."""
        return None

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {
            "encoding": "kernel-matrix", "bits": self.bits, "group": self.group, "isa": self.isa, "dtype": self.dtype,
        }  # fmt: skip

    def _check_isa(self) -> None:
        if self.isa is not None and self.isa != this_isa():
            raise UnsupportedDtype(
                f"lies as processors with {self.isa} want it, and this one computes with {this_isa()}: pack the model "
                "that it was made from again, on this machine (coterie pack)"
            )


def this_isa() -> str:
    """Return what torch computes with on this processor, like AVX512 or AVX2."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def _interleaved(code_RC: Tensor) -> Tensor:
    """Return codes from 0 to 15, two a byte, in the order that this processor wants: uint8 (R, C / 2)."""
    import torch

    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code_RC.to(torch.int32), 1)
    return packed


def _in_order(packed_RC: Tensor) -> Tensor:
    """Return the codes (R, C), uint8, of what `_interleaved` returned."""
    import torch

    rows, columns = packed_RC.shape[0], 2 * packed_RC.shape[1]
    code_N = torch.empty(rows * columns, dtype=torch.uint8)
    code_N[_places(rows, columns)] = torch.stack((packed_RC & 15, packed_RC >> 4), dim=-1).flatten()
    return code_N.view(rows, columns)


@lru_cache(maxsize=2)
def _places(rows: int, columns: int) -> Tensor:
    """Return where in a matrix each number lies that this processor's order has: int64 (rows * columns).

    Numbers of places take that order themselves, four bits at a time; so it need not be known.
    """
    import torch

    place_RC = torch.arange(rows * columns).view(rows, columns)
    places_N = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        packed_RC = _interleaved(place_RC >> shift & 15)
        places_N += torch.stack((packed_RC & 15, packed_RC >> 4), dim=-1).flatten().to(torch.int64) << shift
    return places_N
