"""Second moments of what each expert's matrices receive: the Hessian of GPTQ (2210.17323) without its factor of 2.

These are sums over all text without a domain axis, in float32, added in place where the layer is computed: an expert of
width D takes 4 D^2 bytes, and domains first in float64 would take many times the layer itself.

Legend: E experts, F expert width, D model width, N tokens that chose one expert.
"""

import torch
from torch import Tensor

from coterie.profile.observation import Observation

_CHUNK = 1024  # tokens


def hessian_input(observation: Observation, total_EDD: Tensor) -> None:
    """Add the sum of x_t x_t^T over the tokens that chose e: what gate and up projection receive."""
    for expert, token_N, _ in observation.chosen():
        for some_N in torch.split(token_N, _CHUNK):
            input_ND = observation.hidden_TD[some_N].float()
            total_EDD[expert].addmm_(input_ND.T, input_ND)


def hessian_hidden(observation: Observation, total_EFF: Tensor) -> None:
    """Add the sum of g_te^2 h_e(x_t) h_e(x_t)^T over the tokens that chose e: what the down projection receives."""
    for expert, token_N, weight_N in observation.chosen():
        for some_N, gate_N in zip(torch.split(token_N, _CHUNK), torch.split(weight_N, _CHUNK), strict=True):
            hidden_NF = observation.experts.hidden(expert, observation.hidden_TD[some_N]).float()
            gated_NF = hidden_NF * gate_N.float()[:, None]
            total_EFF[expert].addmm_(gated_NF.T, gated_NF)
