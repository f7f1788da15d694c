"""Which experts are chosen together."""

from collections.abc import Mapping

import torch
from torch import Tensor

from coterie.profile.observation import Observation


def measure(observation: Observation) -> Mapping[str, Tensor]:
    """Return ``coactivation`` (E, E): tokens that chose both e and e'; the diagonal is the usage."""
    num_experts = observation.layer.num_experts
    index_TK = observation.index_TK.clamp(max=num_experts)
    chosen_TE = torch.zeros(len(index_TK), num_experts + 1, device=index_TK.device)
    chosen_TE = chosen_TE.scatter_(1, index_TK, 1.0)[:, :num_experts]
    # float32 counts exactly up to 2**24 tokens, and a batch is far smaller.
    return {"coactivation": (chosen_TE.T @ chosen_TE).double()}
