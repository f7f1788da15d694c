"""AlphaQ: a type for each projection of each expert, by how heavy-tailed the spectrum of its weights is.

2606.04980. Over all layers the sum of ``(alpha_0 / alpha_i)^gamma var_i 2^(-2 b)`` is made least within the bytes, with
alpha_i the exponent of the spectrum's tail (`coterie.compress.spectra`), alpha_0 the median of all, var_i the variance
of the weights and b the bits of the type: the noise that rounding makes, weighted by how well the matrix was trained.
No text is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from torch import Tensor

from coterie.compress.allocators.expert_types import SMALL, Group, Ladders, Room, by_matrix, code_bits
from coterie.compress.allocators.knapsack import choose_within
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.source import Source
from coterie.compress.spectra import Spectra
from coterie.model.stream.stream import Stream

#: The types that stand for the paper's 1 to 4 bits.
TYPES = Ladders(types=("Q2_K", "Q3_K", "Q4_K"), small=(*SMALL, "Q3_K", "Q4_K"))

#: Attention is stored in 4 bits.
LINEAR = "Q4_K"

#: How much the tail counts: the paper finds models of many small experts at their best from about 10 on.
GAMMA = 10.0

#: The share of the sum by which a choice may be off the best; an integer program is solved where it could be more. Over
#: the thousands of matrices of a large model it is not: the program would take minutes to change nothing.
GAP = 1e-3

#: The least variance and exponent that are told apart.
_TINY = 1e-12


def meter(
    stream: Stream, source: Source, batches: Sequence[Tensor], counts: Sequence[Tensor | None], *, small: bool = False
) -> Spectra:
    """Return what measures spectra; the text is not looked at, and types neither."""
    return Spectra(stream=stream, groups=by_matrix(source.weights))


def allocate(problem: Problem) -> Allocation:
    """Choose a type for each projection; before anything was measured as if all numbers mattered alike.

    Raises:
        Infeasible: a target below the smallest types; says what those take.
    """
    room, groups = Room(problem=problem, linear=LINEAR), by_matrix(problem.weights)
    types = room.types_of(TYPES, groups)
    costs = (
        [group.even_costs(types) for group in groups]
        if problem.damages is None
        else _costs(problem.damages, groups, types)
    )
    items = [group.options(each) for group, each in zip(groups, costs, strict=True)]
    chosen = choose_within(items, room.num_bytes(groups), GAP)
    if chosen is None:
        raise room.too_small(groups, types)
    return room.allocation(groups, [option.name for option in chosen])


def _costs(
    measured: Mapping[str, Mapping[str, float]], groups: Sequence[Group], types: Sequence[str]
) -> list[dict[str, float]]:
    """Return what types cost each matrix; one that stands for those of all experts costs what all of them do."""
    middle = median(values["alpha"] for values in measured.values())

    def noise(key: str, kind: str) -> float:
        values = measured[key]
        tail = (middle / max(values["alpha"], _TINY)) ** GAMMA
        return float(tail * max(values["variance"], _TINY) * 2.0 ** (-2 * code_bits(kind)))

    costs = []
    for group in groups:
        [weight] = group.weights
        keys = [key for key in (group.key, *stacked_keys(weight.pattern, weight.shape)) if key in measured]
        costs.append({wanted: sum(noise(key, group.types(wanted)[weight.pattern]) for key in keys) for wanted in types})
    return costs


def stacked_keys(pattern: str, shape: Sequence[int]) -> list[str]:
    """Return what the matrices of a tensor that holds those of all experts are called; none for a single matrix."""
    return [f"{pattern}[{number}]" for number in range(shape[0])] if len(shape) == 3 else []
