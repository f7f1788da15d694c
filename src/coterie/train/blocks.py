"""Matrices in blocks of GGML types on the way to be trained: their scales move, their codes stay.

The values of a block are linear in one or two numbers that are stored with it as float16: its scale and, in types that
have one, its minimum. Each gets a multiplier, 1 at first. What is computed with are the values of the bytes as they
will be stored, the product rounded to float16; gradients pass the rounding as if it were not there (straight-through,
1308.3432). So what is trained is what is stored, in as many bytes as before.

Values exist as long as they are needed: matrices stay the bytes that they are on disk, and a layer's experts are
unpacked once on the way forward and once more on the way back (1604.06174).

Legend: G blocks, K bytes of a block, C columns of one, n float16 numbers of one (0, 1 or 2), E experts, T tokens,
D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.seam import intercepted, routed_output
from coterie.model.disk.encodings.ggml import SIZES, get_type, numbers_of, unwrapped
from coterie.model.disk.encodings.ggml.block_type import as_half, half_bytes, halves

#: Numbers that are unpacked at a time; each passes through some forty bytes.
NUMBERS_AT_ONCE = 2**19


class Blocks:
    """Matrices in whole blocks, as bytes.

    Attributes:
        byte_GK: the bytes of all blocks, row after row, uint8.
        num_numbers: how many float16 numbers a block has, n.
        shape: of the values.
    """

    def __init__(self, type: str, bytes: Tensor, columns: int | None = None) -> None:
        """Take bytes.

        Args:
            type: the name in GGML, with `coterie.model.disk.encodings.ggml.WRAPPED` where blocks run on between rows.
            bytes: (..., K for each block of a row, or of rows that are stored together), uint8.
            columns: numbers of a row; needed where blocks run on.
        """
        self._kind = get_type(unwrapped(type))
        self._place, self._stored_shape = self._kind.numbers_at, bytes.shape
        self.num_numbers = numbers_of(type)
        size = SIZES[unwrapped(type)][1]
        self.byte_GK = bytes.reshape(-1, size)
        along = bytes.shape[-1] // size * self._kind.block
        columns = along if columns is None else columns
        self.shape = (*bytes.shape[:-2], bytes.shape[-2] * (along // columns), columns)

    def numbers(self) -> Tensor:
        """Return the float16 numbers (G, n) of the blocks as they were given, float32."""
        return self._numbers(slice(None))

    def ones(self) -> Tensor:
        """Return multipliers (G, n) that change nothing, float32."""
        return torch.ones(len(self.byte_GK), self.num_numbers, device=self.byte_GK.device)

    def values(self, multiplier_Gn: Tensor) -> Tensor:
        """Return the values (`shape`), float32; gradients reach the multipliers."""
        values: Tensor = _Values.apply(multiplier_Gn, self)  # type: ignore[no-untyped-call]
        return values

    @torch.no_grad()
    def bytes(self, multiplier_Gn: Tensor) -> Tensor:
        """Return the bytes of these values, in the shape in which bytes were given; codes are the same."""
        byte_GK = self._with_numbers(slice(None), self._rounded(multiplier_Gn, slice(None)))
        return byte_GK.reshape(self._stored_shape)

    def _rounded(self, multiplier_Gn: Tensor, some: slice) -> Tensor:
        return as_half(self._numbers(some) * multiplier_Gn[some])

    def _numbers(self, some: slice) -> Tensor:
        byte_Gk = self.byte_GK[some, self._place].clone()  # a view of odd bytes cannot be seen as float16
        return halves(byte_Gk.view(len(byte_Gk), self.num_numbers, 2))

    def _with_numbers(self, some: slice, number_Gn: Tensor) -> Tensor:
        byte_GK = self.byte_GK[some].clone()
        byte_GK[:, self._place] = half_bytes(number_Gn).flatten(1)
        return byte_GK

    def _unpacked(self, multiplier_Gn: Tensor) -> Tensor:
        value_GC = torch.empty(len(self.byte_GK), self._kind.block, device=self.byte_GK.device)
        for some in self._slices():
            byte_GK = self._with_numbers(some, self._rounded(multiplier_Gn, some))
            value_GC[some] = self._kind.unpack(byte_GK[None])[0]
        return value_GC.reshape(self.shape)

    def _gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient (G, n) for the multipliers from that for the values."""
        gradient_GC = gradient.reshape(-1, self._kind.block)
        gradient_Gn = torch.empty(len(gradient_GC), self.num_numbers, device=gradient.device)
        unit_n = torch.eye(self.num_numbers, device=gradient.device)
        for some in self._slices():
            for place in range(self.num_numbers):
                # Values are linear in each number: with 1 in its place and 0 for the other they are their derivative.
                byte_GK = self._with_numbers(some, unit_n[place].expand(len(self.byte_GK[some]), -1))
                derivative_GC = self._kind.unpack(byte_GK[None])[0]
                gradient_Gn[some, place] = (gradient_GC[some] * derivative_GC).sum(dim=-1)
        return gradient_Gn * self.numbers()

    def _slices(self) -> Iterator[slice]:
        at_once = max(1, NUMBERS_AT_ONCE // self._kind.block)
        for start in range(0, len(self.byte_GK), at_once):
            yield slice(start, start + at_once)


class _Values(torch.autograd.Function):
    """The values of blocks, as a function of their multipliers; nothing of them is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, multiplier_Gn: Tensor, blocks: Blocks) -> Tensor:
        ctx.blocks = blocks
        return blocks._unpacked(multiplier_Gn)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.blocks._gradient(gradient), None


class _Rounding(torch.autograd.Function):
    """Numbers rounded to a number format; gradients pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Unpacked(nn.Module):
    """A parameter that is the values of blocks; what is in its place in the module are the multipliers."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self._blocks = blocks

    def forward(self, multiplier_Gn: Tensor) -> Tensor:
        return self._blocks.values(multiplier_Gn)

    def right_inverse(self, value: Tensor) -> Tensor:
        return self._blocks.ones()


class _Rounded(nn.Module):
    """A parameter that is rounded as it will be stored."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        rounded: Tensor = _Rounding.apply(value, self._dtype)  # type: ignore[no-untyped-call]
        return rounded


def train_scales(model: nn.Module, names: tuple[str, ...], blocks: Blocks) -> nn.Parameter:
    """Let parameters of a model be the values of blocks; return the multipliers, one tensor for all the names.

    Args:
        model: the model.
        names: of parameters that are one, as those of a tied head are.
        blocks: what they are.
    """
    multipliers: nn.Parameter | None = None
    for name in names:
        module, leaf = _owner(model, name)
        setattr(module, leaf, nn.Parameter(torch.empty(0, device=blocks.byte_GK.device), requires_grad=False))
        register_parametrization(module, leaf, _Unpacked(blocks), unsafe=True)
        parametrized: Any = module.parametrizations[leaf]  # type: ignore[index]
        if multipliers is None:
            multipliers = parametrized.original
        else:
            parametrized.original = multipliers
    assert multipliers is not None
    return multipliers


def train_rounded(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Parameter:
    """Let a parameter of a model be rounded to a number format where it is used; return what is rounded."""
    module, leaf = _owner(model, name)
    register_parametrization(module, leaf, _Rounded(dtype))
    parametrized: Any = module.parametrizations[leaf]  # type: ignore[index]
    original: nn.Parameter = parametrized.original
    return original


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """One projection of all experts of a layer, or of those that have one width and one type.

    Attributes:
        blocks: of all of them, shape (E, rows, columns).
        multiplier_Gn: what their scales are multiplied with.
        experts: the numbers of the experts; None for all.
    """

    blocks: Blocks
    multiplier_Gn: Tensor
    experts: tuple[int, ...] | None = None


def _of_all(stacks: Sequence[Stack], num_experts: int) -> Tensor:
    """Return the values of a projection of all experts, (E, rows, columns), the narrower ones filled up with zeros.

    So are those of which nothing is stored.
    """
    values = [each.blocks.values(each.multiplier_Gn) for each in stacks]
    if stacks[0].experts is None:
        return values[0]
    rows, columns = (max(each.shape[axis] for each in values) for axis in (1, 2))
    filled = [nn.functional.pad(each, (0, columns - each.shape[2], 0, rows - each.shape[1])) for each in values]
    stored = [expert for each in stacks for expert in each.experts or ()]
    missing = sorted(set(range(num_experts)) - set(stored))
    if missing:
        filled.append(filled[0].new_zeros(len(missing), rows, columns))
    order = torch.tensor([*stored, *missing]).argsort()
    return torch.cat(filled)[order.to(filled[0].device)]


@contextmanager
def experts_in_blocks(model: PreTrainedModel, stacks: Mapping[str, Mapping[str, Sequence[Stack]]]) -> Iterator[None]:
    """Within the block, experts are computed one after the other, from blocks; a layer's are unpacked while they are.

    Args:
        model: whose experts.
        stacks: by name of the experts module, then by the field of `Experts` that they stand for, all experts of it.
    """
    of_module = {id(model.get_submodule(name)): entry for name, entry in stacks.items()}

    def compute(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        own = of_module.get(id(module), {})

        def routed(hidden_TD: Tensor, weight_TK: Tensor) -> Tensor:
            experts = canonical_experts(module, attached=True)
            unpacked: dict[str, Any] = {field: _of_all(each, len(experts.up_EFD)) for field, each in own.items()}
            experts = replace(experts, **unpacked)
            return routed_output(experts.apart(), hidden_TD, index_TK, weight_TK)

        if not torch.is_grad_enabled():
            return routed(hidden_TD, weight_TK)
        output_TD: Tensor = checkpoint(routed, hidden_TD, weight_TK, use_reentrant=False, preserve_rng_state=False)
        return output_TD

    with intercepted(model, compute):
        yield
