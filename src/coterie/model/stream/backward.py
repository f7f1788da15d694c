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
from typing import Any

import torch
from torch import Tensor

from coterie.model.nested import mapped, tensors_in


@dataclasses.dataclass(frozen=True, slots=True)
class Backward:
    """A job's target for the gradients of a unit's inputs.

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
        gradients = iter(torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return [next(gradients) if wants else None for wants in self.needed]
