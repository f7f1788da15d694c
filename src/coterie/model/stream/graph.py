"""A unit as a node of autograd's graph: called by a job that wants gradients; see `coterie.model.stream.backward`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coterie.model.nested import mapped, tensors_in
from coterie.model.stream.backward import Backward
from coterie.model.stream.jobs import JobThread
from coterie.model.stream.unit import Unit


def call_unit(worker: JobThread, unit: Unit, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a unit from a job that wants gradients; what is returned carries them."""
    node = _Node(worker, unit, *mapped((args, kwargs), lambda tensor: tensor.detach()))
    anchor = torch.zeros((), requires_grad=True)
    flat = _UnitCall.apply(node, anchor, *tensors_in((args, kwargs)))  # type: ignore[no-untyped-call]
    tensors, output = iter(flat), node.output
    node.output = None
    return mapped(output, lambda tensor: next(tensors))


@dataclasses.dataclass(slots=True)
class _Node:
    """One call of a unit in the graph."""

    worker: JobThread
    unit: Unit
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None


class _UnitCall(torch.autograd.Function):
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
        target = Backward(node.args, node.kwargs, needed, gradients)
        return (None, None, *node.worker.wait(node.unit, (target,), {}))
