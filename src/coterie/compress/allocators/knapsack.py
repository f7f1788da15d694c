"""Choose one option of each item so that the sum of damages is least within a budget of bytes.

A multiple-choice knapsack, answered in two ways. `choose`: for a price of a byte, each item takes the option whose
damage and bytes together cost least; the price is bisected until the budget is met (Lagrange), and what is left over is
spent on single steps that take off most damage a byte. What is lost against the optimum is at most what one step could
take off, and `least_damage` says how much it can be. `choose_exactly`: an integer program, solved by HiGHS.

Legend: N items, O options of an item, padded.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

log = logging.getLogger(__name__)

#: Halvings of the price of a byte.
_HALVINGS = 100

#: Nodes of the tree of an integer program that are looked at; what was the best by then is taken. Time is no limit: a
#: run that goes on has to find what it found before.
NODES = 2_000

#: What the largest damage counts in an integer program: its solver takes 1e-6 for nothing.
_SCALE = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One thing that an item can become.

    Attributes:
        name: what it is called.
        num_bytes: what it takes.
        damage: what it costs.
    """

    name: str
    num_bytes: int
    damage: float


class _Step(NamedTuple):
    """An item and an option that it could take, how often it took one before; those that are worth most come first."""

    order: float
    place: int
    number: int
    version: int


class _Prices:
    """What items take at a price of a byte, all at once; and the price at which that just fits a budget."""

    def __init__(self, items: Sequence[Sequence[Option]], budget: int) -> None:
        """Bisect the price: at `high` what items take fits, at `low` it does not, or there is no lower one."""
        # Options from small to large, so that of those that cost the same the smallest is taken.
        self._sorted = [sorted(options, key=lambda each: (each.num_bytes, each.damage)) for options in items]
        most = max((len(options) for options in items), default=0)
        self._damage_NO = np.full((len(items), most), np.inf)
        self._bytes_NO = np.zeros((len(items), most), dtype=np.int64)
        for row, options in enumerate(self._sorted):
            self._damage_NO[row, : len(options)] = [option.damage for option in options]
            self._bytes_NO[row, : len(options)] = [option.num_bytes for option in options]
        self.least = sum(options[0].num_bytes for options in self._sorted)
        self._more_NO = self._bytes_NO - self._bytes_NO[:, :1]
        self._left = budget - self.least
        worst = max((option.damage for options in items for option in options), default=0.0)
        self.low, self.high = 0.0, 2 * worst + 1.0
        for _ in range(_HALVINGS):
            price = (self.low + self.high) / 2
            if self._more(price) <= self._left:
                self.high = price
            else:
                self.low = price

    def chosen(self) -> list[Option]:
        """Return what items take at the lowest price at which that fits."""
        return [options[number] for options, number in zip(self._sorted, self._cheapest(self.high), strict=True)]

    def dual(self, price: float) -> float:
        """Return the Lagrangian dual; bytes of smallest options are counted on neither side, as they are sure."""
        cost_NO = self._damage_NO + price * self._more_NO
        return math.fsum(cost_NO.min(axis=1).tolist()) - price * self._left

    def _cheapest(self, price: float) -> list[int]:
        cost_NO = self._damage_NO + price * self._more_NO
        numbers: list[int] = cost_NO.argmin(axis=1).tolist() if cost_NO.size else []
        return numbers

    def _more(self, price: float) -> int:
        numbers = self._cheapest(price)
        return int(self._more_NO[np.arange(len(numbers)), numbers].sum()) if numbers else 0


