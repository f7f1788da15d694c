"""Optimisers that the study in research.py tries and the package does not have; made and used as those of the package.

Each is a `coterie.train.optimiser.Optimiser`. The last two axes of a tensor are a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coterie.train.optimiser import Adam, Optimiser

#: Optimisers of the experts' matrices; all else is Adam's.
OPTIMISERS = {"adam": "adam", "muon": "research_optimisers:Muon", "eigenbasis": "research_optimisers:Turned"}

#: Momentum of Muon, and the coefficients and steps of its Newton-Schulz iteration.
MOMENTUM = 0.9
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Together:
    """Several optimisers, each for some of the tensors and with a share of the rate."""

    def __init__(self, names: Sequence[str], groups: Sequence[tuple[Sequence[str], Optimiser, float]]) -> None:
        """Begin; `names` are those of all tensors, in the order of the gradients, and each is in one group."""
        self._names = tuple(names)
        self._groups = tuple(groups)

    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Take one step against gradients, which come in the order of the tensors."""
        by_name = dict(zip(self._names, gradients, strict=True))
        for names, optimiser, share in self._groups:
            optimiser.step([by_name[name] for name in names], share * rate)

    def state(self) -> dict[str, Tensor]:
        """Return the states of all, by the number of the group."""
        states = enumerate(optimiser.state() for _, optimiser, _ in self._groups)
        return {f"{number}.{name}": tensor for number, state in states for name, tensor in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for number, (_, optimiser, _) in enumerate(self._groups):
            own = f"{number}."
            optimiser.restore(
                {name.removeprefix(own): tensor for name, tensor in state.items() if name.startswith(own)}
            )


class Muon:
    """Momentum, orthogonalised matrix by matrix: all directions of a matrix move equally far.

    The last two axes of a tensor are a matrix. A step has a root mean square of the rate times that of the tensor.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Begin."""
        self._weights = dict(weights)
        self._momentum = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        self._scale = {name: float(tensor.detach().square().mean().sqrt()) for name, tensor in weights.items()}

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Take one step against gradients, which come in the order of the weights."""
        for (name, tensor), gradient in zip(self._weights.items(), gradients, strict=True):
            momentum = self._momentum[name].lerp_(gradient, 1 - MOMENTUM)
            # Nesterov's: this step's gradient counts as it will in the next one.
            step = orthogonalised(gradient.lerp(momentum, MOMENTUM))
            tensor.sub_(step, alpha=rate * self._scale[name] * max(tensor.shape[-2:]) ** 0.5)

    def state(self) -> dict[str, Tensor]:
        """Return the momentum of each tensor, and its size when it began."""
        sizes = {name: torch.tensor(size, dtype=torch.float64) for name, size in self._scale.items()}
        return {
            **{f"momentum.{name}": tensor for name, tensor in self._momentum.items()},
            **{f"size.{name}": size for name, size in sizes.items()},
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for name, momentum in self._momentum.items():
            momentum.copy_(state[f"momentum.{name}"])
            self._scale[name] = float(state[f"size.{name}"])


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices (..., m, n) with all singular values brought near 1, by Newton-Schulz iteration."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    iterate: Tensor = matrices.mT if tall else matrices
    iterate = iterate / torch.linalg.matrix_norm(iterate, keepdim=True).clamp(min=1e-30)
    one, three, five = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = iterate @ iterate.mT
        iterate = one * iterate + (three * square + five * square @ square) @ iterate
    return iterate.mT if tall else iterate


class Turned:
    """Adam on matrices whose inputs are written in the eigenbasis of their second moments.

    There the inputs are uncorrelated, which is what steps of one size for each entry take them to be.
    """

    def __init__(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Begin.

        Args:
            weights: tensors whose last axis is that of the inputs.
            moments: second moments of the inputs by the same names, one matrix for a tensor or one for each expert.
        """
        self._weights = dict(weights)
        self._bases = {
            name: torch.linalg.eigh(moments[name].double()).eigenvectors.to(tensor.dtype)
            for name, tensor in weights.items()
        }
        self._turned = {name: tensor.detach() @ self._bases[name] for name, tensor in weights.items()}
        self._adam = Adam(self._turned)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Take one step against gradients, which come in the order of the weights."""
        pairs = zip(self._weights, gradients, strict=True)
        self._adam.step([gradient @ self._bases[name] for name, gradient in pairs], rate)
        for name, tensor in self._weights.items():
            tensor.copy_(self._turned[name] @ self._bases[name].mT)

    def state(self) -> dict[str, Tensor]:
        """Return the bases, the tensors in them, and Adam's state."""
        return {
            **{f"basis.{name}": tensor for name, tensor in self._bases.items()},
            **{f"turned.{name}": tensor for name, tensor in self._turned.items()},
            **{f"adam.{name}": tensor for name, tensor in self._adam.state().items()},
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for name, turned in self._turned.items():
            self._bases[name] = state[f"basis.{name}"].clone()
            turned.copy_(state[f"turned.{name}"])
        own = "adam."
        self._adam.restore({name.removeprefix(own): tensor for name, tensor in state.items() if name.startswith(own)})
