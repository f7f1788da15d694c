"""EdgeMoE: two types for experts, the lower one for those that matter least, as many as the bytes ask for.

2308.14352. Experts are listed by what the model loses where one of them alone is stored in the lower type. Two
neighbouring types bound what is aimed at; from the head of the list experts get the lower one until the aim is met.
The paper aims at a loss of accuracy and measures it on a validation set; here bytes are given, and the loss is the
second-order one of `coterie.compress.damages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from coterie.compress.allocators.expert_types import SMALL, Group, Ladders, Room, by_expert
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.damages import DamageMeter
from coterie.compress.source import Source
from coterie.model.stream.stream import Stream

#: The types that stand for the paper's 2, 4 and 8 bits.
TYPES = Ladders(types=("Q2_K", "Q4_K", "Q8_0"), small=(*SMALL, "Q4_K", "Q8_0"))

#: What is no expert's is kept at high precision.
LINEAR = "Q8_0"


def meter(
    stream: Stream, source: Source, batches: Sequence[Tensor], counts: Sequence[Tensor | None], *, small: bool = False
) -> DamageMeter:
    """Return what measures what the model loses where a matrix of one expert is stored in a type."""
    weights = [weight for group in by_expert(source.weights) for weight in group.weights]
    return DamageMeter(
        stream=stream, source=source, batches=batches, counts=counts, types=TYPES.of(small), weights=weights
    )  # fmt: skip


def allocate(problem: Problem) -> Allocation:
    """Choose a type for each expert; before anything was measured as if all mattered alike.

    Raises:
        Infeasible: a target below the smallest type; says what that takes.
    """
    room, groups = Room(problem=problem, linear=LINEAR), by_expert(problem.weights)
    num_bytes, types = room.num_bytes(groups), room.types_of(TYPES, groups)
    sizes = {wanted: sum(group.num_bytes(wanted) for group in groups) for wanted in types}
    if sizes[types[0]] > num_bytes:
        raise room.too_small(groups, types)
    bounds = [(low, high) for low, high in pairwise(types) if sizes[low] <= num_bytes < sizes[high]]
    if not bounds:  # all of them fit in the largest
        return room.allocation(groups, [types[-1]] * len(groups))
    [(low, high)] = bounds
    wanted, taken = dict.fromkeys((group.key for group in groups), high), sizes[high]
    for group in sorted(groups, key=lambda group: _importance(problem, group, low, high)):
        if taken <= num_bytes:
            break
        wanted[group.key] = low
        taken += group.num_bytes(low) - group.num_bytes(high)
    return room.allocation(groups, [wanted[group.key] for group in groups])


def _importance(problem: Problem, group: Group, low: str, high: str) -> float:
    """Return what the model loses, nats a token, where one expert has the lower type and all others the higher one."""
    if problem.damages is None:
        return 0.0
    lost = 0.0
    for weight in group.weights:
        prices = problem.damages.get(weight.pattern)
        if prices:  # else no token passed it
            lost += prices[group.types(low)[weight.pattern]] - prices[group.types(high)[weight.pattern]]
    return lost
