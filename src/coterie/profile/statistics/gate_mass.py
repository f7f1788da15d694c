"""How much routing weight each expert received; REAP's `weighted_expert_frequency_sum` (2510.13999)."""

from collections.abc import Mapping

from torch import Tensor

from coterie.profile.observation import Observation


def measure(observation: Observation) -> Mapping[str, Tensor]:
    """Return ``gate_mass`` (E,): the sum of g_te over the tokens that chose e."""
    return {"gate_mass": observation.sum_by_expert(observation.weight_TK)}
