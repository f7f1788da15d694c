"""The same number of parts of experts in every layer; which ones is each layer's own affair."""

from __future__ import annotations

from coterie.compress.allocators.problem import Allocation, Limit, Problem
from coterie.compress.layer_plan import LayerPlan
from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.choice import choice_key
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture, runs_alone
from coterie.model.arch.width import width_rule

#: A token chooses so many times the parts that would keep as many neurons at work as if all experts were narrower:
#: parts of one expert are chosen together, so that an expert with many parts takes the places of others.
MORE = 1.25


def allocate(problem: Problem) -> Allocation:
    """Cut every expert into as many parts as the family allows, and keep as many parts as there is room for.

    Where experts cannot be cut they become narrower, or fewer, whichever the config can say.

    Raises:
        Infeasible: a budget below the smallest result.
    """
    layers = _layers(problem, int(problem.option("parts")))
    return Allocation(layers=layers, num_bytes=problem.sizing.num_bytes(layers))


def _layers(problem: Problem, parts: int) -> tuple[LayerPlan, ...]:
    architecture, target = problem.architecture, problem.target
    first, total = architecture.layers[0], architecture.layers[0].num_experts
    limit = problem.limit
    if limit is None:
        assert target.keep is not None
        limit = problem.byte_limit(problem.sizing.num_bytes(problem.same_count(max(1, round(target.keep * total)))))
    uncut = problem.whole()
    if limit.measure(uncut) <= limit.most:
        return uncut
    cut = most_parts(problem, parts)
    if cut == 1:
        return _uncut(problem, limit)
    width = problem.full_width() // cut
    options: dict[int, tuple[LayerPlan, ...]] = {}
    for count in problem.multiples(range(1, total * cut), "number of parts"):
        chosen = min(count, first.top_k * cut, max(1, round(MORE * first.top_k * count / total)))
        if architecture.routing_problem(count, chosen) is None:
            layer = LayerPlan(num_experts=count, width=width, top_k=chosen)
            options[count] = (layer,) * len(architecture.layers)
    least = f"that can be routed, {{}} of width {width}"
    return options[problem.largest_within(options, limit, "keeping fewer parts of experts", least)]


def _uncut(problem: Problem, limit: Limit) -> tuple[LayerPlan, ...]:
    try:
        widths = width_rule(problem.architecture).feasible_widths()
    except Infeasible:
        counts = problem.multiples(problem.architecture.feasible_counts(), "number of experts")
        fewer = {count: problem.same_count(count) for count in counts}
        way = "keeping fewer experts (experts can neither be cut nor made narrower here)"
        return fewer[problem.largest_within(fewer, limit, way, "that can be routed, {} a layer")]
    narrower = {width: problem.same_width(width) for width in problem.multiples(widths, "width")}
    return narrower[problem.largest_within(narrower, limit, "slimming experts", "that can be written, width {}")]


def most_parts(problem: Problem, parts: int) -> int:
    """Return into how many parts, `parts` at most, experts can be cut; 1 where they cannot be."""
    architecture, full = problem.architecture, problem.full_width()
    if not _can_be_cut(architecture):
        return 1
    try:
        choice_key(architecture)
        narrow = set(width_rule(architecture).feasible_widths())
    except (Infeasible, ArchitectureMismatch):
        return 1
    return next((cut for cut in range(parts, 1, -1) if full % cut == 0 and full // cut in narrow), 1)


def _can_be_cut(architecture: Architecture) -> bool:
    """Tell whether experts are sums over neurons, and their routers can be asked for what parts weigh."""
    layers, model = architecture.layers, architecture.model
    normed = any(canonical_experts(model.get_submodule(layer.experts)).finish for layer in layers)
    return not normed and all(runs_alone(model, layer) for layer in layers)
