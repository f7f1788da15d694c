"""PMQ: a type for each expert, by how often it is chosen, with what weight, and how far its output is off.

Pre-loading mixed-precision quantisation of MC (2410.06270) and of MC# (2510.10962). In every MoE layer the sum over
experts i and types j of ``phi_i^alpha w_i^beta eps_ij^gamma x_ij`` is made least, with phi the share of the tokens that
chose the expert, w its routing weight, and eps the Frobenius norm of what the layer's output is off where that expert
alone is rounded to type j. The average bits of a layer are bounded, and at least one expert has the largest type and
one that in the middle.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from coterie.compress.allocators.expert_types import SMALL, Group, Ladders, Room, by_expert
from coterie.compress.allocators.knapsack import Option, choose_exactly
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.output_errors import OutputErrors
from coterie.compress.source import Source
from coterie.model.stream.stream import Stream

log = logging.getLogger(__name__)

#: The types that stand for the paper's 1, 2 and 3 bits.
TYPES = Ladders(types=("Q2_K", "Q3_K", "Q4_K"), small=(*SMALL, "Q3_K"))

#: Attention is stored in 4 bits.
LINEAR = "Q4_K"

#: The exponents of the paper: of how often an expert is chosen, of its routing weight, of its error.
ALPHA, BETA, GAMMA = 1.0, 1.0, 2.0


def meter(
    stream: Stream, source: Source, batches: Sequence[Tensor], counts: Sequence[Tensor | None], *, small: bool = False
) -> OutputErrors:
    """Return what measures how far outputs are off, and how often and with what weight experts are chosen."""
    return OutputErrors(
        stream=stream, source=source, batches=batches, counts=counts, types=TYPES.of(small), groups=by_expert
    )  # fmt: skip


def allocate(problem: Problem) -> Allocation:
    """Choose a type for each expert; before anything was measured as if all mattered alike.

    Raises:
        Infeasible: a target below the smallest types; says what those take.
    """
    narrow: list[int] = []

    def choose(groups: Sequence[Group], num_bytes: int) -> list[Option] | None:
        items = [group.options(costs) for group, costs in zip(groups, _costs(problem, groups, types), strict=True)]
        floors = _floors(items, types)
        chosen = choose_exactly(items, num_bytes, at_least=floors)
        if chosen is None and floors:
            narrow.append(groups[0].layer)
            chosen = choose_exactly(items, num_bytes)
        return chosen

    room, everywhere = Room(problem=problem, linear=LINEAR), by_expert(problem.weights)
    types = room.types_of(TYPES, everywhere)
    allocation = room.allocate_by_layer(everywhere, types, choose)
    if narrow:
        log.info("there is no room for one expert of each type in %d layers, such as layer %d", len(narrow), narrow[0])
    return allocation


def _floors(items: Sequence[Sequence[Option]], types: Sequence[str]) -> dict[str, int]:
    """Return of which types a layer should have an expert at least: of all but the smallest, if there are enough."""
    larger = sorted({option.name for options in items for option in options}, key=types.index)[1:]
    return dict.fromkeys(larger, 1) if len(items) >= len(larger) else {}


def _costs(problem: Problem, groups: Sequence[Group], types: Sequence[str]) -> list[dict[str, float]]:
    """Return what types cost the experts of a layer."""
    if problem.damages is None:
        return [group.even_costs(types) for group in groups]
    measured = [problem.damages[group.key] for group in groups]
    return [
        {kind: share**ALPHA * weight**BETA * values[kind] ** GAMMA for kind in types}
        for values, share, weight in zip(
            measured, _shares(measured, "usage"), _shares(measured, "gate_mass"), strict=True
        )
    ]


def _shares(measured: Sequence[Mapping[str, float]], name: str) -> list[float]:
    total = sum(values[name] for values in measured)
    return [values[name] / total if total > 0 else 0.0 for values in measured]
