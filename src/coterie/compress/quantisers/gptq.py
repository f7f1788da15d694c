"""GPTQ: round the columns of a matrix one after another, each error made good by the columns that follow.

Frantar, Ashkboos, Hoefler, Alistarh 2022 (arXiv:2210.17323). With H = X^T X over the inputs of the matrix, and U the
upper Cholesky factor of H^-1, the error that rounding column j leaves is least when the later columns take
-(w_j - q_j) / U_jj times row j of U. Columns that a format codes together go together: their error is
(w - q) U_JJ^-1, and codes are chosen by its square. Scales are fitted block by block, to the weights as they then are.

Legend: N matrices, R rows (outputs), C columns (inputs), K bytes of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coterie.model.disk.encodings.ggml.rounding import round_columns
from coterie.model.disk.encodings.plane_groups import Planes, round_nested
from coterie.model.threads import each_computed

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.compress.moments import Inputs
    from coterie.model.disk.encodings.ggml.block_type import Layout

#: Share of the mean of the Hessian's diagonal that is added to it, as the paper's own code does.
DAMPING = 0.01

#: Elements of Hessians that are factored at once, and bytes that each takes meanwhile: five in float64, one in float32.
HESSIAN_ELEMENTS, FACTOR_BYTES = 2**22, 5 * 8 + 4

#: Rows of matrices that are rounded together: as many as pay for the steps from column to column.
_ROWS = 2**11


def gptq(
    weight_NRC: Tensor, inputs: Inputs, kind: Layout, *, damping: float = DAMPING, prefix_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Round matrices; return their bytes (N, R, K), uint8, and their values (N, R, C), float32.

    Args:
        weight_NRC: the matrices; C is a multiple of the block.
        inputs: what comes into them; where one saw no token, as an expert that nobody chose, its matrix is rounded to
            the nearest numbers.
        kind: the format.
        damping: share of the mean of each Hessian's diagonal that is added to the diagonal.
        prefix_weight: of planes of bits, how much the same in one bit less weighs where codes are chosen, see
            `coterie.model.disk.encodings.plane_groups.round_nested`; all other types have no such.

    Raises:
        ValueError: columns that are no whole blocks.
    """
    # A few at a time: the factors of all would take many times what the matrices take.
    num_matrices, num_rows, num_columns = weight_NRC.shape
    at_once = max(1, min(HESSIAN_ELEMENTS // num_columns**2, _ROWS // num_rows))

    def rounded(start: int) -> tuple[Tensor, Tensor]:
        some = slice(start, start + at_once)
        upper_NCC = upper_factor(inputs.hessian_NCC[some], damping)
        # What an error in a column costs when the later ones make good what they can.
        importance_NC = upper_NCC.diagonal(dim1=-2, dim2=-1).reciprocal().square()
        if prefix_weight and isinstance(kind, Planes):
            return round_nested(weight_NRC[some], importance_NC, upper_NCC, kind, prefix_weight)
        return round_columns(weight_NRC[some], importance_NC, upper_NCC, kind)

    starts = range(0, num_matrices, at_once)
    byte_parts, value_parts = zip(*each_computed(rounded, starts, weight_NRC.device), strict=True)
    return torch.cat(byte_parts), torch.cat(value_parts)


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
