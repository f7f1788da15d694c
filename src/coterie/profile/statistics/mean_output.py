"""What each expert outputs on any token, routing ignored: the features of HC-SMoE (2410.08589)."""

import torch
from torch import Tensor

from coterie.profile.observation import Observation

_CHUNK = 1024  # tokens


def mean_output(observation: Observation) -> Tensor:
    """Return the sum of f_e(x_t) over all tokens, without routing weights, (E, D).

    The mean over tokens is this divided by ``tokens``. All experts on all tokens would cost several times the forward
    pass, which computes K of E: of a long text the sum is estimated from every `Observation.thin`-th token. The down
    projection is linear, so it is applied once to the sum of the activations unless the family normalises each
    expert's output.
    """
    experts, hidden_TD = observation.experts, observation.hidden_TD[:: observation.thin]
    scale = len(observation.hidden_TD) / max(1, len(hidden_TD))
    start = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
    # Chunks that stay in the processor's cache: the activations of all experts are the largest thing measured here.
    chunks = torch.split(hidden_TD, _CHUNK)
    rows = []
    for expert in range(experts.num_experts):
        if experts.finish is not None:
            rows.append(sum((experts.output(expert, x_TD).sum(0, dtype=torch.float64) for x_TD in chunks), start))
            continue
        sum_F = sum((experts.hidden(expert, x_TD).sum(0, dtype=torch.float64) for x_TD in chunks), start)
        row_D = experts.down_EDF[expert].double() @ sum_F
        if experts.down_bias_ED is not None:
            row_D = row_D + len(hidden_TD) * experts.down_bias_ED[expert].double()
        rows.append(row_D)
    return torch.stack(rows) * scale
