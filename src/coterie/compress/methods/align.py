"""Permute the hidden neurons of each expert so that they match those of its cluster's centre.

An expert computes the same whatever the order of its F hidden neurons (rows of gate and up, columns of down). Averaging
experts whose neurons stand in different orders mixes unrelated neurons, so the order of every member is chosen first,
by linear assignment. M-SMoE (2310.01334) maximises the inner products of the neurons' weights; REAM (2604.04356)
minimises distances of both their weights and their activations, each brought to unit length.

Legend: F expert width, D model width, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.state import LayerState
from coterie.errors import UnknownName
from coterie.model.arch.experts import Experts

#: What neurons are matched by.
MATCHES = ("weights", "weights+activations")

_CHUNK = 1024  # tokens


def needs(by: str = "weights") -> tuple[str, ...]:
    """Alignment reads weights, and the token sample; raises UnknownName."""
    if by not in MATCHES:
        raise UnknownName("way to match neurons", by, MATCHES)
    return ()


def align(state: LayerState, plan: LayerPlan, *, by: str = "weights") -> LayerState:
    """Permute each expert's hidden neurons to match its centre; what the layer computes does not change.

    Args:
        state: a layer with clusters.
        plan: not read.
        by: ``weights`` (inner products, M-SMoE) or ``weights+activations`` (distances between unit vectors, REAM).

    Raises:
        UnknownName: no such way to match.
    """
    needs(by)
    assert state.clusters_E is not None, "align comes after cluster"
    assert state.centres_M is not None
    experts, inputs_TD = state.experts, state.sample.inputs_TD
    order_EF = torch.arange(experts.width).expand(experts.num_experts, -1).clone()
    for expert, cluster in enumerate(state.clusters_E.tolist()):
        centre = int(state.centres_M[cluster])
        if expert == centre:
            continue
        if by == "weights":
            order_EF[expert] = match_neurons(experts, centre, expert)
        else:
            order_EF[expert] = match_neurons_and_activations(experts, centre, expert, inputs_TD)
    return replace(state, experts=permute_neurons(experts, order_EF))


def match_neurons(experts: Experts, centre: int, member: int) -> Tensor:
    """Return the order of the member's neurons, (F,), that maximises their inner products with the centre's."""
    _, columns = linear_sum_assignment(_weight_products(experts, centre, member).numpy(), maximize=True)
    return torch.from_numpy(columns)


def match_neurons_and_activations(experts: Experts, centre: int, member: int, inputs_TD: Tensor) -> Tensor:
    """Return the order of the member's neurons, (F,), that minimises their distances to the centre's.

    The distance of two neurons is that of their weights (row of gate, row of up, column of down) plus that of their
    activations on `inputs_TD`, all tokens, chosen or not; each vector has unit length.
    """
    square_F = [_weight_products(experts, expert, expert).diagonal() for expert in (centre, member)]
    cost_FF = _unit_distance(_weight_products(experts, centre, member), *square_F)
    product_FF = torch.zeros_like(cost_FF)
    square_F = [torch.zeros(experts.width, dtype=torch.float64) for _ in range(2)]
    for x_TD in torch.split(inputs_TD.float(), _CHUNK):
        ours_TF, theirs_TF = (experts.hidden(expert, x_TD).double() for expert in (centre, member))
        product_FF += ours_TF.T @ theirs_TF
        square_F[0] += ours_TF.square().sum(0)
        square_F[1] += theirs_TF.square().sum(0)
    cost_FF += _unit_distance(product_FF, *square_F)
    _, columns = linear_sum_assignment(cost_FF.numpy())
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


def _weight_products(experts: Experts, centre: int, member: int) -> Tensor:
    product_FF = experts.up_EFD[centre].double() @ experts.up_EFD[member].double().T
    product_FF += experts.down_EDF[centre].double().T @ experts.down_EDF[member].double()
    if experts.gate_EFD is not None:
        product_FF += experts.gate_EFD[centre].double() @ experts.gate_EFD[member].double().T
    return product_FF


def _unit_distance(product_FF: Tensor, ours_F: Tensor, theirs_F: Tensor) -> Tensor:
    """Return distances of vectors brought to unit length, from inner products and squared lengths; zero stays zero."""
    cosine_FF = product_FF / (ours_F[:, None] * theirs_F[None, :]).sqrt().clamp(min=1e-300)
    square_FF = (ours_F > 0).double()[:, None] + (theirs_F > 0).double()[None, :] - 2 * cosine_FF
    return square_FF.clamp(min=0).sqrt()
