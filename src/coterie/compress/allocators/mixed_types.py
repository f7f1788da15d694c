"""A type for each matrix, so that the expected rise of the loss is least in the bytes that there are.

What each matrix would cost in each type is measured beforehand (`coterie.compress.damages`); who gets what is a
knapsack (`coterie.compress.allocators.knapsack`).
"""

from __future__ import annotations

from collections.abc import Sequence

from coterie.amounts import format_bytes, parse_bytes
from coterie.compress.allocators import one_type
from coterie.compress.allocators.knapsack import Option, choose
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.weights import Weight
from coterie.errors import Infeasible


def allocate(problem: Problem) -> Allocation:
    """Choose the types; before anything was measured one type for all, which is no larger.

    Raises:
        Infeasible: a budget below the smallest result; says what that takes.
    """
    if problem.damages is None:
        return one_type.allocate(problem)
    layers = problem.whole()
    plain = problem.num_bytes(layers, {})
    weights = [weight for weight in problem.weights if problem.damages.get(weight.pattern)]
    rest = plain - sum(weight.plain_bytes for weight in weights)
    items = [
        [
            Option(name=kind, num_bytes=weight.num_bytes(kind), damage=damage)
            for kind, damage in problem.damages[weight.pattern].items()
        ]
        for weight in weights
    ]
    chosen = choose(items, _room(problem, weights, rest))
    if chosen is None:
        least = rest + sum(min(option.num_bytes for option in options) for options in items)
        raise Infeasible(f"a budget this small cannot be met with fewer bits alone: {format_bytes(least)} is the least")
    types = {weight.pattern: option.name for weight, option in zip(weights, chosen, strict=True)}
    return Allocation(
        layers=layers, num_bytes=problem.num_bytes(layers, types), damage=sum(option.damage for option in chosen),
        types=types,
    )  # fmt: skip


def _room(problem: Problem, weights: Sequence[Weight], rest: int) -> int:
    """Return the bytes that matrices may take; `rest` is what takes bytes beside them."""
    target = problem.target
    if target.budget is not None:
        return parse_bytes(target.budget) - rest
    assert target.bits is not None
    return int(sum(weight.num_elements for weight in weights) * target.bits / 8)
