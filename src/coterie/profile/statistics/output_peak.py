"""The largest number that each expert ever puts out: what super experts are known by (2507.23279, 2510.13999)."""

import torch
from torch import Tensor

from coterie.profile.observation import Observation


def output_peak(observation: Observation) -> Tensor:
    """Return the largest |f_e(x_t)_d| over the tokens that chose e and over d, (E,); a maximum."""
    assert observation.peak_TK is not None
    num_experts = observation.layer.num_experts
    peak = torch.zeros(num_experts + 1, dtype=torch.float64, device=observation.peak_TK.device)
    index = observation.index_TK.clamp(max=num_experts).reshape(-1)
    peak.scatter_reduce_(0, index, observation.peak_TK.double().reshape(-1), "amax")
    return peak[:num_experts]
