"""How much each expert adds, on tokens that the routed experts turn: EASY-EP (2504.06792)."""

import torch
from torch import Tensor

from coterie.profile.observation import TOLERANCE, Observation


def easy_ep(observation: Observation) -> Tensor | None:
    """Return the sum of g_te |f_e(x_t)| max(1 - cos(h_t, h_t + y_t), 0) over the tokens that chose e, (E,).

    h_t is the residual stream before the block and y_t what its routed experts add to it, shared experts left out.
    None where that is not known: where the stream before or behind the block was not seen, or where the block's
    output is not what is added to the stream (up to one factor for all tokens, such as a residual multiplier).
    """
    factor = _residual_factor(observation)
    if factor is None or observation.residual_TD is None:
        return None
    before_TD = observation.residual_TD.double()
    after_TD = before_TD + factor * observation.output_TD.double()
    turn_T = (1 - torch.nn.functional.cosine_similarity(before_TD, after_TD, dim=-1)).clamp(min=0)
    assert observation.norm_TK is not None
    added_TK = observation.weight_TK.double() * observation.norm_TK.double()
    return observation.sum_by_expert(added_TK * turn_T[:, None])


def _residual_factor(observation: Observation) -> float | None:
    """Return m where the stream behind the block is the one before it plus m times the block's output, else None."""
    seen = (observation.residual_TD, observation.block_output_TD, observation.after_TD)
    residual_TD, block_TD, after_TD = (None if each is None else each.double() for each in seen)
    if residual_TD is None or block_TD is None or after_TD is None or block_TD.shape != after_TD.shape:
        return None
    added_TD = after_TD - residual_TD
    square = float(block_TD.square().sum())
    factor = float((added_TD * block_TD).sum()) / square if square else 1.0
    error_T = (added_TD - factor * block_TD).norm(dim=-1) / after_TD.norm(dim=-1).clamp(min=1e-300)
    limit = TOLERANCE.get(observation.output_TD.dtype, TOLERANCE[torch.float32])
    return None if len(error_T) and float(error_T.mean()) > limit else factor
