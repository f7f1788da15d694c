"""One generation of the search: offspring of a parent, selected in steps, and the parent kept where none is better.

Source: EvoPress (arXiv 2410.14649). No torch: what a divergence is, a caller says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coterie.compress.search.levels import Ladder, Types, switched

#: Offspring of a generation.
OFFSPRING = 16

#: Steps of the selection but the last: the share of the sequences that is looked at, and how many are left after it.
#: The last step looks at all sequences.
SELECTION = ((1 / 16, 4), (1 / 4, 1))

#: Passes over the layers that a generation takes.
PASSES = len(SELECTION) + 1

#: Generations without gain after which the search ends.
PATIENCE = 12

#: Draws for each offspring that is wanted, at most: where few types can change, most draws are there already.
_DRAWS = 8

#: Returns the mean divergences, nats a token, of models in some types, on sequences of these numbers.
Divergence = Callable[[Sequence[Types], Sequence[int]], list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """The best that is known.

    Attributes:
        types: of each matrix, by pattern.
        divergence: on all sequences, nats a token.
    """

    types: Types
    divergence: float


def sample_sizes(sequences: int) -> tuple[int, ...]:
    """Return how many of the sequences each step of the selection looks at, the last at all."""
    return (*(max(1, round(sequences * share)) for share, _ in SELECTION), sequences)


def next_generation(
    parent: Parent, ladders: Sequence[Ladder], room: int, sequences: int, divergence: Divergence, rng: random.Random
) -> Parent:
    """Return the best of a generation: an offspring, or the parent itself where none is better on all sequences.

    Sequences of the first steps are drawn anew, so that no search fits few of them.

    Args:
        parent: what they come from; within `room`.
        ladders: the levels of all matrices.
        room: the bytes that all matrices may take.
        sequences: how many there are.
        divergence: what is to become less.
        rng: what is drawn from.
    """
    candidates = offspring(parent.types, ladders, room, rng)
    for size, (_, survivors) in zip(sample_sizes(sequences), SELECTION, strict=False):
        chosen = sorted(rng.sample(range(sequences), size))
        if len(candidates) > survivors:
            values = divergence(candidates, chosen)
            order = sorted(range(len(candidates)), key=lambda number: values[number])
            candidates = [candidates[number] for number in order[:survivors]]
    if not candidates:
        return parent
    [value] = divergence(candidates, range(sequences))
    return Parent(types=candidates[0], divergence=value) if value < parent.divergence else parent


def offspring(types: Types, ladders: Sequence[Ladder], room: int, rng: random.Random) -> list[Types]:
    """Return up to `OFFSPRING` different types that are not those of the parent; none where nothing can change."""
    candidates: list[Types] = []
    for _ in range(_DRAWS * OFFSPRING):
        drawn = switched(ladders, types, room, rng)
        if drawn != types and drawn not in candidates:
            candidates.append(drawn)
        if len(candidates) == OFFSPRING:
            break
    return candidates
