"""What allocators of published methods share: they choose among a few types for experts, and all else has a fixed one.

An expert that is stored by itself can have types of its own; where a checkpoint stores those of a layer as one tensor,
they are one matrix here, and have one type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from coterie.amounts import format_bytes, parse_bytes
from coterie.compress.allocators.knapsack import Option, choose_exactly
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.weights import Weight, gathered
from coterie.errors import Infeasible
from coterie.model.disk.encodings.ggml import unwrapped

#: The types that stand for one bit and for two where the smallest of a recipe's own take more than is asked for.
SMALL = ("IQ1_S", "IQ2_XXS")

#: What embedding and head get, which these papers leave in 16 bits; in eight they lose next to nothing.
WHOLE = "Q8_0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladders:
    """The types that a recipe chooses from, and those that it does where these take too much.

    Attributes:
        types: the smallest first.
        small: those in their place where the smallest of them takes more than is asked for.
    """

    types: tuple[str, ...]
    small: tuple[str, ...]

    def of(self, small: bool) -> tuple[str, ...]:
        """Return the types, or those for less."""
        return self.small if small else self.types


def are_small(types: Iterable[str]) -> bool:
    """Tell whether types were chosen for less than the smallest that a recipe usually chooses from."""
    return not {unwrapped(kind) for kind in types}.isdisjoint(SMALL)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Matrices of experts that get their types together.

    Attributes:
        key: what it is called.
        weights: the matrices.
    """

    key: str
    weights: tuple[Weight, ...]

    @property
    def layer(self) -> int:
        """Index of the MoE layer."""
        layer = self.weights[0].layer
        assert layer is not None
        return layer

    @property
    def num_elements(self) -> int:
        """Numbers in all matrices."""
        return sum(weight.num_elements for weight in self.weights)

    def types(self, wanted: str) -> dict[str, str]:
        """Return the type of each matrix, by pattern, where a type is wanted: what stands in for it in narrow rows."""
        fitting = {weight.pattern: weight.fitting(wanted) for weight in self.weights}
        return {pattern: kind for pattern, kind in fitting.items() if kind is not None}

    def num_bytes(self, wanted: str) -> int:
        """Return the bytes of the matrices where a type is wanted."""
        types = self.types(wanted)
        return sum(weight.num_bytes(types[weight.pattern]) for weight in self.weights)

    def distinct(self, ladder: Sequence[str]) -> list[str]:
        """Return the types of a ladder that differ for these matrices; of those that come to the same the first."""
        seen: dict[tuple[tuple[str, str], ...], str] = {}
        for wanted in ladder:
            seen.setdefault(tuple(sorted(self.types(wanted).items())), wanted)
        return list(seen.values())

    def options(self, costs: Mapping[str, float]) -> list[Option]:
        """Return what it can become, with the costs of types that are wanted."""
        return [
            Option(name=wanted, num_bytes=self.num_bytes(wanted), damage=costs[wanted])
            for wanted in self.distinct(list(costs))
        ]

    def costs(self, measured: Mapping[str, Mapping[str, float]] | None, ladder: Sequence[str]) -> dict[str, float]:
        """Return what types cost: what was measured, by key and type; before that as if all numbers mattered alike."""
        if measured is None:
            return self.even_costs(ladder)
        return {kind: measured[self.key][kind] for kind in ladder}

    def even_costs(self, ladder: Sequence[str]) -> dict[str, float]:
        """Return costs of types as if all numbers mattered alike: what allocators go by before anything is measured."""
        return {
            wanted: sum(
                weight.num_elements * 4.0 ** -code_bits(self.types(wanted)[weight.pattern]) for weight in self.weights
            )
            for wanted in ladder
        }


def code_bits(kind: str) -> int:
    """Return the bits of the code of a number in a GGML type, scales not counted: 4 for Q4_K."""
    digits = re.search(r"\d+", kind)
    assert digits is not None
    return int(digits.group())


def by_matrix(weights: Sequence[Weight]) -> list[Group]:
    """Return a group for each matrix of experts that can be stored in blocks, named by its pattern."""
    return [Group(key=weight.pattern, weights=(weight,)) for weight in _stored(weights)]


def by_expert(weights: Sequence[Weight]) -> list[Group]:
    """Return a group for each expert; for all of a layer where they are stored as one tensor."""
    groups: dict[str, list[Weight]] = {}
    for weight in _stored(weights):
        which = "*" if weight.expert is None else str(weight.expert)
        groups.setdefault(f"layers.{weight.layer}.experts.{which}", []).append(weight)
    return [Group(key=key, weights=tuple(members)) for key, members in groups.items()]


def _stored(weights: Sequence[Weight]) -> list[Weight]:
    experts = (weight for weight in weights if weight.kind == "expert" and weight.fitting(WHOLE) is not None)
    return [each for weight in experts for each in weight.apart()]


