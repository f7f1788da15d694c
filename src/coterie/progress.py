"""How far a run is, and how long it will take: bars on a terminal, elsewhere a line now and then.

    with waiting([StageTime(name="measuring", seconds=60, tokens=131_072), StageTime(name="compressing", seconds=20)]):
        for layer in track(layers, "measuring", total=len(layers)):
            for batch in batches:
                ...
                advance(1 / len(batches))

A run says its stages beforehand, each with the seconds that it is reckoned to take: by operations and bytes, so that
stages are known in proportion to each other. What is measured then corrects all that is to come: from the first unit of
the first stage on, the seconds that were reckoned are multiplied with those that it really took. Stages are numbered.

On a terminal a bar shows them, on stderr, and goes when the run is over. Elsewhere (``nohup``, a file) what is said is
logged: a line when the time of the whole is known, a line a stage, and at most one a minute; of runs that take less
than `SHORT` seconds, nothing. Only this file knows rich.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")

#: Runs shorter than so many seconds say nothing in lines.
SHORT = 10.0

#: Seconds between two lines of one stage.
BETWEEN_LINES = 60.0

#: Share of a stage behind which what was measured counts a third only: what came last says most of what comes next.
_RECENT = 0.25

#: Share of a stage that what the stages before took counts as much as, in its own beginning.
_BEFORE = 0.02

_is_wanted = True


def show_bars(wanted: bool) -> None:
    """Say whether bars are drawn at all, for this process; they are by default."""
    global _is_wanted
    _is_wanted = wanted


def are_bars_drawn() -> bool:
    """Return whether a bar would be seen: stderr is a terminal, and nobody has asked for none."""
    return _is_wanted and sys.stderr.isatty()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """A stage of a run.

    Attributes:
        name: what is done; `track` is called with the same name.
        seconds: how long it was reckoned to take; 0 where nobody knows.
        tokens: tokens that go through the whole model in it; 0 where none do.
        reading: seconds of these that go into reading and writing weights.
    """

    name: str
    seconds: float = 0.0
    tokens: int = 0
    reading: float = 0.0


class Timetable:
    """The stages of a run, how far it is, and how long the rest takes."""

    def __init__(self, stages: Sequence[StageTime], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin before the first stage.

        Args:
            stages: in their order.
            clock: seconds since whenever.
        """
        self.stages = tuple(stages)
        self.position = -1
        self.share = 0.0
        self.clock = clock
        self._reckoned = all(stage.seconds > 0 for stage in self.stages)
        self._begun = self._at = clock()
        # Over all stages, and over the recent part of the one under way: seconds as reckoned, and as they were.
        self._all = [0.0, 0.0]
        self._recent = [0.0, 0.0]
        self._before: float | None = None

    @property
    def stage(self) -> StageTime:
        """The stage under way."""
        return self.stages[self.position]

    @property
    def title(self) -> str:
        """The stage under way with its number, where there are several."""
        many = len(self.stages) > 1
        return f"{self.position + 1} of {len(self.stages)}: {self.stage.name}" if many else self.stage.name

    def next(self, name: str) -> int | None:
        """Return the number of the stage of that name which is under way or comes next; None where none is."""
        if self.position >= 0 and self.share < 1 and self.stage.name == name:
            return self.position
        later = range(self.position + 1, len(self.stages))
        return next((number for number in later if self.stages[number].name == name), None)

    def begin(self, number: int) -> None:
        """Go on to a stage; those in between are left out."""
        self._before = self._pace(self._all)
        self.position, self.share, self._recent, self._at = number, 0.0, [0.0, 0.0], self.clock()

    def reach(self, share: float) -> None:
        """Say that so much of the stage is done; less than before is nothing new."""
        gained = (1.0 if share > 1 - 1e-9 else share) - self.share
        if gained <= 0:
            return
        now = self.clock()
        reckoned, took = gained * self._weight(self.stage), now - self._at
        decay = math.exp(-gained / _RECENT)
        self._recent = [self._recent[0] * decay + reckoned, self._recent[1] * decay + took]
        self._all = [self._all[0] + reckoned, self._all[1] + took]
        self.share, self._at = self.share + gained, now

    @property
    def stage_seconds_left(self) -> float | None:
        """Seconds until the stage under way is over; None where nothing says so yet."""
        recent = self._recent
        weight = self._weight(self.stage)
        if self._before is not None:
            some = _BEFORE * weight
            recent = [recent[0] + some, recent[1] + some * self._before]
        pace = self._pace(recent)
        if pace is None and self._reckoned:
            pace = 1.0
        if pace is None:
            return None
        return max(0.0, (1 - self.share) * weight * pace - (self.clock() - self._at))

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the run is over; None where nothing says so yet."""
        here = self.stage_seconds_left if self.position >= 0 else 0.0
        later = self.stages[self.position + 1 :]
        pace = self._pace(self._all) or (1.0 if self._reckoned else None)
        if here is None or pace is None or any(stage.seconds <= 0 for stage in later):
            return None
        return here + pace * sum(stage.seconds for stage in later)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self._begun

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that went through the whole model in a second of this stage, of late; None where none do."""
        reckoned, took = self._recent
        if not self.stage.tokens or took <= 0:
            return None
        return self.stage.tokens * reckoned / self._weight(self.stage) / took

    def expected(self) -> dict[str, float]:
        """Return the seconds that each stage from the one under way on takes from now on, by its name."""
        pace = self._pace(self._all) or 1.0
        later = {stage.name: pace * stage.seconds for stage in self.stages[self.position + 1 :]}
        return {self.stage.name: self.stage_seconds_left or 0.0} | later

    @staticmethod
    def _weight(stage: StageTime) -> float:
        return stage.seconds or 1.0

    @staticmethod
    def _pace(sums: Sequence[float]) -> float | None:
        return sums[1] / sums[0] if sums[0] > 0 else None


