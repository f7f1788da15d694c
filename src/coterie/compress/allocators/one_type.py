"""One type for all matrices: the largest that fits. The head, which every token passes, gets Q6_K at least.

So does an embedding that is the head as well, as in llama.cpp; matrices whose rows are no whole blocks get the type
that stands in (`coterie.compress.weights`). Types of integers are for experts and linear modules alone
(`coterie.compress.integers`).
"""

from __future__ import annotations

from collections.abc import Sequence

from coterie.amounts import format_bytes, parse_bytes
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.integers import choose_integers, fitting_integers
from coterie.compress.weights import one_type
from coterie.errors import Infeasible
from coterie.model.disk.encodings.block_types import bits_of
from coterie.model.disk.encodings.ggml import OWN_TYPES, SIZES
from coterie.model.disk.encodings.plane_types import PLANE_NAMES, PLANES


def allocate(problem: Problem) -> Allocation:
    """Choose the type.

    Raises:
        Infeasible: a budget below the smallest result; says what that takes. Or rows that a type cannot hold.
    """
    target = problem.target
    if target.integers:
        return _integers(problem)
    if target.type is not None:
        if target.type in PLANE_NAMES or target.type in PLANES:
            return _in_planes(problem, target.type)
        return _allocation(problem, target.type)
    ladder = sorted((name for name in SIZES if name not in OWN_TYPES), key=bits_of, reverse=True)
    if target.bits is not None:
        limit = target.bits
        return _allocation(problem, next(name for name in ladder if bits_of(name) <= limit))
    return _largest(problem, [_allocation(problem, name) for name in ladder])


def _integers(problem: Problem) -> Allocation:
    """Choose one of the types that compressed-tensors stores, which all experts get."""
    target = problem.target
    if target.type is not None:
        return _in_integers(problem, target.type)
    ladder = fitting_integers(problem.weights)
    if target.bits is not None:
        below = [name for name in ladder if bits_of(name) <= target.bits]
        if not below:
            raise Infeasible(
                f"--bits {target.bits:g} cannot be met with --target compressed-tensors: {ladder[-1]} takes "
                f"{bits_of(ladder[-1]):g} a number; for fewer take --target gguf or packed"
            )
        return _in_integers(problem, below[0])
    return _largest(problem, [_in_integers(problem, name) for name in ladder])


def _in_integers(problem: Problem, name: str) -> Allocation:
    types, layers = choose_integers(problem.weights, name), problem.whole()
    return Allocation(layers=layers, num_bytes=problem.num_bytes(layers, types), types=types)


def _in_planes(problem: Problem, name: str) -> Allocation:
    """Choose planes of bits; raises Infeasible for experts whose rows are no whole groups."""
    kind = PLANE_NAMES.get(name, name)
    groups = ", ".join(str(group) for bits, group in PLANES.values() if bits == PLANES[kind][0])
    for weight in problem.weights:
        near = weight.fitting(kind)
        if weight.kind == "expert" and near != kind and (near is None or name in PLANES):
            wanted = PLANES[name][1] if near else groups
            instead = f"take {near}" if near else "take another type, which leaves such rows as they are"
            raise Infeasible(
                f"rows of {weight.pattern} have {weight.columns} numbers, which are no whole groups of {wanted}: "
                f"{instead}"
            )
    return _allocation(problem, kind)


def _largest(problem: Problem, options: Sequence[Allocation]) -> Allocation:
    """Return the largest that the budget allows; raises Infeasible where none does."""
    assert problem.target.budget is not None
    budget = parse_bytes(problem.target.budget)
    fitting = [option for option in options if option.num_bytes <= budget]
    if not fitting:
        least = min(options, key=lambda option: option.num_bytes)
        raise Infeasible(
            f"a budget of {format_bytes(budget)} cannot be met with fewer bits alone: the smallest type takes "
            f"{format_bytes(least.num_bytes)}"
        )
    return max(fitting, key=lambda option: option.num_bytes)


def _allocation(problem: Problem, name: str) -> Allocation:
    types, layers = one_type(problem.weights, name), problem.whole()
    return Allocation(layers=layers, num_bytes=problem.num_bytes(layers, types), types=types)
