"""GPTQ towards what the original computes: errors of the layers before are made good as well.

A layer gets inputs X' from layers that are quantised already, where the original's got X. The matrix that comes nearest
to the original's output, W X, on what it really gets is W' = W + W (X - X') X'^T (X' X'^T + lambda I)^-1, and that is
what is rounded, with the Hessian X' X'^T (asymmetric calibration: GPTAQ, arXiv:2504.02692, and others).

Legend: N matrices, R rows (outputs), C columns (inputs), K bytes of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coterie.compress.quantisers.gptq import DAMPING, gptq

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.compress.moments import Inputs
    from coterie.model.disk.encodings.ggml.block_type import Layout

#: Share of the mean of the Hessian's diagonal that lambda is. A small sample tells little about how inputs differ.
RIDGE = 0.1


def corrected(
    weight_NRC: Tensor,
    inputs: Inputs,
    kind: Layout,
    *,
    damping: float = DAMPING,
    ridge: float = RIDGE,
    prefix_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Correct matrices for what comes in, and round them; return bytes (N, R, K), uint8, and values (N, R, C), float32.

    Args:
        weight_NRC: the matrices; C is a multiple of the block.
        inputs: what comes into them, and how that differs from what came into the original's; where that is not known,
            as of a head, nothing is corrected.
        kind: the format.
        damping: as for `gptq`.
        ridge: share of the mean of each Hessian's diagonal that lambda is.
        prefix_weight: as for `gptq`.

    Raises:
        ValueError: columns that are no whole blocks.
    """
    wanted_NRC = wanted(weight_NRC, inputs, ridge=ridge)
    return gptq(wanted_NRC, inputs, kind, damping=damping, prefix_weight=prefix_weight)


def wanted(weight_NRC: Tensor, inputs: Inputs, *, ridge: float = RIDGE) -> Tensor:
    """Return matrices (N, R, C) that come nearest to the original's output on what really comes in."""
    if inputs.missed_NCC is None:
        return weight_NRC
    wanted_NRC = torch.empty_like(weight_NRC, dtype=torch.float32)
    for number, (hessian_CC, missed_CC) in enumerate(zip(inputs.hessian_NCC, inputs.missed_NCC, strict=True)):
        wide_CC = hessian_CC.to(torch.float64)
        mean = float(wide_CC.diagonal().mean())
        eye_CC = torch.eye(len(wide_CC), dtype=torch.float64, device=wide_CC.device)
        lower_CC = torch.linalg.cholesky(wide_CC + (ridge * mean if mean > 0 else 1.0) * eye_CC)
        # (X - X') X'^T (X' X'^T + lambda I)^-1, from the right: the matrix is symmetric.
        shift_CC = torch.cholesky_solve(missed_CC.to(torch.float64).T, lower_CC).T
        wide_RC = weight_NRC[number].to(torch.float64)
        wanted_NRC[number] = wide_RC + wide_RC @ shift_CC
    return wanted_NRC
