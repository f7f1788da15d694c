"""Progress against a clock that the tests turn: what is forecast, what is said, and how often."""

import io
import itertools
import sys

import pytest

from coterie.progress import (
    Lines,
    StageTime,
    Timetable,
    advance,
    duration,
    line_of,
    stage,
    track,
    waiting,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


TWO = (StageTime(name="measuring", seconds=10, tokens=6000), StageTime(name="training", seconds=30))


def test_what_was_reckoned_is_said_until_something_is_measured(clock: Clock) -> None:
    table = Timetable(TWO, clock=clock)
    assert table.seconds_left is not None
    table.begin(0)
    assert (table.stage_seconds_left, table.seconds_left) == (10, 40)
    clock.now += 4  # nothing is finished yet, and time passes
    assert table.seconds_left == 36


def test_what_is_measured_corrects_the_stages_to_come(clock: Clock) -> None:
    table = Timetable(TWO, clock=clock)
    table.begin(0)
    clock.now += 6
    table.reach(0.2)  # reckoned were 2 seconds
    assert table.stage_seconds_left == pytest.approx(24)
    assert table.seconds_left == pytest.approx(24 + 3 * 30)
    assert table.expected() == {"measuring": pytest.approx(24), "training": pytest.approx(90)}
    assert table.tokens_per_second == pytest.approx(6000 * 0.2 / 6)
    clock.now += 24
    table.reach(1.0)
    table.begin(1)
    assert table.seconds_left == pytest.approx(90)
    clock.now += 15
    table.reach(0.5)  # it goes as it was reckoned after all
    assert table.seconds_left == pytest.approx(15, rel=0.1)
    assert table.tokens_per_second is None


def test_the_recent_past_says_what_comes_next(clock: Clock) -> None:
    """Layers that an earlier run had finished come by quickly."""
    table = Timetable([StageTime(name="compressing")], clock=clock)
    table.begin(0)
    assert table.seconds_left is None
    for number in range(50):
        clock.now += 0.01
        table.reach((number + 1) / 100)
    assert table.seconds_left == pytest.approx(0.5)
    for number in range(50, 80):
        clock.now += 10
        table.reach((number + 1) / 100)
    assert table.seconds_left == pytest.approx(200, rel=0.35)


def test_stages_without_reckoning_have_no_forecast_of_the_whole(clock: Clock) -> None:
    table = Timetable([StageTime(name="a"), StageTime(name="b")], clock=clock)
    table.begin(0)
    clock.now += 1
    table.reach(0.5)
    assert table.stage_seconds_left == pytest.approx(1)
    assert table.seconds_left is None


def test_a_run_in_lines(clock: Clock) -> None:
    """A line when it begins, one when a unit was measured, one a stage, and at most one a minute."""
    lines: list[tuple[float, str]] = []
    shown = Lines(lambda line: lines.append((clock.now - 1000, line)))
    with waiting(TWO, clock=clock, shown=shown):
        for _ in track(range(4), "measuring", 4):
            for _ in range(5):
                clock.now += 12
                advance(1 / 5)
        for _ in track(range(10), "training", 10):
            clock.now += 36
    said = [line for _, line in lines]
    assert said[0] == "1 of 2: measuring; about 40 s in all, as reckoned before anything is measured"
    assert said[1] == "time: about 15 min from here: measuring 3 min, training 12 min"
    assert said[2] == "1 of 2: measuring, 50 %; 25 tokens/s, 2 min left, 14 min for all"
    begun = next(number for number, line in enumerate(said) if line.startswith("2 of 2: training"))
    assert said[begun] == "2 of 2: training; about 12 min in all from here"
    times = [time for time, _ in lines]
    for part in (times[1:begun], times[begun:]):
        assert all(later - earlier >= 60 for earlier, later in itertools.pairwise(part))
    assert len(said) - begun == 5


def test_a_bar_moves_within_an_item(clock: Clock) -> None:
    shares: list[float] = []

    class Shown(Lines):
        def moved(self, timetable: Timetable, *, known: bool) -> None:
            shares.append(round(timetable.share, 6))

    with waiting([StageTime(name="a")], clock=clock, shown=Shown()):
        for _ in track("xyz", "a", 6, weight=lambda item: {"x": 1, "y": 4, "z": 1}[item], largest=4):
            advance(0.5)
            advance(0.4)
            advance(0.9)  # more than all of it is all of it
    sixth = 1 / 6
    expected = [0.5 * sixth, 0.9 * sixth, sixth, sixth, 3 * sixth, sixth + 3.6 * sixth, 5 * sixth, 5 * sixth]
    assert shares[:8] == pytest.approx(expected, abs=1e-5)
    assert shares[-1] == 1


def test_short_runs_say_nothing_and_stages_may_be_left_out(clock: Clock) -> None:
    lines: list[str] = []
    stages = [StageTime(name=name, seconds=1) for name in ("a", "b", "c")]
    with waiting(stages, clock=clock, shown=Lines(lines.append)):
        for _ in track(range(3), "a", 3):
            clock.now += 0.1
        with stage("c"):
            clock.now += 0.1
        assert list(track([1, 2], "b", 2)) == [1, 2]  # it is over: shown beside
        assert list(track([1, 2], "nobody named it")) == [1, 2]
    assert lines == []


def test_a_run_inside_of_another_is_part_of_it(clock: Clock) -> None:
    lines: list[str] = []
    with waiting([StageTime(name="cells")], clock=clock, shown=Lines(lines.append)):
        for _ in track(range(2), "cells", 2):
            with waiting(TWO, clock=clock, shown=Lines(lines.append)):
                for _ in track(range(2), "training", 2):
                    clock.now += 50
    assert lines[0] == "time: about 2 min from here"
    assert not any("training" in line for line in lines)


def test_an_error_ends_the_run(clock: Clock) -> None:
    def fail() -> None:
        for _ in track(range(2), "measuring", 2):
            raise KeyError

    with pytest.raises(KeyError), waiting(TWO, clock=clock, shown=Lines(lambda line: None)):
        fail()
    lines: list[str] = []
    with waiting([StageTime(name="next", seconds=100)], clock=clock, shown=Lines(lines.append)):
        list(track([1], "next", 1))
    assert lines[0].startswith("next; about 2 min in all")


def test_a_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with waiting(TWO, clock=clock):
        for number in track(range(4), "measuring", 4):
            clock.now += 5
            advance(0.5)
            assert list(track("ab", "something else", 2)) == ["a", "b"], number
    text = terminal.getvalue()
    assert "1 of 2: measuring" in text
    assert "tokens/s" in text
    assert "for all" in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3540, "59 min"), (3600, "1 h"), (12000, "3 h 20 min"),
     (49 * 3600, "2 d 1 h"), (48 * 3600, "2 d")],
)  # fmt: skip
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_line_of_what_nobody_knows(clock: Clock) -> None:
    table = Timetable([StageTime(name="writing")], clock=clock)
    table.begin(0)
    assert line_of(table) == "writing, 0 %"
