"""Level switches: some matrices get the next smaller type, others the next larger, within the same bytes. No torch.

Source: EvoPress (arXiv 2410.14649). There all matrices that change places are of one size; here bytes are counted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.compress.allocators.knapsack import Option

#: Types of matrices, by pattern.
Types = Mapping[str, str]

#: Matrices that get a smaller type in one mutation, at most; the smaller of two draws is taken, so that few are more
#: frequent, as in the paper.
MOST_SWITCHES = 3


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

    Those that rise are tried in random order, each as long as it fits.

    Args:
        ladders: the levels of all matrices.
        types: what they have now, within `room`.
        room: the bytes that all of them may take.
        rng: what is drawn from.
    """
    level_of = {ladder.pattern: ladder.level_of(types[ladder.pattern]) for ladder in ladders}
    left = room - bytes_of(ladders, types)
    can_fall = [ladder for ladder in ladders if level_of[ladder.pattern] > 0]
    count = min(rng.randint(1, MOST_SWITCHES), rng.randint(1, MOST_SWITCHES), len(can_fall))
    fallen = rng.sample(can_fall, count)
    for ladder in fallen:
        level = level_of[ladder.pattern]
        left += ladder.levels[level].num_bytes - ladder.levels[level - 1].num_bytes
        level_of[ladder.pattern] = level - 1
    can_rise = [ladder for ladder in ladders if ladder not in fallen]
    for ladder in rng.sample(can_rise, len(can_rise)):
        level = level_of[ladder.pattern]
        if level + 1 == len(ladder.levels):
            continue
        more = ladder.levels[level + 1].num_bytes - ladder.levels[level].num_bytes
        if more <= left:
            left -= more
            level_of[ladder.pattern] = level + 1
    return {ladder.pattern: ladder.levels[level_of[ladder.pattern]].name for ladder in ladders}
