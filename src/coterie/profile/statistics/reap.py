"""How much each expert adds to the residual stream where it was chosen: REAP (2510.13999)."""

from collections.abc import Mapping

from torch import Tensor

from coterie.profile.observation import Observation


def measure(observation: Observation) -> Mapping[str, Tensor]:
    """Return ``reap`` (E,): the sum of g_te |f_e(x_t)| over the tokens that chose e.

    REAP's score is this divided by ``usage``: the mean over routed tokens.
    """
    return {"reap": observation.sum_by_expert(observation.weight_TK.double() * observation.norm_TK.double())}
