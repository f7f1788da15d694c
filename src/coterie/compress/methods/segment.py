"""Segment: cut every expert into parts, keep the parts that the loss needs most, however many of each expert they are.

An expert is a sum over its hidden neurons, so it may be cut into c experts of a c-th of its width that are chosen
together: each gets a copy of its router row, and a token chooses c times as many. Routing weights that are normalised
become c times smaller, which the down projections make up for. DeepSeekMoE (2401.06066) has such small experts from the
start; here they let a plain checkpoint, whose experts all have one width, drop much of one and little of another.

The neurons of an expert are ranked by a score of `coterie.compress.methods.slim`; its first part holds the best, and so
on. The parts with the largest sums of scores in a layer stay. Then

- parts of one expert would tie in the router, so that chance would decide which of them a token leaves out. A direction
  v with v.x near 1 for every token x, found by least squares, takes the place of the bias that most routers lack: the
  row of part j is moved by -j * d * v, with d a share of the logits' standard deviation: lesser parts come after.
- what a part weighs now is asked from the family's own router on the sample: its down projection is multiplied by the
  factor with which it comes nearest to what its expert weighed (least squares over the tokens that choose it).

No published method.

Legend: E experts of the original, M parts that stay, c parts of each expert, F expert width, W = F / c, D model width,
T tokens, K experts chosen of the original, k parts chosen.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from coterie.compress.layer_plan import ExpertPlan, LayerPlan
from coterie.compress.methods.select import slice_router, top_experts
from coterie.compress.methods.slim import RANKINGS, SCORES, ranked_neurons, slim, take_neurons
from coterie.compress.methods.slim import needs as needs_of_score
from coterie.compress.state import LayerState, Measured
from coterie.model.arch.experts import Experts
from coterie.model.arch.layers import MoELayer

#: How long it takes, in times of running the token sample through all experts.
SAMPLE_RUNS = 0.0

#: How far the logits of two parts of one expert are moved apart, in standard deviations of the layer's logits.
GAP = 0.05

#: Ridge of the least squares for the direction that all tokens share, relative to the mean square of an input.
RIDGE = 1e-3


def needs(*, score: str, parts: int) -> tuple[str, ...]:
    """Return the statistics that a score reads; raises UnknownName."""
    return needs_of_score(score)


def segment(state: LayerState, plan: LayerPlan, *, score: str, parts: int) -> LayerState:
    """Keep the parts of experts that the plan names; where it names none, decide here.

    Where `plan.top_k` is None experts are not cut: they become narrower, or fewer, whichever the plan says.

    Args:
        state: the layer; no pass before may have changed its experts.
        plan: what it becomes.
        score: name of a score of `coterie.compress.methods.slim`.
        parts: c at most; the allocator has chosen (`coterie.compress.allocators.parts`).

    Raises:
        UnknownName: no such score.
    """
    needs(score=score, parts=parts)
    if plan.top_k is None and plan.num_experts == state.experts.num_experts:
        return slim(state, plan, score=score)
    experts, width = state.experts, plan.width or state.experts.width
    scores_EF = SCORES[score][0](state.statistics, state.original.down_EDF)
    neurons_PW = ranked_neurons(experts, scores_EF).reshape(-1, width).sort(dim=1).values
    owner_P = torch.arange(len(neurons_PW)) // (experts.width // width)
    sums_P = scores_EF[owner_P].gather(1, neurons_PW).sum(1)
    if plan.experts is None:
        kept_M = top_experts(sums_P, plan.num_experts, state.layer.num_groups)
    else:
        cut = experts.width // width
        kept_M = torch.tensor([each.sources[0] * cut + (each.part or 0) for each in plan.experts])
    owner_M = owner_P[kept_M]
    segments = take_neurons(experts.select(owner_M), neurons_PW[kept_M])
    count_M = torch.bincount(owner_M, minlength=experts.num_experts)[owner_M]
    if segments.down_bias_ED is not None:
        segments = replace(segments, down_bias_ED=segments.down_bias_ED / count_M[:, None])
    first_M = torch.searchsorted(owner_M, owner_M)
    router, gap = _rows(state, owner_M, torch.arange(len(owner_M)) - first_M)
    factor_M = _factors(state, router, owner_M)
    map_E = torch.full_like(state.expert_map_E, -1)
    map_E[owner_M] = first_M
    total = float(sums_P.sum())
    note = {
        "score": score,
        "share_of_score": float(sums_P[kept_M].sum()) / total if total else 1.0,
        "parts_by_expert": torch.bincount(owner_M, minlength=experts.num_experts).tolist(),
        "gap": gap,
        "factor": float(factor_M.mean()),
    }
    return replace(
        state,
        experts=_scaled(segments, factor_M),
        router=router,
        expert_map_E=map_E,
        centres_M=owner_M,
        notes={**state.notes, "segment": note},
    )


def decide(layer: MoELayer, plan: LayerPlan, measured: Measured, *, score: str, parts: int) -> LayerPlan:
    """Name the `plan.num_experts` parts of width `plan.width` with the highest sums of scores.

    Nothing is decided where experts are only made narrower, or where a score reads weights. With router groups, each
    group keeps an equal share.
    """
    if score not in RANKINGS or (plan.top_k is None and plan.num_experts == layer.num_experts):
        return plan
    scores_EF, width = RANKINGS[score](measured.statistics), plan.width or layer.width
    cut = layer.width // width
    # Neurons of one score may change places among themselves: a part's sum does not depend on it.
    neurons_PW = scores_EF.argsort(dim=1, descending=True, stable=True).reshape(-1, width).sort(dim=1).values
    owner_P = torch.arange(len(neurons_PW)) // cut
    sums_P = scores_EF[owner_P].gather(1, neurons_PW).sum(1)
    places = top_experts(sums_P, plan.num_experts, layer.num_groups).tolist()
    uncut = cut == 1
    experts = tuple(ExpertPlan(sources=(place // cut,), part=None if uncut else place % cut) for place in places)
    return replace(plan, experts=experts)


def _rows(state: LayerState, owner_M: Tensor, rank_M: Tensor) -> tuple[dict[str, Tensor], float]:
    """Return the router's tensors with a row for each part, lesser parts behind, and how far the logits are apart."""
    inputs_TD = state.sample.router_inputs_TD.double()
    gap = 0.0
    rows = slice_router(state, owner_M)
    for name, axis in state.layer.router_tensors:
        tensor, chosen = state.router[name], rows[name]
        if tensor.ndim == 2 and tensor.shape[1 - axis] == inputs_TD.shape[1]:
            experts_ED = tensor.movedim(axis, 0)[: state.layer.num_experts]
            gap = GAP * float((inputs_TD @ experts_ED.double().T).std())
            down_D = _shared_direction(inputs_TD) * gap
            moved = torch.zeros_like(chosen.movedim(axis, 0))
            moved[: len(owner_M)] = (rank_M[:, None] * down_D).to(moved.dtype)
            rows[name] = chosen - moved.movedim(0, axis)
    return rows, gap


