"""Prune: keep the experts with the highest score, drop the others and their router rows.

The scores are in `coterie.compress.methods.scores`.

Legend: E experts of the original, M kept, G domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from coterie.compress.layer_plan import ExpertPlan, LayerPlan
from coterie.compress.methods.scores import score_experts, score_needs
from coterie.compress.state import LayerState, Measured
from coterie.model.arch.layers import MoELayer

#: How long it takes, in times of running the token sample through all experts.
SAMPLE_RUNS = 0.0


def needs(score: str, *, patterns: bool = False) -> tuple[str, ...]:
    """Return the statistics that a score reads; raises UnknownName."""
    return score_needs(score)


def select(state: LayerState, plan: LayerPlan, *, score: str, patterns: bool = False) -> LayerState:
    """Keep the experts that the plan names, in their original order; where it names none, decide here.

    Args:
        state: the layer.
        plan: what it becomes.
        score: name of a score.
        patterns: also note which experts each domain by itself would keep.

    Raises:
        UnknownName: no such score.
    """
    needs(score)
    values_E = score_experts(score, state.statistics, state.by_domain)
    if plan.experts is None:
        if state.protected_E is not None:
            plan = replace(plan, protected=tuple(state.protected_E.nonzero().flatten().tolist()))
        plan = decide(state.layer, plan, Measured(statistics=state.statistics, by_domain=state.by_domain), score=score)
    kept_M = planned_experts(plan)
    note: dict[str, object] = {"score": values_E.tolist()}
    if patterns:
        groups = state.layer.num_groups
        note["kept_by_domain"] = [
            top_experts(values_E, plan.num_experts, groups).tolist()
            for values_E in score_by_domain(score, state.by_domain)
        ]
    return keep_experts(state, kept_M, "select", note)


def decide(layer: MoELayer, plan: LayerPlan, measured: Measured, *, score: str, patterns: bool = False) -> LayerPlan:
    """Name the `plan.num_experts` experts with the highest score.

    Protected experts come first, ties go to the expert that comes first. With router groups, each group keeps its equal
    share.

    Args:
        layer: which one.
        plan: how many experts stay, and which are protected.
        measured: of the layer.
        score: name of a score.
        patterns: not read.

    Raises:
        UnknownName: no such score.
    """
    needs(score)
    values_E = score_experts(score, measured.statistics, measured.by_domain)
    if plan.protected:
        values_E = values_E.index_fill(0, torch.tensor(plan.protected), torch.inf)
    kept_experts = top_experts(values_E, plan.num_experts, layer.num_groups).tolist()
    return replace(plan, experts=tuple(ExpertPlan(sources=(expert,)) for expert in kept_experts))


def planned_experts(plan: LayerPlan) -> Tensor:
    """Return the numbers of the experts that a plan keeps, where each is made from one expert; int64."""
    assert plan.experts is not None
    return torch.tensor([expert.sources[0] for expert in plan.experts], dtype=torch.int64)


def score_by_domain(score: str, by_domain: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the score of each expert for each domain by itself: G times (E,) float64; raises UnknownName."""
    num_domains = len(next(iter(by_domain.values())))
    return [
        score_experts(
            score,
            {name: value_G[domain] for name, value_G in by_domain.items()},
            {name: value_G[domain : domain + 1] for name, value_G in by_domain.items()},
        )
        for domain in range(num_domains)
    ]


def best_experts(state: LayerState, values_E: Tensor, count: int) -> Tensor:
    """Return the numbers of the `count` experts with the highest values, protected ones first, ascending."""
    if state.protected_E is not None:
        values_E = values_E.masked_fill(state.protected_E, torch.inf)
    return top_experts(values_E, count, state.layer.num_groups)


def top_experts(values_E: Tensor, count: int, num_groups: int = 1) -> Tensor:
    """Return the numbers of the `count` highest values, ascending; an equal share from each group of experts."""
    grouped_GE = values_E.view(num_groups, -1)
    order_GE = grouped_GE.argsort(dim=1, descending=True, stable=True)[:, : count // num_groups]
    offset_G1 = torch.arange(num_groups)[:, None] * grouped_GE.shape[1]
    return (order_GE + offset_G1).flatten().sort().values


def keep_experts(state: LayerState, kept_M: Tensor, name: str, note: Mapping[str, object]) -> LayerState:
    """Return the state with only these experts and their router rows.

    Args:
        state: the layer.
        kept_M: numbers of the experts, ascending.
        name: of the pass.
        note: what it has to say about this layer.
    """
    expert_map_E = torch.full_like(state.expert_map_E, -1)
    expert_map_E[kept_M] = torch.arange(len(kept_M))
    return replace(
        state,
        experts=state.experts.select(kept_M),
        router=slice_router(state, kept_M),
        expert_map_E=expert_map_E,
        centres_M=kept_M,
        notes={**state.notes, name: dict(note)},
    )


def slice_router(state: LayerState, rows_M: Tensor) -> dict[str, Tensor]:
    """Return the router's tensors with only these experts along each expert axis."""
    axes = dict(state.layer.router_tensors)
    sliced = {}
    for name, tensor in state.router.items():
        # Rows behind the experts' (for shared experts, or for "no expert") stay.
        spare = torch.arange(state.layer.num_experts, tensor.shape[axes[name]])
        sliced[name] = tensor.index_select(axes[name], torch.cat((rows_M, spare)))
    return sliced
