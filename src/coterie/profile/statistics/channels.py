"""How much each hidden neuron of each expert does where the expert is chosen: HEAPr (2509.22299) and its relatives.

Neuron k of expert e is row k of gate and up and column w_k of the down projection: an atomic expert. To the output of
the layer for token t it adds g_te h_k(x_t) w_k, and d_t is the gradient of the loss with respect to that output.

Legend: E experts, F expert width, D model width, N tokens that chose one expert.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from coterie.profile.observation import Observation

#: What is measured in a backward pass only.
GRADIENT_STATISTICS = ("channel_gradient", "channel_fisher", "gradient_energy")

_CHUNK = 1024  # tokens


def needs_gradients(statistics: Iterable[str]) -> bool:
    """Tell whether one of these statistics is measured in a backward pass only."""
    return not set(GRADIENT_STATISTICS).isdisjoint(statistics)


def measure(observation: Observation) -> Mapping[str, Tensor]:
    """Return sums over tokens for every neuron, all (E, F) float64.

    ``hidden_square``: of h_k(x_t)^2 over the tokens that chose e. ``gated_hidden_square``: of (g_te h_k(x_t))^2.

    Where there are gradients, also ``channel_gradient``: of (g_te d_t . w_k)^2 over the same tokens, which is
    n_e w_k^T G_e w_k with HEAPr's G_e, the second moment of the gradient with respect to the expert's own output; the
    D x D matrix is never needed. ``channel_fisher``: of (g_te h_k(x_t) d_t . w_k)^2. ``gradient_energy``: of
    (d_t . w_k)^2 over all tokens, estimated from every `Observation.thin`-th one.
    """
    squares = {
        "hidden_square": observation.hidden_square_EF,
        "gated_hidden_square": observation.gated_hidden_square_EF,
    }
    if observation.gradient_TD is None:
        return squares
    experts, gradient_TD = observation.experts, observation.gradient_TD.float()
    found = {name: torch.zeros_like(observation.hidden_square_EF) for name in GRADIENT_STATISTICS}
    for expert, token_N, weight_N in observation.chosen():
        slope_NF = weight_N.float()[:, None] * (gradient_TD[token_N] @ experts.down_EDF[expert].float())
        hidden_NF = experts.hidden(expert, observation.hidden_TD[token_N]).float()
        found["channel_gradient"][expert] = slope_NF.square().sum(0, dtype=torch.float64).cpu()
        found["channel_fisher"][expert] = (slope_NF * hidden_NF).square().sum(0, dtype=torch.float64).cpu()
    few_TD = gradient_TD[:: observation.thin]
    scale = len(gradient_TD) / max(1, len(few_TD))
    for expert in range(experts.num_experts):
        for chunk_TD in torch.split(few_TD, _CHUNK):
            slope_TF = chunk_TD @ experts.down_EDF[expert].float()
            found["gradient_energy"][expert] += slope_TF.square().sum(0, dtype=torch.float64).cpu() * scale
    return squares | found
