"""Experts of a layer as a base that all of them share, and a difference of low rank for each.

A matrix W_e (R, C) is read as B + U_e V_e. Stored are B (R, C), the columns of U_e (r, R), and the rows of V_e (r, C),
so that blocks run along R and along C whatever the rank is. The form is that of D2-MoE (arXiv:2502.17298); how base and
factors are chosen is said in `coterie.compress.shared_base`.

Legend: E experts, R rows (outputs) of a matrix, C columns (inputs), r rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coterie.errors import UnsupportedDtype
from coterie.model.disk.encodings.ggml import SIZES, WRAPPED, unwrapped
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.encodings.plain import Plain
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

#: Suffixes of what is stored: the base, columns of U_e, rows of V_e.
BASE, LEFT, RIGHT = "_base", "_left", "_right"

#: What base and factors are where blocks do not fit their rows.
PLAIN = "BF16"

#: Formats that can be read.
_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBase:
    """One expert's matrix (R, C), or those of all experts of a layer in one tensor (E, R, C).

    Attributes:
        base: how the base is stored, with blocks along the last axis.
        factors: the same of the factors.
        rank: r.
        axis: the axis that is summed over when a matrix is used, from behind: -1, or -2 where matrices lie transposed.
        dtype: format of what is unpacked.

    Raises:
        ValueError: base or factors in another encoding, a rank below 1, or another axis or format.
    """

    base: Encoding
    factors: Encoding
    rank: int
    axis: int = -1
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        for name in ("base", "factors"):
            inner = getattr(self, name)
            blocks = isinstance(inner, GgmlBlocks) and inner.axis == -1
            if not blocks and not (isinstance(inner, Plain) and inner.dtype in _DTYPES):
                raise ValueError(f"{name} is {inner!r}: it should be blocks along axis -1, or {', '.join(_DTYPES)}")
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}: it should be 1 or more")
        if self.axis not in (-1, -2):
            raise ValueError(f"axis is {self.axis!r}: it should be -1 or -2")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: it should be {', '.join(_DTYPES)}")

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return what is nearest when all numbers weigh the same: the mean of the experts, and truncated SVDs.

        What was unpacked does not come back to the bit: a sum does not say what its terms were.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        import torch

        stored = self.stored(tuple(tensor.shape))
        weight_ERC = tensor.transpose(self.axis, -1).double().reshape(-1, *self._matrix(tuple(tensor.shape)))
        base = self.base.pack(weight_ERC.mean(dim=0).float())[""]
        difference_ERC = weight_ERC - self.base.unpack({"": base}).double()
        left_ERr, scale_Er, right_ErC = torch.linalg.svd(difference_ERC, full_matrices=False)
        root_Er1 = scale_Er[:, : self.rank, None].sqrt()
        packed = {BASE: base}
        factors = {LEFT: left_ERr.mT[:, : self.rank] * root_Er1, RIGHT: right_ErC[:, : self.rank] * root_Er1}
        for suffix, each in factors.items():
            packed[suffix] = self.factors.pack(each.float())[""].reshape(stored[suffix][1])
        return packed

    def unpack(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the matrices: the base, and what factors add to it, in float32 before it is rounded."""
        import torch

        base_RC = self.base.unpack({"": stored[BASE]}).float()
        left, right = (self.factors.unpack({"": stored[suffix]}).float() for suffix in (LEFT, RIGHT))
        left_ErR, right_ErC = (each.reshape(-1, *each.shape[-2:]) for each in (left, right))
        value_ERC = torch.empty(len(left_ErR), *base_RC.shape, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        # One after the other, so that the numbers of an expert are the same whether it is read alone or with others.
        for expert in range(len(value_ERC)):
            value_ERC[expert] = base_RC + left_ErR[expert].T @ right_ErC[expert]
        value = value_ERC.reshape(*left.shape[:-2], *base_RC.shape)
        return value.transpose(self.axis, -1).contiguous()

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return formats and shapes of base and factors.

        Raises:
            UnsupportedDtype: a shape that cannot be stored so.
        """
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise UnsupportedDtype(f"{list(shape)} cannot have a base and factors: that takes a matrix, or a stack")
        rows, columns = self._matrix(shape)
        if self.rank > min(rows, columns):
            raise UnsupportedDtype(
                f"{list(shape)} cannot have factors of rank {self.rank}: {min(rows, columns)} is all"
            )
        factors = (*shape[:-2], self.rank)
        return {
            BASE: self.base.stored((rows, columns))[""],
            LEFT: self.factors.stored((*factors, rows))[""],
            RIGHT: self.factors.stored((*factors, columns))[""],
        }

    def shape_of(self, stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
        """Return the shape of a tensor of which this is stored, formats and shapes by suffix.

        Raises:
            UnsupportedDtype: no tensor has such a base and such factors; says what does not fit.
        """
        extents = {suffix: self._inner_shape(*each) for suffix, each in stored.items() if suffix != BASE}
        matrix = (extents[LEFT][-1], extents[RIGHT][-1])
        shape = (*extents[LEFT][:-2], *(matrix if self.axis == -1 else matrix[::-1]))
        for suffix, expected in self.stored(shape).items():
            if stored[suffix] != expected:
                raise UnsupportedDtype(
                    f"factors of rank {self.rank} of {list(shape)} take {expected[0]} {list(expected[1])} as {suffix}; "
                    f"it is {stored[suffix][0]} {list(stored[suffix][1])}"
                )
        return shape

    def _inner_shape(self, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) < 2:
            raise UnsupportedDtype(f"{dtype} {list(shape)} is no factor, which is a matrix or a stack of them")
        return self.factors.shape_of(shape) if isinstance(self.factors, GgmlBlocks) else shape

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of this shape, the base with it."""
        return sum(bytes_of(dtype, extents) for dtype, extents in self.stored(shape).values())

    def base_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the base alone, which is stored once for all tensors that share it."""
        return bytes_of(*self.stored(shape)[BASE])

    def rows(self, shape: tuple[int, ...], count: int) -> tuple[Encoding, Collection[str]] | None:
        """Say that experts of a stack lie by themselves but for the base, and rows of a matrix do not."""
        return (self, (BASE,)) if len(shape) == 3 else None

    def config(self) -> dict[str, Any]:
        """Return what makes it again."""
        return {
            "encoding": "shared-base", "base": self.base.config(), "factors": self.factors.config(), "rank": self.rank,
            "axis": self.axis, "dtype": self.dtype,
        }  # fmt: skip

    def _matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return rows and columns of a matrix, whichever way it lies."""
        return shape[-3 - self.axis], shape[self.axis]


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBaseType:
    """What plans say of experts that share a base, as in "Q4_K+24*IQ4_NL".

    Attributes:
        base: the type of the base: one of GGML, or BF16.
        rank: r.
        factors: the type of the factors, as for the base.
    """

    base: str
    rank: int
    factors: str

    def __str__(self) -> str:
        return f"{self.base}+{self.rank}*{self.factors}"

    @classmethod
    def parse(cls, kind: str) -> SharedBaseType | None:
        """Return what a type says of base and factors; None where it is the type of a matrix by itself."""
        match = re.fullmatch(r"([^+*]+)\+([1-9]\d*)\*([^+*]+)", kind)
        if match is None:
            return None
        return cls(base=match[1], rank=int(match[2]), factors=match[3])

    def fits(self, rows: int, columns: int) -> bool:
        """Tell whether there are such types, and blocks of theirs in rows of that many numbers."""
        known = all(unwrapped(each) in SIZES or each == PLAIN for each in (self.base, self.factors))
        if not known or self.rank > min(rows, columns) or self.factors.endswith(WRAPPED):
            return False
        try:
            return self.encoding(columns).num_bytes((rows, columns)) > 0
        except (UnsupportedDtype, ValueError):
            return False

    def encoding(self, columns: int, axis: int = -1) -> SharedBase:
        """Return the encoding of matrices with so many columns, which are summed over along an axis."""
        return SharedBase(
            base=_inner(self.base, columns), factors=_inner(self.factors, columns), rank=self.rank, axis=axis,
            dtype="F32",
        )  # fmt: skip


def _inner(name: str, columns: int) -> Encoding:
    if name == PLAIN:
        return Plain(dtype=PLAIN)
    return GgmlBlocks(type=unwrapped(name), dtype="F32", columns=columns if name.endswith(WRAPPED) else None)


def base_name(pattern: str) -> str:
    """Return the name on disk of the base of experts by their pattern: beside the factors of expert 0.

    There all that sorts tensors by name takes it to be an expert's.
    """
    return ".".join("0" if part == "*" else part for part in pattern.split(".")) + BASE


def whole_name(name: str) -> str:
    """Return the name of a tensor by that of one of its factors; a name that is none's stays."""
    return name.removesuffix(LEFT).removesuffix(RIGHT)
