"""Permute the hidden neurons of each expert so that they match those of its cluster's centre (M-SMoE, 2310.01334).

An expert computes the same whatever the order of its F hidden neurons (rows of gate and up, columns of down). Averaging
experts whose neurons stand in different orders mixes unrelated neurons, so the order of every member is chosen first,
by linear assignment on the inner products of the neurons' weights.

Legend: F expert width, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coterie.compress.state import LayerSize, LayerState
from coterie.model.layers import Experts


def needs() -> tuple[str, ...]:
    """Alignment reads weights only."""
    return ()


def align(state: LayerState, size: LayerSize) -> LayerState:
    """Permute each expert's hidden neurons to match its centre; what the layer computes does not change."""
    assert state.clusters_E is not None, "align comes after cluster"
    assert state.centres_M is not None
    experts = state.experts
    order_EF = torch.arange(experts.width).expand(experts.num_experts, -1).clone()
    for expert, cluster in enumerate(state.clusters_E.tolist()):
        centre = int(state.centres_M[cluster])
        if expert != centre:
            order_EF[expert] = match_neurons(experts, centre, expert)
    return replace(state, experts=permute_neurons(experts, order_EF))


def match_neurons(experts: Experts, centre: int, member: int) -> Tensor:
    """Return the order of the member's neurons, (F,), that maximises their inner products with the centre's."""
    similarity_FF = experts.up_EFD[centre].double() @ experts.up_EFD[member].double().T
    similarity_FF += experts.down_EDF[centre].double().T @ experts.down_EDF[member].double()
    if experts.gate_EFD is not None:
        similarity_FF += experts.gate_EFD[centre].double() @ experts.gate_EFD[member].double().T
    _, columns = linear_sum_assignment(similarity_FF.numpy(), maximize=True)
    return torch.from_numpy(columns)


def permute_neurons(experts: Experts, order_EF: Tensor) -> Experts:
    """Reorder the hidden neurons of every expert: neuron f of expert e becomes its old neuron ``order_EF[e, f]``."""
    rows_E1 = torch.arange(experts.num_experts)[:, None]
    return replace(
        experts,
        gate_EFD=None if experts.gate_EFD is None else experts.gate_EFD[rows_E1, order_EF],
        up_EFD=experts.up_EFD[rows_E1, order_EF],
        down_EDF=experts.down_EDF.transpose(1, 2)[rows_E1, order_EF].transpose(1, 2),
        gate_bias_EF=None if experts.gate_bias_EF is None else experts.gate_bias_EF[rows_E1, order_EF],
        up_bias_EF=None if experts.up_bias_EF is None else experts.up_bias_EF[rows_E1, order_EF],
    )
