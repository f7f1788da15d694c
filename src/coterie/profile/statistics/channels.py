"""How much each hidden neuron of each expert does where the expert is chosen: HEAPr (2509.22299) and its relatives.

Neuron k of expert e is row k of gate and up and column w_k of the down projection: an atomic expert. To the output of
the layer for token t it adds g_te h_k(x_t) w_k, and d_t is the gradient of the loss with respect to that output.
Gradients are there in a backward pass only; without it these values are None.

Legend: E experts, F expert width, D model width, N tokens that chose one expert.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from coterie.profile.observation import Observation

_CHUNK = 1024  # tokens


def hidden_square(observation: Observation) -> Tensor:
    """Return the sum of h_k(x_t)^2 over the tokens that chose e, (E, F)."""
    assert observation.hidden_square_EF is not None
    return observation.hidden_square_EF


def gated_hidden_square(observation: Observation) -> Tensor:
    """Return the sum of (g_te h_k(x_t))^2 over the tokens that chose e, (E, F)."""
    assert observation.gated_hidden_square_EF is not None
    return observation.gated_hidden_square_EF


def channel_gradient(observation: Observation) -> Tensor | None:
    """Return the sum of (g_te d_t . w_k)^2 over the tokens that chose e, (E, F).

    That is n_e w_k^T G_e w_k with HEAPr's G_e, the second moment of the gradient with respect to the expert's own
    output; the D x D matrix is never needed.
    """
    if observation.gradient_TD is None:
        return None
    total_EF = _zeros(observation)
    for expert, _, slope_NF in _slopes(observation, observation.gradient_TD):
        total_EF[expert] = slope_NF.square().sum(0, dtype=torch.float64).cpu()
    return total_EF


def channel_fisher(observation: Observation) -> Tensor | None:
    """Return the sum of (g_te h_k(x_t) d_t . w_k)^2 over the tokens that chose e, (E, F)."""
    if observation.gradient_TD is None:
        return None
    total_EF = _zeros(observation)
    for expert, token_N, slope_NF in _slopes(observation, observation.gradient_TD):
        hidden_NF = observation.experts.hidden(expert, observation.hidden_TD[token_N]).float()
        total_EF[expert] = (slope_NF * hidden_NF).square().sum(0, dtype=torch.float64).cpu()
    return total_EF


def gradient_energy(observation: Observation) -> Tensor | None:
    """Return the sum of (d_t . w_k)^2 over all tokens, estimated from every `Observation.thin`-th one, (E, F)."""
    if observation.gradient_TD is None:
        return None
    down_EDF, gradient_TD = observation.experts.down_EDF, observation.gradient_TD.float()
    few_TD = gradient_TD[:: observation.thin]
    scale = len(gradient_TD) / max(1, len(few_TD))
    total_EF = _zeros(observation)
    for expert in range(observation.experts.num_experts):
        for chunk_TD in torch.split(few_TD, _CHUNK):
            slope_TF = chunk_TD @ down_EDF[expert].float()
            total_EF[expert] += slope_TF.square().sum(0, dtype=torch.float64).cpu() * scale
    return total_EF


def _slopes(observation: Observation, gradient_TD: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (expert, token_N, g_te d_t . w_k as (N, F)) for every chosen expert."""
    gradient_TD = gradient_TD.float()
    for expert, token_N, weight_N in observation.chosen():
        down_DF = observation.experts.down_EDF[expert].float()
        yield expert, token_N, weight_N.float()[:, None] * (gradient_TD[token_N] @ down_DF)


def _zeros(observation: Observation) -> Tensor:
    return torch.zeros(observation.experts.num_experts, observation.experts.width, dtype=torch.float64)
