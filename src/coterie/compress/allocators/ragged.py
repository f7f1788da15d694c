"""Every expert with a width of its own, from one ranking of the hidden neurons of all layers (HEAPr, 2509.22299).

Legend: E experts, F expert width.
"""

from __future__ import annotations

import torch

from coterie.amounts import format_bytes, parse_bytes
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.layer_plan import LayerPlan, ragged_plan
from coterie.compress.methods.slim import RANKINGS, needs
from coterie.errors import Infeasible
from coterie.profile.profile import Profile


def allocate(problem: Problem) -> Allocation:
    """Keep the neurons of highest score over all layers, as many as the target gives room for with uniform widths.

    Raises:
        Infeasible: a width out of range, or a budget that is less than the model without any expert.
    """
    limit, without_experts = _limits(problem)
    costs = [problem.sizing.neuron_bytes(layer.index) for layer in problem.architecture.layers]
    if problem.profile is None:
        layers = _even(problem, limit - without_experts, costs)
    else:
        layers = _ranked(problem, problem.profile, limit - without_experts, costs)
    return Allocation(layers=layers, num_bytes=problem.sizing.num_bytes(layers))


def _limits(problem: Problem) -> tuple[int, int]:
    """Return the bytes that the result may take, and those of the model without any expert."""
    target, full = problem.target, problem.full_width()
    without_experts = problem.sizing.num_bytes(
        [ragged_plan([0] * layer.num_experts) for layer in problem.architecture.layers]
    )
    if target.budget is not None:
        limit = parse_bytes(target.budget)
        if limit < without_experts:
            raise Infeasible(
                f"a budget of {format_bytes(limit)} cannot be met by slimming experts: without any expert the model "
                f"takes {format_bytes(without_experts)}"
            )
        return limit, without_experts
    width = target.width if target.keep is None else max(1, round(target.keep * full))
    assert width is not None
    if not 1 <= width <= full:
        raise Infeasible(f"--width {width} is out of range: experts are {full} wide; choose 1 to {full}")
    return problem.sizing.num_bytes(problem.same_width(width)), without_experts


def _even(problem: Problem, room: int, costs: list[int]) -> tuple[LayerPlan, ...]:
    layers = problem.architecture.layers
    bytes_of_one = sum(cost * layer.num_experts for cost, layer in zip(costs, layers, strict=True))
    width = min(problem.full_width(), room // bytes_of_one)
    return tuple(ragged_plan([width] * layer.num_experts) for layer in layers)


def _ranked(problem: Problem, profile: Profile, room: int, costs: list[int]) -> tuple[LayerPlan, ...]:
    layers, full, score = problem.architecture.layers, problem.full_width(), str(problem.option("score"))
    scores = []
    for layer in layers:
        statistics = {name: profile.sum(layer.index, name) for name in needs(score)}
        scores.append(RANKINGS[score](statistics).flatten())
    order = torch.cat(scores).argsort(descending=True, stable=True)
    cost_of = torch.cat([torch.full((len(each),), cost) for each, cost in zip(scores, costs, strict=True)])
    is_kept = torch.zeros(len(order), dtype=torch.bool)
    is_kept[order[cost_of[order].cumsum(0) <= room]] = True
    kept_by_layer = torch.split(is_kept, [len(each) for each in scores])
    return tuple(
        ragged_plan(kept_of_layer.view(layer.num_experts, full).sum(1).tolist())
        for layer, kept_of_layer in zip(layers, kept_by_layer, strict=True)
    )