class _Shown(Protocol):
    """How progress is shown."""

    def stage(self, timetable: Timetable) -> None:
        """A stage has begun."""

    def moved(self, timetable: Timetable, *, known: bool) -> None:
        """The stage has moved; `known` once a whole unit of it was measured."""

    def other(self, items: Iterable[Item], name: str, total: float | None) -> Iterator[Item]:
        """Yield items of what is no stage of the run."""

    def close(self) -> None:
        """The run is over."""


class Lines:
    """Progress in lines of the log."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        """Say nothing yet; `say` takes a line."""
        self._say = say or log.info
        self._last: float | None = None
        self._announced = False

    def stage(self, timetable: Timetable) -> None:
        """Say that a stage has begun, and how long all takes that is left."""
        left = timetable.seconds_left
        if timetable.seconds + (left or 0.0) < SHORT:
            return
        so_far = self._announced or timetable.position > 0
        basis = "" if so_far else ", as reckoned before anything is measured"
        rest = "" if left is None else f"; about {duration(left)} in all{' from here' if so_far else ''}{basis}"
        self._say(f"{timetable.title}{rest}")
        self._last = timetable.clock()

    def moved(self, timetable: Timetable, *, known: bool) -> None:
        """Say how long it takes, once that is known, and then at most once a minute."""
        left = timetable.seconds_left if known else None
        if left is not None and not self._announced:
            self._announced = True
            if timetable.seconds + left >= SHORT:
                self._say(announced(timetable))
                self._last = timetable.clock()
            return
        if self._last is None:
            self._last = timetable.clock()
        if timetable.share < 1 and timetable.clock() - self._last >= BETWEEN_LINES:
            self._say(line_of(timetable))
            self._last = timetable.clock()

    def other(self, items: Iterable[Item], name: str, total: float | None) -> Iterator[Item]:
        """Yield the items; nothing is said of them."""
        yield from items

    def close(self) -> None:
        """Do nothing."""


class _Bar:
    """Progress as a bar of rich on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[says]}"), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._progress.start()
        self._task: Any = None
        self._announced = False

    def stage(self, timetable: Timetable) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        says = _Says(timetable)
        self._task = self._progress.add_task(timetable.title, total=1.0, says=says)

    def moved(self, timetable: Timetable, *, known: bool) -> None:
        self._progress.update(self._task, completed=timetable.share)
        left = timetable.seconds_left if known else None
        if left is not None and not self._announced:
            self._announced = True
            if timetable.seconds + left >= SHORT:
                log.info("%s", announced(timetable))

    def other(self, items: Iterable[Item], name: str, total: float | None) -> Iterator[Item]:
        task = self._progress.add_task(name, total=total, says="")
        try:
            for item in items:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def close(self) -> None:
        self._progress.stop()


class _Says:
    """What stands behind a bar; written anew each time that it is drawn, so that time runs between two moves."""

    def __init__(self, timetable: Timetable) -> None:
        self._timetable = timetable

    def __str__(self) -> str:
        return speed_and_time(self._timetable)


@dataclass(slots=True)
class _Run:
    """The run that is shown."""

    timetable: Timetable
    shown: _Shown
    start: float = 0.0  # share of the stage where the item under way begins
    width: float = 0.0  # share of the stage that it is
    within: float = 0.0  # share of the item that is done
    known_from: float = math.inf  # share of the stage from which on its first unit is measured
    scale: float = 1.0  # share of the item that `within` is about
    bound: float = 1.0  # share of the item that is done at most before that is over

    def move(self) -> None:
        self.timetable.reach(self.start + self.width * self.within)
        self.shown.moved(self.timetable, known=self.timetable.position > 0 or self.timetable.share >= self.known_from)


