"""Level switches: some matrices get the next smaller type, others the next larger, within the same bytes. No torch.

Source: EvoPress (arXiv 2410.14649), which as a rule exchanges levels among matrices of one size; here bytes count.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.compress.allocators.knapsack import Option

#: Types of matrices, by pattern.
Types = Mapping[str, str]

#: Matrices that a mutation begins with, at most; the smaller of two draws is taken, so that few are more frequent, as
#: the paper has it.
MOST_SWITCHES = 3

#: Matrices that change in one mutation, at most.
MOST_CHANGES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """The types that a matrix can have.

    Attributes:
        pattern: which matrix.
        levels: what it can become, bytes rising and price falling.
    """

    pattern: str
    levels: tuple[Option, ...]

    def level_of(self, kind: str) -> int:
        """Return the number of the level that a type is.

        Raises:
            ValueError: it is none of them.
        """
        return [level.name for level in self.levels].index(kind)


def ladder_of(pattern: str, options: Sequence[Option], now: str, avoided: frozenset[str] = frozenset()) -> Ladder:
    """Return the levels of a matrix: of the types that it can have, those that no smaller one is as good as.

    Args:
        pattern: which matrix.
        options: the types, and what they take and cost.
        now: the one that it has; a level in any case.
        avoided: types that it is not to be given.
    """
    [own] = (option for option in options if option.name == now)
    levels = [own]
    others = (option for option in options if option.name != now and option.name not in avoided)
    for option in sorted(others, key=lambda each: (each.num_bytes, each.damage)):
        below = [each for each in levels if each.num_bytes <= option.num_bytes]
        above = [each for each in levels if each.num_bytes >= option.num_bytes]
        # What costs as much as something smaller is no step up, and what costs less than the larger none down.
        if all(option.damage < each.damage for each in below) and all(option.damage > each.damage for each in above):
            levels.append(option)
    return Ladder(pattern=pattern, levels=tuple(sorted(levels, key=lambda each: each.num_bytes)))


def bytes_of(ladders: Sequence[Ladder], types: Types) -> int:
    """Return the bytes of all matrices in some types."""
    return sum(ladder.levels[ladder.level_of(types[ladder.pattern])].num_bytes for ladder in ladders)


def switched(ladders: Sequence[Ladder], types: Types, room: int, rng: random.Random) -> dict[str, str]:
    """Return types in which some matrices drawn at random are a level lower, and others a level higher.

    Either some fall first, or some rise and others fall until all fit. Then what is left over is spent: the others are
    tried in random order, and each that fits rises. What would change too many stays as it was.

    Args:
        ladders: the levels of all matrices.
        types: what they have now, within `room`.
        room: the bytes that all of them may take.
        rng: what is drawn from.
    """
    move = [0] * len(ladders)
    level = [ladder.level_of(types[ladder.pattern]) for ladder in ladders]
    left = room - bytes_of(ladders, types)

    def more(number: int, step: int) -> int:
        levels = ladders[number].levels
        return levels[level[number] + step].num_bytes - levels[level[number]].num_bytes

    def movable(step: int) -> list[int]:
        """Return the matrices that did not move and can, in random order."""
        able = [n for n, each in enumerate(ladders) if not move[n] and 0 <= level[n] + step < len(each.levels)]
        return rng.sample(able, len(able))

    count = min(rng.randint(1, MOST_SWITCHES), rng.randint(1, MOST_SWITCHES))
    step = rng.choice((-1, 1))
    for number in movable(step)[:count]:
        move[number] = step
        left -= more(number, step)
    for number in movable(-1):
        if left < 0:
            move[number] = -1
            left -= more(number, -1)
    changes = sum(map(abs, move))
    if left < 0 or changes > MOST_CHANGES:
        return dict(types)
    for number in movable(1):
        if changes < MOST_CHANGES and more(number, 1) <= left:
            move[number] = 1
            left -= more(number, 1)
            changes += 1
    return {each.pattern: each.levels[level[n] + move[n]].name for n, each in enumerate(ladders)}
