"""How much routing weight each expert received; REAP's `weighted_expert_frequency_sum` (2510.13999)."""

from torch import Tensor

from coterie.profile.observation import Observation


def gate_mass(observation: Observation) -> Tensor:
    """Return the sum of g_te over the tokens that chose e, (E,)."""
    return observation.sum_by_expert(observation.weight_TK)
