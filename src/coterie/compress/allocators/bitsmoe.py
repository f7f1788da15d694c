"""BitsMoE's rule of who gets how many bits: a type for each projection of each expert, by its spectral energy.

2606.00079. Each expert of a layer is a set of factors in a basis that all share (`coterie.compress.factor_errors`). In
the paper the basis stays as it is, and factors are what is stored, in bits that an integer program shares out: the sum
of what rounding each row of them would cost is made least. No form that is written here stores factors in a shared
basis, so this is the allocation alone: rows of one matrix have one type, which costs what it would cost all of its
rows, and the matrix itself is stored in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coterie.compress.allocators.expert_types import SMALL, Ladders, Room, by_matrix
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.factor_errors import FactorErrors
from coterie.compress.source import Source
from coterie.model.stream.stream import Stream

#: The types that stand for the 2, 3, 4, 6 and 8 bits of the paper's code, which has 1 and 16 as well.
TYPES = Ladders(types=("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0"), small=(*SMALL, "Q3_K", "Q4_K", "Q6_K", "Q8_0"))

#: The paper is about experts; in eight bits what is no expert's loses next to nothing.
LINEAR = "Q8_0"


def meter(
    stream: Stream, source: Source, batches: Sequence[Tensor], counts: Sequence[Tensor | None], *, small: bool = False
) -> FactorErrors:
    """Return what measures what rounding the factors of matrices would cost."""
    return FactorErrors(
        stream=stream, source=source, batches=batches, counts=counts, types=TYPES.of(small), groups=by_matrix
    )  # fmt: skip


def allocate(problem: Problem) -> Allocation:
    """Choose a type for each projection; before anything was measured as if all numbers mattered alike.

    Raises:
        Infeasible: a target below the smallest types; says what those take.
    """
    return Room(problem=problem, linear=LINEAR).allocate_least(TYPES)