_current: ContextVar[_Run | None] = ContextVar("coterie_progress", default=None)


@contextmanager
def waiting(
    stages: Sequence[StageTime], *, clock: Callable[[], float] = time.monotonic, shown: _Shown | None = None
) -> Iterator[None]:
    """Within the block, show how far a run of these stages is; inside of another run, that one goes on being shown.

    Args:
        stages: in their order; some may be left out as the run goes.
        clock: seconds since whenever.
        shown: how it is shown; None for a bar where one would be seen, else `Lines`.
    """
    if _current.get() is not None or not stages:
        yield
        return
    run = _Run(Timetable(stages, clock=clock), shown or (_Bar() if are_bars_drawn() else Lines()))
    _current.set(run)
    try:
        yield
    finally:
        _current.set(None)
        run.shown.close()


def track(
    items: Iterable[Item],
    name: str,
    total: float | None = None,
    *,
    weight: Callable[[Item], float] | None = None,
    largest: float = 1.0,
) -> Iterator[Item]:
    """Yield the items of a stage, and show how far it is.

    Args:
        items: as they come; the work on one is done when the next is asked for.
        name: of the stage, see `waiting`. What is no stage of the run that is shown is shown beside it.
        total: how many there are, or their weight together; None where nobody knows.
        weight: of an item; 1 when None.
        largest: weight of the largest item; when so much is done, the time is taken to be measured.
    """
    run = _current.get()
    if run is None:
        with waiting([StageTime(name=name)]):
            yield from track(items, name, total, weight=weight, largest=largest)
        return
    number = run.timetable.next(name)
    if number is None or not total:
        width, run.width = run.width, 0.0
        try:
            yield from run.shown.other(items, name, total)
        finally:
            run.width = width
        return
    if number != run.timetable.position:
        run.timetable.begin(number)
        run.shown.stage(run.timetable)
    run.start, run.within, run.known_from = run.timetable.share, 0.0, min(1.0, largest / total) * (1 - 1e-9)
    for item in items:
        run.width, run.within = (1.0 if weight is None else weight(item)) / total, 0.0
        yield item
        run.within = 1.0
        run.move()
        run.start, run.width = run.start + run.width, 0.0
    run.start, run.width = 1.0, 0.0
    run.move()


def advance(share: float) -> None:
    """Say that so much more is done of the item that `track` gave last; more than all of it does no harm."""
    run = _current.get()
    if run is not None and run.width:
        run.within = max(run.within, min(run.bound, run.within + share * run.scale))
        run.move()


@contextmanager
def within(share: float) -> Iterator[None]:
    """Within the block, what `advance` is told is about so much of the item; after it all of that is done."""
    run = _current.get()
    if run is None:
        yield
        return
    scale, bound = run.scale, run.bound
    end = min(bound, run.within + share * scale)
    run.scale, run.bound = share * scale, end
    try:
        yield
    finally:
        run.scale, run.bound = scale, bound
    if run.width:
        run.within = max(run.within, end)
        run.move()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Within the block, a stage of the run that is shown is under way; what it consists of nobody can count."""
    for _ in track((None,), name, 1):
        yield


def announced(timetable: Timetable) -> str:
    """Say how long a run takes, stage by stage, once its first unit is measured."""
    left = timetable.seconds_left or 0.0
    stages = ""
    if len(timetable.stages) > 1:
        stages = ": " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in timetable.expected().items())
    return f"time: about {duration(left)} from here{stages}"


def line_of(timetable: Timetable) -> str:
    """Say in a line how far a run is."""
    said = speed_and_time(timetable)
    return f"{timetable.title}, {100 * timetable.share:.0f} %{f'; {said}' if said else ''}"


def speed_and_time(timetable: Timetable) -> str:
    """Say how fast tokens go through, how long the stage takes, and how long all that comes after it."""
    speed, here, left = timetable.tokens_per_second, timetable.stage_seconds_left, timetable.seconds_left
    parts = [] if speed is None else [f"{speed:,.0f} tokens/s"]
    if here is not None:
        parts.append(f"{duration(here)} left")
    if left is not None and timetable.position + 1 < len(timetable.stages):
        parts.append(f"{duration(left)} for all")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Write a duration as people say it: ``40 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def total_weight(weights: Mapping[str, float]) -> tuple[float, float]:
    """Return the sum of weights and the largest of them, at least a hair more than nothing."""
    return max(1e-9, sum(weights.values())), max(1e-9, *weights.values(), 1e-9)
