"""Muon for the matrices, AdamW for the rest, with float32 master weights over a bfloat16 model.

Each parameter has its own state, so the updates can be shared out over threads in any order with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

NEWTON_SCHULZ = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))  # fmt: skip


def orthogonalise(grad: Tensor) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each matrix in a stack [..., rows, columns], by Newton-Schulz in bfloat16.

    Muon: https://kellerjordan.github.io/posts/muon; the coefficients of each round are from You Jiacheng.
    """
    x = grad.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Optimizer:
    """Master weights and moments of every parameter, by name.

    Stacked expert weights are treated as a stack of matrices, gate and up apart.
    """

    def __init__(self, named: dict[str, Parameter], muon_rate: float, adam_rate: float, weight_decay: float) -> None:
        self.named, self.muon_rate, self.adam_rate, self.weight_decay = named, muon_rate, adam_rate, weight_decay
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in named.items():
            master = parameter.detach().float().clone()
            self.state[name] = {"master": master, "first": torch.zeros_like(master)}
            if not self.is_matrix(name):
                self.state[name]["second"] = torch.zeros_like(master)

    @staticmethod
    def is_matrix(name: str) -> bool:
        """Whether Muon trains it: attention projections and experts, not embeddings, norms and routers."""
        return "_proj" in name

    @torch.no_grad()
    def update(self, name: str, grads: list[Tensor], scale: float, step: int) -> None:
        """One step (`step` counts from 1) for one parameter, with the mean of `grads` and rates times `scale`."""
        state, parameter = self.state[name], self.named[name]
        master, first = state["master"], state["first"]
        grad = torch.zeros_like(master)
        for part in grads:
            grad.add_(part, alpha=1 / len(grads))
        if self.is_matrix(name):
            first.lerp_(grad, 0.05)
            grad.lerp_(first, 0.95)
            if "gate_up" in name:
                grad = grad.unflatten(-2, (2, -1))
            rows, columns = grad.shape[-2:]
            rate = self.muon_rate * scale
            master.mul_(1 - rate * self.weight_decay)
            master.add_(orthogonalise(grad).reshape(master.shape), alpha=-rate * max(1, rows / columns) ** 0.5)
        else:
            second = state["second"]
            grad.mul_((1.0 / (grad.norm() + 1e-6)).clamp(max=1.0))
            first.lerp_(grad, 0.1)
            second.lerp_(grad.square(), 0.05)
            unbiased = first / (1 - 0.9**step)
            rate = self.adam_rate * scale * (0.25 if ".gate." in name else 1)  # a router's logits move a unit in a step
            master.sub_(rate * unbiased / ((second / (1 - 0.95**step)).sqrt() + 1e-8))
        parameter.copy_(master)

    @torch.no_grad()
    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Takes over saved state and writes the parameters from it."""
        for name, saved in state.items():
            for key, value in saved.items():
                self.state[name][key].copy_(value)
            self.named[name].copy_(self.state[name]["master"])
