"""How much each expert adds to the residual stream where it was chosen: REAP (2510.13999)."""

from torch import Tensor

from coterie.profile.observation import Observation


def reap(observation: Observation) -> Tensor:
    """Return the sum of g_te |f_e(x_t)| over the tokens that chose e, (E,).

    REAP's score is this divided by ``usage``: the mean over routed tokens.
    """
    assert observation.norm_TK is not None
    return observation.sum_by_expert(observation.weight_TK.double() * observation.norm_TK.double())