def choose(items: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """Return an option of each item; None where even the smallest ones take more than the budget."""
    prices = _Prices(items, budget)
    return None if prices.least > budget else _spend(items, prices.chosen(), budget)


def choose_exactly(
    items: Sequence[Sequence[Option]],
    budget: int,
    *,
    at_least: Mapping[str, int] | None = None,
    nodes: int = NODES,
) -> list[Option] | None:
    """Return the options of least damage: an integer program, solved by HiGHS.

    Args:
        items: what there is to choose from.
        budget: the bytes that all options together may take.
        at_least: how many items have to take an option of a name, by name.
        nodes: how many the solver may look at; where it is not done by then, its best is taken, and that is logged.

    Returns:
        An option of each item; None where no choice is within the budget, and has as many of each name as it has to.
    """
    floors = dict(at_least or {})
    lagrange = choose(items, budget)
    if lagrange is None:
        return None
    solved = _solve(items, budget, floors, nodes) if items else []
    candidates = [each for each in (solved, lagrange) if each is not None and _enough(each, floors)]
    return min(candidates, key=_damage_of) if candidates else None


def choose_within(items: Sequence[Sequence[Option]], budget: int, gap: float) -> list[Option] | None:
    """Return the options of `choose` where they are near enough to the best, else those of `choose_exactly`.

    Args:
        items: what there is to choose from.
        budget: the bytes that all options together may take.
        gap: the share of the damage that may be more than the least that is possible, see `gap_of`.
    """
    chosen = choose(items, budget)
    if chosen is None or (off := gap_of(items, chosen, budget)) <= gap:
        return chosen
    log.info("up to %.2f %% of the damage could be saved: an integer program is asked as well", 100 * off)
    return choose_exactly(items, budget)


def least_damage(items: Sequence[Sequence[Option]], budget: int) -> float:
    """Return a lower bound of the damage of every choice within a budget.

    It is the largest value of the Lagrangian dual: at a price of a byte, what items cost at least, less what the budget
    is worth. That is no more than the damage of any choice within the budget, whatever the price; infinite where there
    is no such choice.
    """
    prices = _Prices(items, budget)
    if prices.least > budget:
        return math.inf
    return max(0.0, *(prices.dual(price) for price in (0.0, prices.low, prices.high))) if items else 0.0


def gap_of(items: Sequence[Sequence[Option]], chosen: Sequence[Option], budget: int) -> float:
    """Return by which share of its own the damage of a choice may exceed the least that is possible, 0 to 1."""
    damage = _damage_of(chosen)
    return 0.0 if damage <= 0 else min(1.0, max(0.0, 1 - least_damage(items, budget) / damage))


def lower_hull(options: Iterable[Option]) -> list[Option]:
    """Return the options that cost least at some price of a byte, from small to large."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda each: (each.num_bytes, each.damage)):
        if hull and option.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _above(first: Option, middle: Option, last: Option) -> bool:
    """Tell whether one option lies on or above the line between a smaller and a larger one."""
    rise = (middle.damage - first.damage) * (last.num_bytes - first.num_bytes)
    return rise >= (last.damage - first.damage) * (middle.num_bytes - first.num_bytes)


def _bytes_of(chosen: Sequence[Option]) -> int:
    return sum(option.num_bytes for option in chosen)


def _damage_of(chosen: Sequence[Option]) -> float:
    return math.fsum(option.damage for option in chosen)


def _enough(chosen: Sequence[Option], floors: Mapping[str, int]) -> bool:
    return all(sum(option.name == name for option in chosen) >= floor for name, floor in floors.items())


def _spend(items: Sequence[Sequence[Option]], chosen: list[Option], budget: int) -> list[Option]:
    """Spend what is left over, step by step, where it takes off most damage a byte; of equal steps the first."""
    chosen = list(chosen)
    left = budget - _bytes_of(chosen)
    taken = [0] * len(items)
    steps = [step for place, options in enumerate(items) for step in _steps(options, chosen[place], place, 0)]
    heapq.heapify(steps)
    while steps:
        _, place, number, version = heapq.heappop(steps)
        option = items[place][number]
        more = option.num_bytes - chosen[place].num_bytes
        # A step that does not fit never will: those that free bytes come first.
        if version == taken[place] and more <= left:
            left -= more
            chosen[place], taken[place] = option, version + 1
            for step in _steps(items[place], option, place, version + 1):
                heapq.heappush(steps, step)
    return chosen


def _steps(options: Sequence[Option], now: Option, place: int, version: int) -> Iterator[_Step]:
    """Yield what an item could take instead, and be better."""
    for number, option in enumerate(options):
        more, better = option.num_bytes - now.num_bytes, now.damage - option.damage
        if better > 0:
            yield _Step(-better / more if more > 0 else -math.inf, place, number, version)


def _solve(
    items: Sequence[Sequence[Option]], budget: int, floors: Mapping[str, int], nodes: int
) -> list[Option] | None:
    """Return what HiGHS finds, looked over in whole numbers; None where it finds nothing that is within the budget."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(place, option) for place, options in enumerate(items) for option in options]
    places = np.array([place for place, _ in flat])
    least = [min(option.num_bytes for option in options) for options in items]
    # The bytes above the least, in the largest unit in which all are whole: tolerances of the solver are absolute.
    more = [option.num_bytes - least[place] for place, option in flat]
    unit = math.gcd(*more) or 1
    left = (budget - sum(least)) // unit
    damages = np.array([option.damage for _, option in flat])
    largest = float(damages.max())
    one_each = csr_array((np.ones(len(flat)), (places, np.arange(len(flat)))), shape=(len(items), len(flat)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(np.array([each // unit for each in more], dtype=float)[None], -np.inf, float(left)),
    ]
    for name, floor in floors.items():
        named = np.array([float(option.name == name) for _, option in flat])
        constraints.append(LinearConstraint(named[None], float(floor), np.inf))
    answer = milp(
        damages * (_SCALE / largest if largest > 0 else 1.0),
        integrality=np.ones(len(flat), dtype=np.int64), bounds=Bounds(0, 1), constraints=constraints,
        options={"mip_rel_gap": 0.0, "node_limit": nodes},
    )  # fmt: skip
    if answer.x is None:
        return None
    if answer.status != 0:
        log.info("the integer program was not solved within %d nodes: its best answer so far is taken", nodes)
    taken: list[tuple[float, Option] | None] = [None] * len(items)
    for share, (place, option) in zip(answer.x, flat, strict=True):
        if (best := taken[place]) is None or share > best[0]:
            taken[place] = (float(share), option)
    chosen = [each[1] for each in taken if each is not None]
    if _bytes_of(chosen) > budget:
        return None
    spent = _spend(items, chosen, budget)
    return spent if _enough(spent, floors) else chosen
