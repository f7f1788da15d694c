"""Choose one option of each item so that the sum of damages is least within a budget of bytes.

A multiple-choice knapsack. For a price of a byte, each item takes the option whose damage and bytes together cost
least; the price is bisected until the budget is met (Lagrange), and what is left over is spent on single steps that
take off most damage a byte. What is lost against the optimum is at most what one step could take off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Halvings of the price of a byte.
_HALVINGS = 100


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


def choose(items: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """Return an option of each item; None where even the smallest ones take more than the budget."""
    smallest = [min(options, key=lambda each: (each.num_bytes, each.damage)) for options in items]
    if sum(each.num_bytes for each in smallest) > budget:
        return None
    low, high = 0.0, _dearest(items)
    chosen = smallest
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        asked = [_cheapest(options, price) for options in items]
        if sum(each.num_bytes for each in asked) <= budget:
            chosen, high = asked, price
        else:
            low = price
    return _spend(items, chosen, budget)


def _cheapest(options: Sequence[Option], price: float) -> Option:
    return min(options, key=lambda each: (each.damage + price * each.num_bytes, each.num_bytes))


def _dearest(items: Sequence[Sequence[Option]]) -> float:
    """Return a price of a byte at which every item takes its smallest option."""
    worst = max((option.damage for options in items for option in options), default=0.0)
    return 2 * worst + 1.0


def _spend(items: Sequence[Sequence[Option]], chosen: list[Option], budget: int) -> list[Option]:
    """Spend what is left over, step by step, where it takes off most damage a byte."""
    chosen = list(chosen)
    left = budget - sum(each.num_bytes for each in chosen)
    while True:
        best: tuple[float, int, Option] | None = None
        for place, (options, now) in enumerate(zip(items, chosen, strict=True)):
            for option in options:
                more, better = option.num_bytes - now.num_bytes, now.damage - option.damage
                if better > 0 and more <= left:
                    worth = better / more if more > 0 else float("inf")
                    if best is None or worth > best[0]:
                        best = (worth, place, option)
        if best is None:
            return chosen
        _, place, option = best
        left -= option.num_bytes - chosen[place].num_bytes
        chosen[place] = option
