"""GPTQ: round the columns of a matrix one after another, each error made good by the columns that follow.

Frantar, Ashkboos, Hoefler, Alistarh 2022 (arXiv:2210.17323). With H = X^T X over the inputs of the matrix, and U the
upper Cholesky factor of H^-1, the error that rounding column j leaves is least when the later columns take
-(w_j - q_j) / U_jj times row j of U. Columns that a format codes together go together: their error is
(w - q) U_JJ^-1, and codes are chosen by its square. Scales are fitted block by block, to the weights as they then are.

Legend: N matrices, R rows (outputs), C columns (inputs), B columns of a block, v columns coded together, K bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coterie.model.disk.encodings.ggml.block_type import Codes, join_codes

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.model.disk.encodings.ggml.block_type import BlockType

#: Share of the mean of the Hessian's diagonal that is added to it, as the paper's own code does.
DAMPING = 0.01


def gptq(
    weight_NRC: Tensor, hessian_NCC: Tensor, kind: BlockType, *, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Round matrices; return their bytes (N, R, K), uint8, and their values (N, R, C), float32.

    Args:
        weight_NRC: the matrices; C is a multiple of the block.
        hessian_NCC: sums (or means) of the products of their inputs.
        kind: the format.
        damping: share of the mean of each Hessian's diagonal that is added to the diagonal. A Hessian of zeros, of an
            expert that no token reached, counts as the identity: its matrix is rounded to the nearest numbers.

    Raises:
        ValueError: columns that are no whole blocks.
    """
    num_columns = weight_NRC.shape[-1]
    if num_columns % kind.block:
        raise ValueError(f"{num_columns} columns are no whole blocks of {kind.block}, as {kind.name} has them")
    rest_NRC = weight_NRC.to(torch.float32).clone()
    upper_NCC = upper_factor(hessian_NCC, damping)
    value_NRC, packed = torch.empty_like(rest_NRC), []
    for start in range(0, num_columns, kind.block):
        stop = start + kind.block
        block_NRB, upper_NBB = rest_NRC[..., start:stop].clone(), upper_NCC[:, start:stop, start:stop]
        # What an error in a column costs when the later ones make good what they can.
        importance_N1B = upper_NBB.diagonal(dim1=-2, dim2=-1).reciprocal().square()[:, None, :]
        scales = kind.fit(block_NRB, importance_N1B)
        error_NRB, codes = torch.empty_like(block_NRB), list[Codes]()
        for column in range(0, kind.block, kind.together):
            end = column + kind.together
            weight_NRv, upper_Nvv = block_NRB[..., column:end], upper_NBB[:, column:end, column:end]
            metric_Nvv = _inverse_of_upper(upper_Nvv)
            chosen, value_NRv = kind.choose(weight_NRv, scales, column, metric_Nvv)
            codes.append(chosen)
            value_NRC[..., start + column : start + end] = value_NRv
            error_NRv = (weight_NRv - value_NRv) @ metric_Nvv
            error_NRB[..., column:end] = error_NRv
            block_NRB[..., end:] -= error_NRv @ upper_NBB[:, column:end, end:]
        rest_NRC[..., stop:] -= error_NRB @ upper_NCC[:, start:stop, stop:]
        packed.append(kind.pack(scales, join_codes(codes)))
    return torch.cat(packed, dim=-1), value_NRC


def round_to_nearest(weight_NRC: Tensor, importance_NC: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Round matrices to the nearest numbers, scales fitted by the importance of columns; return as `gptq` does."""
    packed, values = [], []
    for start in range(0, weight_NRC.shape[-1], kind.block):
        weight_NRB = weight_NRC[..., start : start + kind.block].to(torch.float32)
        importance_N1B = importance_NC[:, None, start : start + kind.block].to(torch.float32)
        scales, codes = kind.fit(weight_NRB, importance_N1B), list[Codes]()
        for column in range(0, kind.block, kind.together):
            end = column + kind.together
            metric_Nvv = torch.diag_embed(importance_N1B[:, 0, column:end].sqrt())
            chosen, value_NRv = kind.choose(weight_NRB[..., column:end], scales, column, metric_Nvv)
            codes.append(chosen)
            values.append(value_NRv)
        packed.append(kind.pack(scales, join_codes(codes)))
    return torch.cat(packed, dim=-1), torch.cat(values, dim=-1)


def upper_factor(hessian_NCC: Tensor, damping: float) -> Tensor:
    """Return U (N, C, C) with H^-1 = U^T U, upper triangular, of damped Hessians; float32.

    Computed in float64: the inverse of a matrix of few tokens needs it.
    """
    hessian_NCC = hessian_NCC.to(torch.float64)
    diagonal_NC = hessian_NCC.diagonal(dim1=-2, dim2=-1)
    mean_N = diagonal_NC.mean(dim=-1)
    added_N = torch.where(mean_N > 0, damping * mean_N, 1.0)
    eye_CC = torch.eye(hessian_NCC.shape[-1], dtype=torch.float64, device=hessian_NCC.device)
    lower_NCC = torch.linalg.cholesky(hessian_NCC + added_N[:, None, None] * eye_CC)
    inverse_NCC = torch.cholesky_inverse(lower_NCC)
    upper_NCC: Tensor = torch.linalg.cholesky(inverse_NCC, upper=True).to(torch.float32)
    return upper_NCC


def _inverse_of_upper(upper_Nvv: Tensor) -> Tensor:
    size = upper_Nvv.shape[-1]
    if size == 1:
        return upper_Nvv.reciprocal()
    eye_vv = torch.eye(size, device=upper_Nvv.device).expand_as(upper_Nvv)
    inverse_Nvv: Tensor = torch.linalg.solve_triangular(upper_Nvv, eye_vv, upper=True)
    return inverse_Nvv
