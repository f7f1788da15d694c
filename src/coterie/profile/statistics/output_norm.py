"""How large each expert's outputs are where it was chosen: EAN and, squared, MSAN (2606.15716)."""

from torch import Tensor

from coterie.profile.observation import Observation


def output_norm(observation: Observation) -> Tensor:
    """Return the sum of |f_e(x_t)| over the tokens that chose e, (E,)."""
    assert observation.norm_TK is not None
    return observation.sum_by_expert(observation.norm_TK.double())


def output_square(observation: Observation) -> Tensor:
    """Return the sum of |f_e(x_t)|^2 over the tokens that chose e, (E,)."""
    assert observation.norm_TK is not None
    return observation.sum_by_expert(observation.norm_TK.double().square())
