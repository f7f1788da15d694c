"""Slim by activations: keep in each expert the channels whose activations are largest, drop the others.

MoE-Slimming (2606.18304). Channel k of expert e is its hidden neuron k. Its score is the mean of three norms over the
tokens that chose e: of what the up projection puts out there, of what the gate puts out, and of what the down
projection receives. With as many channels for every expert, those with the highest scores cover the largest share of
the sum of scores, which is what the paper maximises; it shares channels out among layers and experts as well, which no
stock class loads.

Legend: E experts of the original, F expert width, N tokens of one expert, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.slim import keep_neurons
from coterie.compress.state import LayerState
from coterie.model.arch.experts import Experts
from coterie.profile.profile import Sample


def needs() -> tuple[str, ...]:
    """Return the statistics that it reads: none, the token sample is enough."""
    return ()


def slim_activations(state: LayerState, plan: LayerPlan) -> LayerState:
    """Keep the `plan.width` channels of each expert with the largest activations, in their original order.

    A channel whose column of down is zero, so that nothing comes out of it, scores 0 whatever goes in. Of channels with
    the same score, as in an expert that no token chose, those with larger weights stay.

    Raises:
        Infeasible: an earlier pass merged experts, whose channels are not those of the original.
    """
    idle_EF = (state.original.down_EDF == 0).all(dim=1)
    scores_EF = activation_norms(state.original, state.sample).masked_fill(idle_EF, 0.0)
    return keep_neurons(state, plan, scores_EF, score="slim-activations")


def activation_norms(experts: Experts, sample: Sample) -> Tensor:
    """Return the mean norm (E, F), float64, of up, gate and hidden activations; without a gate, of the other two.

    Norms are over the tokens of the sample that chose the expert, all alike; 0 for an expert that none chose.
    """
    norms_EF = torch.zeros(experts.num_experts, experts.width, dtype=torch.float64)
    for expert in range(experts.num_experts):
        token_N = (sample.index_TK == expert).any(dim=1).nonzero().flatten()
        if not len(token_N):
            continue
        input_ND = sample.inputs_TD[token_N].float()
        activations = [experts.hidden(expert, input_ND)]
        for weight_EFD, bias_EF in (
            (experts.up_EFD, experts.up_bias_EF),
            (experts.gate_EFD, experts.gate_bias_EF),
        ):
            if weight_EFD is not None:
                activations.append(linear(input_ND, weight_EFD[expert], None if bias_EF is None else bias_EF[expert]))
        norms = [torch.linalg.vector_norm(each_NF, dim=0, dtype=torch.float64) for each_NF in activations]
        norms_EF[expert] = torch.stack(norms).mean(dim=0)
    return norms_EF
