"""Prune by leaving each expert out: how much the layer's output changes when the tokens of an expert go elsewhere.

For every expert e, the tokens that choose it are routed once more without it, by the family's own router, and the
score of e is the mean squared change of the routed output. So do the expert-removal hooks of NVIDIA's ModelOpt. Tokens
that did not choose e count as unchanged, so an expert of many tokens scores higher.

Legend: E experts, D model width, T tokens, K chosen experts, P pairs of a token and an expert that it does without.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.select import best_experts, keep_experts, planned_experts, slice_router
from coterie.compress.state import LayerState
from coterie.errors import ArchitectureMismatch
from coterie.progress import advance

#: Largest number of elements of the changes (P, D) that are held at a time (128 MiB in float32).
CHANGE_ELEMENTS = 2**25

#: What takes a router's score out of reach of all others: minus this as a bias, a row times it.
_FAR = 1e8


def needs() -> tuple[str, ...]:
    """The token sample is enough."""
    return ()


def leave_one_out(state: LayerState, plan: LayerPlan) -> LayerState:
    """Keep the `plan.num_experts` experts whose absence changes the layer's output on the sample most.

    Experts that the plan names stay instead.

    Raises:
        ArchitectureMismatch: the router cannot be run by itself, or no way is found to close it for one expert.
    """
    num_experts = state.layer.num_experts
    if plan.experts is not None:
        return keep_experts(state, planned_experts(plan), "leave-one-out", {})
    if plan.num_experts == num_experts:
        return keep_experts(state, torch.arange(num_experts), "leave-one-out", {})
    values_E = absence_errors(state)
    kept_M = best_experts(state, values_E, plan.num_experts)
    return keep_experts(state, kept_M, "leave-one-out", {"score": values_E.tolist()})


def absence_errors(state: LayerState) -> Tensor:
    """Return for each expert the mean squared change of the routed output without it, (E,) float64.

    The mean is over all tokens of the sample and all D channels. Both outputs are computed in float32 from the experts
    and the routing of `LayerState.route`, so that rounding of what was observed does not pass for a change.
    """
    num_experts = state.layer.num_experts
    inputs_TD, block_TD = state.sample.inputs_TD.float(), state.sample.router_inputs_TD.float()
    index_TK, weight_TK = state.route(state.router, block_TD)
    closed = _Closed(state)
    # The pairs, sorted by token, so that a chunk of pairs is a chunk of tokens.
    token_P, slot_P = (index_TK < num_experts).nonzero(as_tuple=True)
    absent_P = index_TK[token_P, slot_P]
    index_PK, weight_PK = index_TK[token_P].clone(), weight_TK[token_P].clone()
    for expert in range(num_experts):
        pairs = (absent_P == expert).nonzero().flatten()
        if len(pairs):
            index_PK[pairs], weight_PK[pairs] = closed.route(expert, block_TD[token_P[pairs]])
    squared_P = torch.empty(len(token_P), dtype=torch.float64)
    chunk = max(1, CHANGE_ELEMENTS // inputs_TD.shape[1])
    for rows in torch.split(torch.arange(len(token_P)), chunk):
        coefficient_PE = torch.zeros(len(rows), num_experts + 1)
        coefficient_PE.scatter_add_(1, index_PK[rows], weight_PK[rows])
        coefficient_PE.scatter_add_(1, index_TK[token_P[rows]], -weight_TK[token_P[rows]])
        squared_P[rows] = _squared_sums(state, coefficient_PE[:, :num_experts], token_P[rows], inputs_TD)
        advance(len(rows) / len(token_P))
    total_E = torch.zeros(num_experts, dtype=torch.float64).index_add_(0, absent_P, squared_P)
    return total_E / max(1, inputs_TD.numel())


def _squared_sums(state: LayerState, coefficient_PE: Tensor, token_P: Tensor, inputs_TD: Tensor) -> Tensor:
    """Return |sum_e c_pe f_e(x_p)|^2 for each pair, float64; each expert sees each token once."""
    total_PD = torch.zeros(len(token_P), inputs_TD.shape[1])
    for expert in range(state.layer.num_experts):
        rows = coefficient_PE[:, expert].nonzero().flatten()
        if len(rows):
            token_N, place = torch.unique(token_P[rows], return_inverse=True)
            output_ND = state.experts.output(expert, inputs_TD[token_N])
            total_PD.index_add_(0, rows, output_ND[place] * coefficient_PE[rows, expert, None])
    return total_PD.double().square().sum(1)


class _Closed:
    """The router of a layer, closed for one expert at a time."""

    def __init__(self, state: LayerState) -> None:
        self._state = state

    def route(self, expert: int, block_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return what tokens choose without `expert`: ``index_NK`` in the numbers of all E experts, ``weight_NK``."""
        state = self._state
        if state.layer.num_groups > 1:
            return self._far_away(expert, block_ND)
        num_experts = state.layer.num_experts
        rows_M = torch.cat((torch.arange(expert), torch.arange(expert + 1, num_experts)))
        index_NK, weight_NK = state.route(slice_router(state, rows_M), block_ND)
        names = torch.cat((rows_M, torch.tensor([num_experts])))  # "no expert" keeps its own
        return names[index_NK], weight_NK

    def _far_away(self, expert: int, block_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Route with all E rows, as groups must stay equal, but with one expert's score out of reach.

        Its biases go far down, and its row is multiplied by a large number, which is far down for tokens that scored it
        on one side of 0 and far up for the others; so both signs are tried, and each token takes the one that works:
        where the expert is not chosen and does not take the probability of the others.
        """
        tried = [self._state.route(router, block_ND) for router in self._far_routers(expert)]
        total_VN = torch.stack(
            [
                weight_NK.double().nan_to_num().sum(1).masked_fill((index_NK == expert).any(1), -torch.inf)
                for index_NK, weight_NK in tried
            ]
        )
        best_N = total_VN.argmax(0)
        if not (works_N := total_VN.amax(0) > 0).all():
            raise ArchitectureMismatch(
                f"{self._state.layer.block}: no change of the router's tensors keeps {int((~works_N).sum())} of "
                f"{len(works_N)} tokens from choosing expert {expert}, and with router groups of equal size one expert "
                "cannot be left out; use reap or naee"
            )
        rows_N = torch.arange(len(best_N))
        index_VNK, weight_VNK = (torch.stack(tensors) for tensors in zip(*tried, strict=True))
        return index_VNK[best_N, rows_N], weight_VNK[best_N, rows_N]

    def _far_routers(self, expert: int) -> Iterator[dict[str, Tensor]]:
        axes = dict(self._state.layer.router_tensors)
        for sign in (-1.0, 1.0):
            far = dict(self._state.router)
            for name, tensor in far.items():
                if tensor.is_floating_point():
                    far[name] = tensor.clone()
                    entry = far[name].select(axes[name], expert)
                    is_bias = tensor.numel() == tensor.shape[axes[name]]
                    entry.copy_(torch.full_like(entry, -_FAR) if is_bias else entry * sign * _FAR)
            yield far
