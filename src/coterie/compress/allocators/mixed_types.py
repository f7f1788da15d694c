"""A type for each matrix, so that the expected rise of the loss is least in the bytes that there are.

What each matrix would cost in each type is measured beforehand (`coterie.compress.damages`); who gets what is a
knapsack (`coterie.compress.allocators.knapsack`). Where each expert can have types of its own, its part of what a
projection of its layer costs is what the expert's numbers weigh there (`coterie.compress.damages.Shares`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coterie.amounts import format_bytes
from coterie.compress.allocators import one_type
from coterie.compress.allocators.knapsack import Option, choose_within, gap_of
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.weights import Weight, gathered, smallest_types
from coterie.errors import Infeasible
from coterie.model.disk.encodings.ggml import WRAPPED

#: Where more of the damage could be saved than this share, an integer program is asked as well.
GAP = 0.01

#: Columns of a block of the types of few bits.
_WIDE = 256


def allocate(problem: Problem) -> Allocation:
    """Choose the types; before anything was measured one type for all, or the smallest that there are.

    Raises:
        Infeasible: a budget below the smallest result; says what that takes.
    """
    if problem.damages is None:
        return _outline(problem)
    layers = problem.whole()
    plain = problem.num_bytes(layers, {})
    weights = [weight for weight in problem.weights if problem.damages.get(weight.pattern)]
    rest = plain - sum(weight.plain_bytes for weight in weights)
    names, items = [], []
    for weight in weights:
        options = options_of(weight, problem.damages[weight.pattern])
        for name, share in expert_shares(problem, weight):
            num_matrices = 1 if name == weight.pattern else len(weight.names)
            names.append(name)
            items.append([
                Option(name=each.name, num_bytes=each.num_bytes // num_matrices, damage=each.damage * share)
                for each in options
            ])  # fmt: skip
    room = room_of(problem, weights, rest)
    chosen = choose_within(items, room, GAP)
    if chosen is None:
        raise too_small(problem, weights, rest, sum(min(each.num_bytes for each in options) for options in items))
    types = gathered(weights, {name: option.name for name, option in zip(names, chosen, strict=True)})
    return Allocation(
        layers=layers, num_bytes=problem.num_bytes(layers, types), damage=sum(option.damage for option in chosen),
        types=types, gap=gap_of(items, chosen, room),
    )  # fmt: skip


def expert_shares(problem: Problem, weight: Weight) -> list[tuple[str, float]]:
    """Return what gets a type by itself, and its share of what that costs: each expert, or its pattern as a whole."""
    shares = problem.shares.get(weight.pattern)
    return [(weight.pattern, 1.0)] if shares is None else list(zip(weight.names, shares, strict=True))


def options_of(weight: Weight, damages: Mapping[str, float]) -> list[Option]:
    """Return the types that a matrix can have, of those that are priced."""
    return [
        Option(name=kind, num_bytes=weight.num_bytes(kind), damage=damage)
        for kind, damage in damages.items()
        if weight.wraps or not kind.endswith(WRAPPED)
    ]


def _outline(problem: Problem) -> Allocation:
    """Say what can be said from headers alone: whether types can be mixed so that the target is met, and one way.

    That way is one type for all where one fits, which is no larger than what will be chosen; else the smallest types.
    """
    layers = problem.whole()
    types = smallest_types(problem.weights)
    weights = [weight for weight in problem.weights if weight.pattern in types]
    smallest = Allocation(layers=layers, num_bytes=problem.num_bytes(layers, types), types=types)
    taken = sum(weight.num_bytes(types[weight.pattern]) for weight in weights)
    rest = smallest.num_bytes - taken
    if taken > room_of(problem, weights, rest):
        raise too_small(problem, weights, rest, taken)
    try:
        return one_type.allocate(problem)
    except Infeasible:
        return smallest


def too_small(problem: Problem, weights: Sequence[Weight], rest: int, taken: int) -> Infeasible:
    """Return what to raise where matrices take `taken` bytes at least, and all else `rest`."""
    if problem.target.bits is not None:
        least = 8 * taken / sum(weight.num_elements for weight in weights)
        return Infeasible(
            f"--bits {problem.target.bits:g} cannot be met: blocks that fit into the rows of this model take "
            f"{least:.3f} bits a number at least{_less(weights)}"
        )
    least_bytes = format_bytes(rest + taken)
    return Infeasible(
        f"a budget this small cannot be met with fewer bits alone: {least_bytes} is the least{_less(weights)}"
    )


def _less(weights: Sequence[Weight]) -> str:
    """Return what to add where rows are no whole blocks of small types: who would read smaller ones."""
    narrow = next((weight for weight in weights if weight.can_wrap and weight.columns % _WIDE), None)
    if narrow is None or narrow.wraps:
        return ""
    return (
        f", because rows of {narrow.columns} numbers, as in {narrow.pattern}, are no blocks of {_WIDE}; --target "
        "packed lets blocks run on from row to row, for a result that no GGUF file holds"
    )


def room_of(problem: Problem, weights: Sequence[Weight], rest: int) -> int:
    """Return the bytes that matrices may take; `rest` is what takes bytes beside them."""
    return problem.room(num_elements=sum(weight.num_elements for weight in weights), beside=rest)
