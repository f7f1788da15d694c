"""How many tokens there were, and how many of them chose each expert."""

import torch
from torch import Tensor

from coterie.profile.observation import Observation


def tokens(observation: Observation) -> Tensor:
    """Return T, the number of tokens, ()."""
    index_TK = observation.index_TK
    return torch.tensor(float(len(index_TK)), dtype=torch.float64, device=index_TK.device)


def usage(observation: Observation) -> Tensor:
    """Return n_e, the number of tokens that chose e, (E,)."""
    return observation.sum_by_expert(torch.ones_like(observation.index_TK, dtype=torch.float64))
