"""Adam (1412.6980) with steps relative to the size of each tensor's entries, for weights of any scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.98)
EPSILON = 1e-12
WARM_UP = 5  # steps


def rate_at(step: int, steps: int, rate: float) -> float:
    """Return the rate of a step, counted from 0: a short rise, then a cosine down to nothing."""
    return rate * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Adam:
    """The optimizer's state for some tensors, which it changes in place.

    Attributes:
        steps: steps taken.
        weights: the tensors by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Begin; a tensor's entries move by the rate times the root mean square of those that are not 0 now."""
        self.steps = 0
        self.weights = dict(weights)
        self._first = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        self._second = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        self._scale = {name: _size(tensor) for name, tensor in weights.items()}

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Take one step against gradients, which come in the order of the weights."""
        self.steps += 1
        for (name, tensor), gradient in zip(self.weights.items(), gradients, strict=True):
            first, second = self._first[name], self._second[name]
            first.lerp_(gradient, 1 - BETAS[0])
            second.lerp_(gradient.square(), 1 - BETAS[1])
            deviation = (second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPSILON)
            step = first / (1 - BETAS[0] ** self.steps) / deviation
            tensor.sub_(step, alpha=rate * self._scale[name])

    def state(self) -> dict[str, Tensor]:
        """Return everything that `restore` needs, the weights too, as one flat dict."""
        found = {"steps": torch.tensor(self.steps)}
        for name, tensor in self.weights.items():
            found |= {
                f"weight.{name}": tensor.detach(),
                f"first.{name}": self._first[name],
                f"second.{name}": self._second[name],
                f"scale.{name}": torch.tensor(self._scale[name], dtype=torch.float64),
            }
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.steps = int(state["steps"])
        for name, tensor in self.weights.items():
            tensor.copy_(state[f"weight.{name}"])
            self._first[name].copy_(state[f"first.{name}"])
            self._second[name].copy_(state[f"second.{name}"])
            self._scale[name] = float(state[f"scale.{name}"])


def _size(tensor: Tensor) -> float:
    """Return the root mean square of the entries that are not 0."""
    used = tensor.detach()[tensor.detach() != 0]
    return float(used.double().square().mean().sqrt()) if len(used) else 0.0