@dataclass(frozen=True, kw_only=True)
class Room:
    """The bytes that experts may take, where all else has a fixed type.

    Attributes:
        problem: what is to be shared out.
        linear: the type of matrices that are neither of experts nor embedding nor head: attention, shared experts.
    """

    problem: Problem
    linear: str

    @cached_property
    def rest_types(self) -> dict[str, str]:
        """The types of all matrices but those of experts, by pattern."""
        types: dict[str, str] = {}
        for weight in self.problem.weights:
            if weight.kind != "expert":
                kind = weight.fitting(self.linear if weight.kind == "linear" and not weight.head else WHOLE)
                if kind is not None:
                    types[weight.pattern] = kind
        return types

    def num_bytes(self, groups: Sequence[Group]) -> int:
        """Return the bytes that groups may take together."""
        num_elements = sum(group.num_elements for group in groups)
        return self.problem.room(num_elements=num_elements, beside=self._beside(groups))

    def types_of(self, ladder: Ladders, groups: Sequence[Group]) -> tuple[str, ...]:
        """Return the types of a ladder that groups are to choose from: those for less where the others do not fit."""
        least = sum(min(group.num_bytes(wanted) for wanted in ladder.types) for group in groups)
        return ladder.of(small=least > self.num_bytes(groups))

    def allocate_by_layer(
        self,
        groups: Sequence[Group],
        ladder: Sequence[str],
        choose: Callable[[Sequence[Group], int], Sequence[Option] | None],
    ) -> Allocation:
        """Return the allocation in which each layer chooses for itself, with the same number of bits in every layer.

        Args:
            groups: of all layers.
            ladder: the types that are chosen from.
            choose: tells from the groups of a layer, and the bytes that they may take, what each becomes; None where
                nothing fits.

        Raises:
            Infeasible: nothing fits in a layer; says what the smallest types take.
        """
        room, total = self.num_bytes(groups), sum(group.num_elements for group in groups)
        by_layer: dict[int, list[Group]] = {}
        for group in groups:
            by_layer.setdefault(group.layer, []).append(group)
        wanted: dict[str, str] = {}
        for of_layer in by_layer.values():
            chosen = choose(of_layer, room * sum(group.num_elements for group in of_layer) // total)
            if chosen is None:
                raise self.too_small(groups, ladder)
            wanted |= {group.key: option.name for group, option in zip(of_layer, chosen, strict=True)}
        return self.allocation(groups, [wanted[group.key] for group in groups])

    def allocate_least(self, ladder: Ladders) -> Allocation:
        """Return the allocation in which every layer has the least sum of what its projections cost, see `Group.costs`.

        Raises:
            Infeasible: nothing fits in a layer; says what the smallest types take.
        """
        measured, everywhere = self.problem.damages, by_matrix(self.problem.weights)
        types = self.types_of(ladder, everywhere)

        def choose(groups: Sequence[Group], num_bytes: int) -> list[Option] | None:
            return choose_exactly([group.options(group.costs(measured, types)) for group in groups], num_bytes)

        return self.allocate_by_layer(everywhere, types, choose)

    def too_small(self, groups: Sequence[Group], ladder: Sequence[str]) -> Infeasible:
        """Return what to raise where even the smallest types of a ladder take more."""
        least = sum(min(group.num_bytes(wanted) for wanted in ladder) for group in groups)
        target = self.problem.target
        if target.bits is not None:
            bits = 8 * least / sum(group.num_elements for group in groups)
            return Infeasible(
                f"--bits {target.bits:g} cannot be met: the types that this recipe chooses from, {', '.join(ladder)}, "
                f"take {bits:.3f} bits a number of the experts of this model at least"
            )
        return Infeasible(
            f"a budget of {format_bytes(parse_bytes(target.budget or 0))} cannot be met by this recipe, which chooses "
            f"from {', '.join(ladder)} for experts: {format_bytes(self._beside(groups) + least)} is the least"
        )

    def allocation(self, groups: Sequence[Group], wanted: Sequence[str]) -> Allocation:
        """Return the allocation in which every group gets what is wanted for it."""
        types = dict(self.rest_types)
        for group, kind in zip(groups, wanted, strict=True):
            types |= group.types(kind)
        types = gathered(self.problem.weights, types)
        layers = self.problem.whole()
        return Allocation(layers=layers, num_bytes=self.problem.num_bytes(layers, types), types=types)

    def _beside(self, groups: Sequence[Group]) -> int:
        """Return the bytes of all tensors but those of groups."""
        plain = self.problem.num_bytes(self.problem.whole(), self.rest_types)
        return plain - sum(weight.plain_bytes for group in groups for weight in group.weights)
