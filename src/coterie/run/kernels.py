"""How a projection multiplies: a plain matrix, or integers with scales as they lie in memory.

Kernels of 4 and 8 bits are torch's own. They take bfloat16, in which they are fast, and sum in float32.

Legend: T tokens, R rows (outputs), C columns (inputs), G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from coterie.model.disk.encodings.kernel_matrix import SCALE, KernelMatrix
from coterie.model.disk.tensors import TORCH_NAMES

#: Tokens from which on a product of bfloat16 is faster than the kernel of 8 bits, though numbers are turned into that:
#: the kernel's time is proportional to tokens (`benchmarks/run_kernels.py`).
_MANY = 16

#: Numbers that are turned into bfloat16 at once.
_BAND = 2**22


class Projection(Protocol):
    """A matrix (R, C), in whatever form."""

    def __call__(self, x_TC: Tensor, bias_R: Tensor | None = None) -> Tensor:
        """Return ``x matrix^T + bias``, (T, R), in the number format of x."""


@dataclass(frozen=True, slots=True)
class PlainProjection:
    """A matrix of plain numbers, in the number format of its input."""

    matrix_RC: Tensor

    def __call__(self, x_TC: Tensor, bias_R: Tensor | None = None) -> Tensor:
        """Return the product."""
        return nn.functional.linear(x_TC, self.matrix_RC, bias_R)


@dataclass(frozen=True, slots=True)
class EightBitProjection:
    """Integers of 8 bits (R, C), and a scale for each row (R)."""

    number_RC: Tensor
    scale_R: Tensor

    def __call__(self, x_TC: Tensor, bias_R: Tensor | None = None) -> Tensor:
        """Return the product."""
        x_in_TC = x_TC.to(torch.bfloat16).contiguous()
        if len(x_TC) >= _MANY:
            out_TR = self._of_many(x_in_TC)
        else:
            out_TR = torch.ops.aten._weight_int8pack_mm(x_in_TC, self.number_RC, self.scale_R)
        return _with_bias(out_TR.to(x_TC.dtype), bias_R)

    def _of_many(self, x_TC: Tensor) -> Tensor:
        """Return the product with numbers turned into bfloat16, which says them exactly, some rows at a time."""
        out_TR = torch.empty(len(x_TC), len(self.number_RC), dtype=torch.bfloat16)
        band = max(1, _BAND // x_TC.shape[1])
        for start in range(0, len(self.number_RC), band):
            part = slice(start, start + band)
            out_TR[:, part] = nn.functional.linear(x_TC, self.number_RC[part].to(torch.bfloat16)) * self.scale_R[part]
        return out_TR


@dataclass(frozen=True, slots=True)
class FourBitProjection:
    """Integers of 4 bits, two a byte in the order of the processor (R, C / 2), scales and offsets (G, R, 2)."""

    packed_RC: Tensor
    scale_GR2: Tensor
    group: int

    def __call__(self, x_TC: Tensor, bias_R: Tensor | None = None) -> Tensor:
        """Return the product."""
        out_TR = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_TC.to(torch.bfloat16).contiguous(), self.packed_RC, self.group, self.scale_GR2
        )
        return _with_bias(out_TR.to(x_TC.dtype), bias_R)


def _with_bias(out_TR: Tensor, bias_R: Tensor | None) -> Tensor:
    return out_TR if bias_R is None else out_TR + bias_R


def projection_of(encoding: KernelMatrix, stored: Mapping[str, Tensor]) -> Projection:
    """Return what multiplies with a matrix as it is stored, without a copy.

    Args:
        encoding: how it is stored.
        stored: what is, by suffix.
    """
    if encoding.bits == 8:
        return EightBitProjection(stored[""], stored[SCALE])
    assert encoding.group is not None
    return FourBitProjection(stored[""], stored[SCALE], encoding.group)


def blank_projection(encoding: KernelMatrix, shape: tuple[int, int]) -> Projection:
    """Return a matrix of a shape (R, C) that means nothing and takes the time of a real one."""
    stored = {
        suffix: torch.full(extents, 0.01).to(getattr(torch, TORCH_NAMES[form]))
        for suffix, (form, extents) in encoding.stored(shape).items()
    }
    return projection_of(encoding, stored)


def multiply(x_TC: Tensor, projection: Projection, bias_R: Tensor | None = None) -> Tensor:
    """Return the product with a projection, as `torch.nn.functional.linear` does with a matrix."""
    return projection(x_TC, bias_R)


class KernelLinear(nn.Module):
    """A linear layer whose matrix is a projection."""

    def __init__(self, projection: Projection, *, inputs: int, outputs: int, bias: nn.Parameter | None) -> None:
        """Stand in the place of a `torch.nn.Linear`.

        Args:
            projection: its matrix.
            inputs: columns.
            outputs: rows.
            bias: what is added, of the layer that it takes the place of.
        """
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.projection, self.bias = projection, bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of the last axis."""
        out_TR = self.projection(x.reshape(-1, self.in_features), self.bias)
        return out_TR.view(*x.shape[:-1], self.out_features)
