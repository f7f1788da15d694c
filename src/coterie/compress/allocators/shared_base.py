"""One rank for the factors of all experts of all layers: the largest whose bytes fit.

The base is stored in Q4_K, or what stands in for it in narrow rows, factors in IQ4_NL; each in BF16 where its rows are
no whole blocks. What is no expert's gets Q8_0 (`coterie.compress.allocators.expert_types`). `--bits` counts experts
alone, `--budget` the whole file.
"""

from __future__ import annotations

from bisect import bisect_right

from coterie.amounts import format_bytes, parse_bytes
from coterie.compress.allocators.expert_types import WHOLE, Room
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.weights import Weight
from coterie.errors import Infeasible
from coterie.model.disk.encodings.ggml import SIZES
from coterie.model.disk.encodings.shared_base import PLAIN, SharedBaseType

#: Types of base and factors. In four bits factors have twice the rank that they have in eight, which is worth far more
#: than what is rounded off.
BASE, FACTORS = "Q4_K", "IQ4_NL"


def allocate(problem: Problem) -> Allocation:
    """Choose the rank.

    Raises:
        Infeasible: rank 1 takes more than there is, and says how much; or experts that can share no base.
    """
    experts = [weight for weight in problem.weights if weight.kind == "expert"]
    for weight in experts:
        if not weight.can_share:
            raise Infeasible(
                f"{weight.pattern} {list(weight.shape)} does not hold one matrix for each expert, so these can have no "
                "base in common: take a recipe that stores each matrix by itself, such as gptaq"
            )
    rest, layers = Room(problem=problem, linear=WHOLE).rest_types, problem.whole()

    def types_at(rank: int) -> dict[str, str]:
        return rest | {weight.pattern: _type_of(weight, rank) for weight in experts}

    def num_bytes(rank: int) -> int:
        if problem.target.bits is None:
            return problem.num_bytes(layers, types_at(rank))
        return sum(weight.num_bytes(_type_of(weight, rank)) for weight in experts)

    room = problem.room(num_elements=sum(weight.num_elements for weight in experts), beside=0)
    plain = sum(weight.plain_bytes for weight in experts)  # high ranks may take more
    room = min(room, problem.num_bytes(layers, rest) if problem.target.bits is None else plain)
    ranks = range(1, max(min(weight.rows, weight.columns) for weight in experts) + 1)
    rank = bisect_right(ranks, room, key=num_bytes)
    if rank == 0:
        raise _too_small(problem, experts, num_bytes(1))
    types = types_at(rank)
    return Allocation(layers=layers, num_bytes=problem.num_bytes(layers, types), types=types)


def _type_of(weight: Weight, rank: int) -> str:
    """Return the type of experts at a rank, or at the highest that their matrices have."""
    in_blocks = weight.rows % SIZES[FACTORS][0] == weight.columns % SIZES[FACTORS][0] == 0
    kind = SharedBaseType(
        base=weight.fitting(BASE) or PLAIN,
        rank=min(rank, weight.rows, weight.columns),
        factors=FACTORS if in_blocks else PLAIN,
    )
    return str(kind)


def _too_small(problem: Problem, experts: list[Weight], least: int) -> Infeasible:
    """Return what to raise where rank 1 takes more than there is."""
    how = "a base for the experts of each layer and factors of rank 1"
    if problem.target.bits is not None:
        bits = 8 * least / sum(weight.num_elements for weight in experts)
        return Infeasible(
            f"--bits {problem.target.bits:g} cannot be met by this recipe: {how} take {bits:.3f} bits a number of the "
            "experts of this model, and that is the least"
        )
    budget = format_bytes(parse_bytes(problem.target.budget or 0))
    return Infeasible(
        f"a budget of {budget} cannot be met by this recipe: with {how} it is {format_bytes(least)}, and that is the "
        "least"
    )
