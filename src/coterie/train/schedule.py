"""What each step of training sees, and how far it goes: orders of rows, and rates.

Both are functions of the step, counted from 0, and of nothing else: training that goes on at a step goes on as it would
have.

    schedule = Schedule(steps=100, rows=shuffled(1000, batch=8, seed=0), rate=lambda step: rate_at(step, 100, 0.02))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Steps in which the rate rises.
WARM_UP = 5

#: Share of the steps, the last ones, in which it falls.
FALL = 0.5

#: Numbers of the rows that a step sees.
Rows = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long is trained, on what, and how fast.

    Attributes:
        steps: steps of the optimiser.
        rows: step -> numbers of the rows that it sees, int64.
        rate: step -> its rate, in the unit of the optimiser.
    """

    steps: int
    rows: Rows
    rate: Callable[[int], float]


def rate_at(step: int, steps: int, rate: float, *, warm_up: int = WARM_UP, fall: float = FALL) -> float:
    """Return the rate of a step: it rises in a line, stays at `rate`, and at last falls in a line to nothing.

    Args:
        step: counted from 0.
        steps: steps in all.
        rate: the largest rate.
        warm_up: steps in which it rises.
        fall: share of the steps, the last ones, in which it falls.
    """
    return rate * min(1.0, (step + 1) / warm_up, (steps - step) / (fall * steps))


def falling_rate(step: int, steps: int, rate: float) -> float:
    """Return the rate of a step that falls from the first on, in a line, to nothing behind the last."""
    return rate * (1 - step / steps)


def shuffled(count: int, batch: int, seed: int) -> Rows:
    """Return an order in which each of `count` rows is seen once before one is seen again.

    Every epoch has an order of its own, which only `seed` and its number decide; a step may reach into the next one.
    """

    def rows(step: int) -> Tensor:
        positions = range(step * batch, (step + 1) * batch)
        orders = {
            epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
            for epoch in {number // count for number in positions}
        }
        return torch.stack([orders[number // count][number % count] for number in positions])

    return rows


class Drawn:
    """An order in which each row is seen once before one is seen again, all epochs drawn from one generator.

    What is left of an epoch is filled up with the next one, and with no more: where a batch is larger than the number
    of rows, the first step has up to two epochs, and those behind it one.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        """Begin: `count` rows in all, `batch` of them in a step."""
        self._count = count
        self._batch = batch
        self._seed = seed
        self._begin()

    def __call__(self, step: int) -> Tensor:
        """Return the numbers of the rows of a step, which is quick where it follows on the one asked for before."""
        if step < self._next:
            self._begin()
        while True:
            rows_N = self._draw()
            if self._next > step:
                return rows_N

    def _begin(self) -> None:
        self._generator = torch.Generator().manual_seed(self._seed)
        self._left = torch.randperm(self._count, generator=self._generator)
        self._next = 0

    def _draw(self) -> Tensor:
        if len(self._left) < self._batch:
            self._left = torch.cat((self._left, torch.randperm(self._count, generator=self._generator)))
        rows_N, self._left = self._left[: self._batch], self._left[self._batch :]
        self._next += 1
        return rows_N


def all_rows(count: int) -> Rows:
    """Return the order in which every step sees all rows."""
    rows_N = torch.arange(count)
    return lambda step: rows_N
