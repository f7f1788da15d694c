"""torch's Adam (1412.6980) with steps relative to the size of each tensor's entries, for weights of any scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.98)
EPSILON = 1e-12
WARM_UP = 5  # steps
FALL = 0.5  # share of the steps

#: What torch calls the two moments of a tensor's gradient.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def rate_at(step: int, steps: int, rate: float) -> float:
    """Return the rate of a step, counted from 0: it rises, stays, and in the last half falls to nothing in a line."""
    return rate * min(1.0, (step + 1) / WARM_UP, (steps - step) / (FALL * steps))


class Adam:
    """The optimizer and its state for some tensors, which it changes in place.

    Attributes:
        steps: steps taken.
        weights: the tensors by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Begin; a tensor's entries move by the rate times the root mean square of those that are not 0 now."""
        self.steps = 0
        self.weights = dict(weights)
        groups = [{"params": [tensor], "size": _size(tensor)} for tensor in weights.values()]
        self._adam = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON)

    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Take one step against gradients, which come in the order of the weights."""
        self.steps += 1
        for tensor, gradient, group in zip(self.weights.values(), gradients, self._adam.param_groups, strict=True):
            tensor.grad = gradient
            group["lr"] = rate * group["size"]
        self._adam.step()
        self._adam.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Return everything that `restore` needs, the weights too, as one flat dict."""
        found = {"steps": torch.tensor(self.steps)}
        for (name, tensor), group in zip(self.weights.items(), self._adam.param_groups, strict=True):
            found[f"weight.{name}"] = tensor.detach()
            found[f"size.{name}"] = torch.tensor(group["size"], dtype=torch.float64)
            found |= {f"{moment}.{name}": self._adam.state[tensor][moment] for moment in _MOMENTS if self.steps}
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.steps = int(state["steps"])
        for (name, tensor), group in zip(self.weights.items(), self._adam.param_groups, strict=True):
            tensor.copy_(state[f"weight.{name}"])
            group["size"] = float(state[f"size.{name}"])
            if self.steps:
                moments = {moment: state[f"{moment}.{name}"].to(tensor.device, copy=True) for moment in _MOMENTS}
                self._adam.state[tensor] = {"step": torch.tensor(float(self.steps)), **moments}


def _size(tensor: Tensor) -> float:
    """Return the root mean square of the entries that are not 0."""
    used = tensor.detach()[tensor.detach() != 0]
    return float(used.double().square().mean().sqrt()) if len(used) else 0.0
