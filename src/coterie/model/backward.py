"""Gradients through a model with one of its units in memory at a time.

A job that wants gradients builds autograd's graph of everything between the units itself; a unit is one node in it. In
the forward pass the node keeps what the unit received and nothing else. In the backward pass it asks, as in the forward
pass, for the unit to be in memory, where the unit is run once more with gradients: activation checkpointing
(1604.06174) with the weights on disk. On the CPU autograd runs the nodes of a graph in the thread that called
``backward``, which is the job's own, so a node can wait for its turn like any other call of a unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

if TYPE_CHECKING:
    from coterie.model.jobs import Job
    from coterie.model.stream import Unit


@dataclasses.dataclass(frozen=True, slots=True)
class Backward:
    """A job's wish for the gradients of a unit's inputs.

    Attributes:
        args: what the unit received, without a graph.
        kwargs: by keyword.
        needed: for each tensor in `args` and `kwargs`, whether its gradient is wanted.
        gradients: gradients of the tensors that the unit returned; None where there is none.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    needed: tuple[bool, ...]
    gradients: tuple[Tensor | None, ...]

    def compute(
        self, forward: Callable[..., Any], device: torch.device, watch: Callable[[Any], None] | None = None
    ) -> list[Tensor | None]:
        """Run the unit once more, with gradients.

        Args:
            forward: the unit's forward.
            device: where it is run.
            watch: gets what the unit returns, before gradients are computed.

        Returns:
            For each tensor in `args` and `kwargs` its gradient, None where it is not wanted or does not matter.
        """
        wanted: list[Tensor] = []
        needed = iter(self.needed)

        def prepare(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().to(device)
            if next(needed):
                wanted.append(tensor.requires_grad_())
            return tensor

        args, kwargs = mapped((self.args, self.kwargs), prepare)
        with torch.enable_grad():
            output = forward(*args, **kwargs)
        if watch is not None:
            watch(output)
        pairs = [
            (tensor, gradient.to(tensor.device, tensor.dtype))
            for tensor, gradient in zip(tensors_in(output), self.gradients, strict=True)
            if gradient is not None and tensor.requires_grad
        ]
        if not pairs:
            return [None for _ in self.needed]
        found = iter(torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return [next(found) if wants else None for wants in self.needed]


def call_unit(worker: Job, unit: Unit, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a unit from a job that wants gradients; what is returned carries them."""
    node = _Node(worker, unit, *mapped((args, kwargs), lambda tensor: tensor.detach()))
    anchor = torch.zeros((), requires_grad=True)
    flat = _Call.apply(node, anchor, *tensors_in((args, kwargs)))  # type: ignore[no-untyped-call]
    found, output = iter(flat), node.output
    node.output = None
    return mapped(output, lambda tensor: next(found))


@dataclasses.dataclass(slots=True)
class _Node:
    """One call of a unit in the graph."""

    worker: Job
    unit: Unit
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, node: _Node, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        node.output = node.worker.wait(node.unit, node.args, node.kwargs)
        ctx.node = node
        ctx.set_materialize_grads(False)
        flat = tuple(tensors_in(node.output))
        ctx.mark_non_differentiable(*[tensor for tensor in flat if not tensor.is_floating_point()])
        return flat

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = tuple(ctx.needs_input_grad[2:])
        node = ctx.node
        if not any(needed) or all(gradient is None for gradient in gradients):
            return (None, None, *(None for _ in needed))
        wish = Backward(node.args, node.kwargs, needed, gradients)
        return (None, None, *node.worker.wait(node.unit, (wish,), {}))


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dicts and dataclass-like outputs, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, note)
    return found


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to all tensors in nested tuples, lists, dicts and dataclass-like outputs."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, function) for item in value)
    if type(value) is dict:
        return {key: mapped(item, function) for key, item in value.items()}
    if isinstance(value, ModelOutput):
        return type(value)(**{key: mapped(item, function) for key, item in value.items()})
    return value
