"""How heavy the tail of a matrix's spectrum is, as the theory of heavy-tailed self-regularisation reads it.

AlphaQ (2606.04980). Eigenvalues of W^T W are those of square windows of the matrix, all together, so that wide and tall
matrices are told apart by their training and not by their shape (FARMS); the exponent of their tail is Hill's estimate,
``alpha = 1 + k / sum over the k largest of ln(lambda_i / lambda_(k+1))``. The smaller, the heavier.

Legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.compress.allocators.expert_types import Group
from coterie.model.stream.stream import Stream

#: Rows and columns of a window, and how many windows of a matrix are looked at, at most.
WINDOW, WINDOWS = 128, 256

#: The share of eigenvalues that are its tail, and the least number of them.
TAIL, LEAST = 0.1, 10

#: What stands in for an eigenvalue of 0.
_TINY = 1e-12


@dataclass(kw_only=True)
class Spectra:
    """Reads the matrices of experts, and measures their spectra; no text is needed.

    Attributes:
        stream: the model, open.
        groups: the matrices.
    """

    stream: Stream
    groups: Sequence[Group]

    def measure(self, skip: Collection[str] = ()) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
        """Yield for each layer its name, and by matrix "alpha", the exponent, and "variance", that of its elements.

        Those of a tensor that holds the matrices of all experts are measured one by one, and have numbers behind.

        Args:
            skip: layers that are left out.
        """
        by_layer: dict[str, list[Group]] = {}
        for group in self.groups:
            by_layer.setdefault(f"layers.{group.layer}", []).append(group)
        for layer, groups in by_layer.items():
            if layer in skip:
                continue
            measured: dict[str, dict[str, float]] = {}
            for name in (name for group in groups for weight in group.weights for name in weight.names):
                tensor = self.stream.read(name)
                if tensor.dim() == 2:
                    measured[name] = _measured(tensor)
                else:
                    measured |= {f"{name}[{number}]": _measured(matrix) for number, matrix in enumerate(tensor)}
            yield layer, measured


def _measured(matrix_RC: Tensor) -> dict[str, float]:
    values_RC = matrix_RC.float()
    return {"alpha": tail_exponent(values_RC), "variance": float(values_RC.double().var(correction=0))}


def tail_exponent(matrix_RC: Tensor) -> float:
    """Return Hill's estimate of the exponent of the tail of a matrix's spectrum, above 1.

    Windows lie edge to edge; of more than `WINDOWS` as many are taken, evenly. A matrix that is smaller than one is
    taken whole.
    """
    rows, columns = matrix_RC.shape
    if rows < WINDOW or columns < WINDOW:
        windows = matrix_RC[None]
    else:
        corners = [
            (row, column)
            for row in range(0, rows - WINDOW + 1, WINDOW)
            for column in range(0, columns - WINDOW + 1, WINDOW)
        ]
        if len(corners) > WINDOWS:
            corners = [corners[number * len(corners) // WINDOWS] for number in range(WINDOWS)]
        windows = torch.stack([matrix_RC[row : row + WINDOW, column : column + WINDOW] for row, column in corners])
    eigenvalues = torch.linalg.svdvals(windows).double().square().flatten().sort(descending=True).values
    tail = max(1, min(max(LEAST, int(TAIL * len(eigenvalues))), len(eigenvalues) - 1))
    logs = eigenvalues.clamp(min=_TINY).log()
    excess = float((logs[:tail] - logs[tail]).sum())
    return 1 + tail / max(excess, _TINY)
