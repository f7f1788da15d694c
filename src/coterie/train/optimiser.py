"""Optimisers: what a step makes of gradients, by name.

A new one is a class like `Optimiser` and one line in the table; one that is in no table is asked for by its place,
``"module:attribute"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from coterie.errors import UnknownName

OPTIMISERS: dict[str, str] = {
    "adam": "coterie.train.optimiser:Adam",
}

BETAS = (0.9, 0.98)
EPSILON = 1e-12

#: What torch calls the two moments of a tensor's gradient.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimiser(Protocol):
    """Changes some tensors in place; made from them by name."""

    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Take one step against gradients, which come in the order of the tensors."""

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on beside the tensors, as one flat dict; tensors may be its own."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, which is only read."""


def load_optimiser(name: str) -> Callable[..., Optimiser]:
    """Return what makes an optimiser from tensors by name and from options of its own.

    Args:
        name: a name in `OPTIMISERS`, or ``"module:attribute"``.

    Raises:
        UnknownName: there is none of that name.
    """
    module, _, attribute = OPTIMISERS.get(name, name).partition(":")
    if not attribute:
        raise UnknownName("optimiser", name, OPTIMISERS)
    try:
        make: Callable[..., Optimiser] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnknownName("optimiser", name, OPTIMISERS) from error
    return make


class Adam:
    """torch's Adam (1412.6980) with steps relative to the size of each tensor's entries, for weights of any scale."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        betas: tuple[float, float] = BETAS,
        epsilon: float = EPSILON,
        relative: bool = True,
        unit: float = 1.0,
    ) -> None:
        """Begin.

        Args:
            weights: the tensors.
            betas: how much of the two moments stays in a step.
            epsilon: what is added to the root of the second moment.
            relative: whether an entry moves by the rate times the root mean square of those entries of its tensor that
                are not 0 now; else by the rate.
            unit: what gradients are divided by, which counts where it makes them as small as `epsilon`.
        """
        self._steps = 0
        self._weights = dict(weights)
        self._unit = unit
        groups = [{"params": [tensor], "size": _size(tensor) if relative else 1.0} for tensor in self._weights.values()]
        self._adam = torch.optim.Adam(groups, betas=betas, eps=epsilon)

    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Take one step against gradients, which come in the order of the weights."""
        self._steps += 1
        for tensor, gradient, group in zip(self._weights.values(), gradients, self._adam.param_groups, strict=True):
            tensor.grad = gradient if self._unit == 1.0 else gradient / self._unit
            group["lr"] = rate * group["size"]
        self._adam.step()
        self._adam.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Return the number of steps, the size of each tensor when it began, and both moments."""
        state = {"steps": torch.tensor(self._steps)}
        for (name, tensor), group in zip(self._weights.items(), self._adam.param_groups, strict=True):
            state[f"size.{name}"] = torch.tensor(group["size"], dtype=torch.float64)
            state |= {f"{moment}.{name}": self._adam.state[tensor][moment] for moment in _MOMENTS if self._steps}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self._steps = int(state["steps"])
        self._adam.state.clear()
        for (name, tensor), group in zip(self._weights.items(), self._adam.param_groups, strict=True):
            group["size"] = float(state[f"size.{name}"])
            if self._steps:
                moments = {moment: state[f"{moment}.{name}"].to(tensor.device, copy=True) for moment in _MOMENTS}
                self._adam.state[tensor] = {"step": torch.tensor(float(self._steps)), **moments}


def _size(tensor: Tensor) -> float:
    """Return the root mean square of the entries that are not 0."""
    used = tensor.detach()[tensor.detach() != 0]
    return float(used.double().square().mean().sqrt()) if len(used) else 0.0
