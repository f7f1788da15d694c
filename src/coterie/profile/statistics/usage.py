"""How many tokens chose each expert."""

from collections.abc import Mapping

import torch
from torch import Tensor

from coterie.profile.observation import Observation


def measure(observation: Observation) -> Mapping[str, Tensor]:
    """Return ``usage`` (E,): n_e, and ``tokens`` (): T."""
    index_TK = observation.index_TK
    return {
        "usage": observation.sum_by_expert(torch.ones_like(index_TK, dtype=torch.float64)),
        "tokens": torch.tensor(float(len(index_TK)), dtype=torch.float64, device=index_TK.device),
    }
