"""MxMoE: a type for each projection of each expert, by how far the layer's output is off where it alone is rounded.

2505.05799. In every MoE layer the sum of ``Delta_ijk x_ijk`` over experts i, projections j and types k is made least
within the layer's bytes, with Delta the Euclidean distance between the outputs of the layer. The paper weighs that
against the time that kernels take, ``L^r T^(1-r)``; here r is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coterie.compress.allocators.expert_types import SMALL, Ladders, Room, by_matrix
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.output_errors import OutputErrors
from coterie.compress.source import Source
from coterie.model.stream.stream import Stream

#: The types that are chosen from.
TYPES = Ladders(types=("Q2_K", "Q3_K", "Q4_K", "Q8_0"), small=(*SMALL, "Q2_K", "Q3_K", "Q4_K", "Q8_0"))

#: What is no expert's stays in 16 bits in the paper; in eight it loses next to nothing.
LINEAR = "Q8_0"


def meter(
    stream: Stream, source: Source, batches: Sequence[Tensor], counts: Sequence[Tensor | None], *, small: bool = False
) -> OutputErrors:
    """Return what measures how far outputs are off."""
    return OutputErrors(
        stream=stream, source=source, batches=batches, counts=counts, types=TYPES.of(small), groups=by_matrix
    )  # fmt: skip


def allocate(problem: Problem) -> Allocation:
    """Choose a type for each projection; before anything was measured as if all numbers mattered alike.

    Raises:
        Infeasible: a target below the smallest types; says what those take.
    """
    return Room(problem=problem, linear=LINEAR).allocate_least(TYPES)
