"""The nearest numbers, scales fitted by the mean square of each input: what llama.cpp does with an importance matrix.

Legend: N matrices, R rows (outputs), C columns (inputs), K bytes of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coterie.model.disk.encodings.ggml.rounding import round_to_nearest

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.compress.moments import Inputs
    from coterie.model.disk.encodings.ggml.block_type import Layout


def nearest(weight_NRC: Tensor, inputs: Inputs, kind: Layout) -> tuple[Tensor, Tensor]:
    """Round matrices; return their bytes (N, R, K), uint8, and their values (N, R, C), float32.

    Args:
        weight_NRC: the matrices; C is a multiple of the block.
        inputs: what comes into them; where one saw no token, all columns weigh the same.
        kind: the format.

    Raises:
        ValueError: columns that are no whole blocks.
    """
    importance_NC = inputs.hessian_NCC.diagonal(dim1=-2, dim2=-1).float()
    unseen_N = importance_NC.sum(dim=-1, keepdim=True) <= 0
    return round_to_nearest(weight_NRC, torch.where(unseen_N, 1.0, importance_NC), kind)
