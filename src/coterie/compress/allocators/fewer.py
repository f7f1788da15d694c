"""The same number of experts in every layer, as stock model classes have it."""

from __future__ import annotations

from coterie.compress.allocators.problem import Allocation, Problem
from coterie.errors import Infeasible


def allocate(problem: Problem) -> Allocation:
    """Keep the share or number of experts that the target says or, of a budget, as many as fit and can be routed.

    Raises:
        Infeasible: too few experts for the router, or a budget below the smallest result; names the nearest target.
    """
    layers = problem.same_count(_count(problem))
    return Allocation(layers=layers, num_bytes=problem.sizing.num_bytes(layers))


def _count(problem: Problem) -> int:
    target, architecture = problem.target, problem.architecture
    total = architecture.layers[0].num_experts  # the same in all layers: `Architecture` refuses others
    limit = problem.limit
    if limit is not None:
        counts = problem.multiples(architecture.feasible_counts(), "number of experts")
        options = {count: problem.same_count(count) for count in counts}
        return problem.largest_within(options, limit, "keeping fewer experts", "that can be routed, {} a layer")
    count = target.experts if target.keep is None else max(1, round(target.keep * total))
    assert count is not None
    if not 1 <= count <= total:
        raise Infeasible(f"--experts {count} is out of range: every layer has {total}; choose 1 to {total}")
    if target.multiple_of is not None:
        counts = problem.multiples(architecture.feasible_counts(), "number of experts")
        return min(counts, key=lambda each: (abs(each - count), each))
    architecture.check_feasible(count)
    return count