def _shared_direction(inputs_TD: Tensor) -> Tensor:
    """Return v (D,) with v.x as near to 1 as can be for all tokens, by least squares."""
    moments_DD = inputs_TD.T @ inputs_TD
    ridge = RIDGE * len(inputs_TD) * float(inputs_TD.square().mean())
    eye_DD = torch.eye(len(moments_DD), dtype=moments_DD.dtype)
    direction_D: Tensor = torch.linalg.solve(moments_DD + max(ridge, 1e-30) * eye_DD, inputs_TD.sum(0))
    return direction_D


def _factors(state: LayerState, router: dict[str, Tensor], owner_M: Tensor) -> Tensor:
    """Return for each part the factor with which its routing weight comes nearest to that of its expert before, (M,).

    Parts that no token of the sample chooses get the mean factor of the others.
    """
    sample, count = state.sample, len(owner_M)
    index_TK, weight_TK = state.route(router, sample.router_inputs_TD)
    before_TE = torch.zeros(len(index_TK), state.layer.num_experts + 1, dtype=torch.float64)
    before_TE.scatter_add_(1, sample.index_TK.clamp(max=state.layer.num_experts), sample.weight_TK.double())
    owners_M = torch.cat((owner_M, owner_M.new_tensor([state.layer.num_experts])))  # the last one is "no expert"
    index_TK = index_TK.clamp(max=count)
    owner_weight_TK, weight_TK = before_TE.gather(1, owners_M[index_TK]), weight_TK.double()
    both_M, own_M = torch.zeros(2, count + 1, dtype=torch.float64).unbind()
    both_M.index_add_(0, index_TK.flatten(), (owner_weight_TK * weight_TK).flatten())
    own_M.index_add_(0, index_TK.flatten(), weight_TK.square().flatten())
    both_M, own_M = both_M[:count], own_M[:count]
    mean = float(both_M.sum() / own_M.sum()) if float(own_M.sum()) else 1.0
    return torch.where(own_M > 0, both_M / own_M.clamp(min=1e-300), mean)


def _scaled(experts: Experts, factor_M: Tensor) -> Experts:
    """Return experts with their outputs multiplied, each by its factor."""
    factor = factor_M.float()
    bias_MD = experts.down_bias_ED
    return replace(
        experts,
        down_EDF=experts.down_EDF * factor[:, None, None],
        down_bias_ED=None if bias_MD is None else bias_MD * factor[:, None],
    )
