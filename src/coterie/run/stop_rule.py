"""How many tokens to guess before a pass of the model checks them, and whether to guess at all.

A guess is worth checking as long as the tokens that it is expected to bring, per second that it costs, are more than
come out anyway. What it brings is the probability that it and all guesses before it are right, each by a logistic fit
on its probability, the entropy of what it was drawn from and its position, made anew as guesses turn out right or
wrong; the product of these, and that guessing ends where 1 less the product is over a threshold, are SpecDec++'s
(2405.19715). What it costs is the time of a wider pass and of the experts that the wider pass has to read: where
experts are read from a disk, guesses that widen a pass may take longer than the passes that they save. All times are
those of the passes so far.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

#: Guesses of one round at most.
MOST = 8

#: Where the probability that some guess is wrong is more than this, no more are made (SpecDec++).
THRESHOLD = 0.7

#: Rounds, every second of them without guesses, in which it is looked at what guesses are worth; how many of either
#: kind are needed to judge; how many tokens it is left alone for the first time after they were worth nothing, twice as
#: many each time; and of so many rounds, one is without guesses, so that it is known what these take.
_TRIAL, _ENOUGH, _REST, _COMPARE = 32, 12, 256, 16

#: Share of a mean that the last value has.
_NEW = 0.1

#: Experts that n tokens miss grow like n to the power of this: those of a text choose alike (measured on two models).
_GROWTH = 0.65


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """A token that may come next.

    Attributes:
        token: its id.
        probability: what whoever guessed it gives it; None where that is not known.
        entropy: of what it was drawn from, in nats.
        misses: experts that it is expected to miss: those that the token before it wanted and that were not in memory,
            but for those that an earlier token of the round wanted too; None where nothing is known of it.
    """

    token: int
    probability: float | None = None
    entropy: float = 0.0
    misses: int | None = None

    def features(self, position: int) -> tuple[float, ...]:
        """Return what its acceptance is foretold by: a constant, log odds, entropy, and position in the round."""
        odds = 0.0 if self.probability is None else min(max(self.probability, 1e-4), 1 - 1e-4)
        logit = math.log(odds / (1 - odds)) if odds else 0.0
        return (1.0, logit, self.entropy, position / MOST)


class Acceptance:
    """The probability that a guess is right: a logistic fit on its features, with those seen last."""

    def __init__(self, *, last: int = 256, every: int = 16) -> None:
        """Begin with the probability that whoever guesses gives it himself.

        Args:
            last: guesses that are fitted.
            every: guesses after which it is fitted anew.
        """
        self.prior = np.array([0.0, 1.0, 0.0, 0.0])
        self.weights = self.prior.copy()
        self._last, self._every = last, every
        self._rows: list[tuple[float, ...]] = []
        self._right: list[bool] = []
        self._num_new = 0

    def probability(self, guess: Guess, position: int) -> float:
        """Return the probability that a guess is right, given that all before it in its round are."""
        return float(_logistic(np.array(guess.features(position)) @ self.weights))

    def learn(self, guess: Guess, position: int, *, is_right: bool) -> None:
        """Take note of a guess that was checked."""
        self._rows.append(guess.features(position))
        self._right.append(is_right)
        del self._rows[: -self._last], self._right[: -self._last]
        self._num_new += 1
        if self._num_new >= self._every:
            self._num_new = 0
            self.weights = fit_logistic(np.array(self._rows), np.array(self._right, dtype=float), self.prior)


def fit_logistic(
    rows_NF: NDArray[np.float64], right_N: NDArray[np.float64], prior_F: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weights (F) of a logistic regression whose prior is normal, of variance 1, by Newton's steps.

    Args:
        rows_NF: features.
        right_N: 1 or 0 for each row.
        prior_F: mean of the prior.
    """
    weights_F = prior_F.copy()
    for _ in range(12):
        chance_N = _logistic(rows_NF @ weights_F)
        slope_F = rows_NF.T @ (chance_N - right_N) + (weights_F - prior_F)
        curve_FF = (rows_NF * (chance_N * (1 - chance_N))[:, None]).T @ rows_NF + np.eye(len(prior_F))
        step_F = np.linalg.solve(curve_FF, slope_F)
        weights_F = weights_F - step_F
        if np.abs(step_F).max() < 1e-9:
            break
    return weights_F


def _logistic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -30, 30))))


class Costs:
    """Seconds of passes and guesses, as measured so far: a + b tokens + c misses for a pass."""

    def __init__(self) -> None:
        """Know nothing."""
        self.guess = 0.0
        self._sums = np.zeros((2, 2))
        self._times = np.zeros(2)
        self._waited = self._missed = 0.0
        self._misses: float | None = None

    def learn_pass(self, tokens: int, seconds: float, waited: float, misses: int) -> None:
        """Take note of a pass of some tokens: its seconds, those that it waited for experts, and what it missed."""
        row = np.array([1.0, tokens])
        self._sums = (1 - _NEW / 2) * self._sums + np.outer(row, row)
        self._times = (1 - _NEW / 2) * self._times + row * max(0.0, seconds - waited)
        self._waited, self._missed = (1 - _NEW / 2) * self._waited + waited, (1 - _NEW / 2) * self._missed + misses
        one = misses / tokens**_GROWTH
        self._misses = one if self._misses is None else self._misses + _NEW * (one - self._misses)

    def learn_guess(self, seconds: float) -> None:
        """Take note of a guess."""
        self.guess += (_NEW if self.guess else 1.0) * (seconds - self.guess)

    @property
    def each(self) -> tuple[float, float]:
        """Seconds of a pass without tokens or misses, and of each token; none of them is below 0."""
        count, mean = self._sums[0, 0], self._sums[0, 1]
        spread = count * self._sums[1, 1] - mean**2
        if not count:
            return 0.0, 0.0
        token = (count * self._times[1] - mean * self._times[0]) / spread if spread > 1e-9 * count**2 else 0.0
        token = min(max(token, 0.0), self._times[0] / mean)
        return float((self._times[0] - token * mean) / count), float(token)

    @property
    def miss(self) -> float:
        """Seconds that a missed expert is waited for."""
        return self._waited / self._missed if self._missed else 0.0

    def misses(self, tokens: int) -> float:
        """Return how many experts a pass of some tokens is expected to miss."""
        return (self._misses or 0.0) * float(tokens**_GROWTH)

    def pass_seconds(self, tokens: int, misses: float) -> float:
        """Return the seconds of a pass."""
        begin, token = self.each
        return begin + token * tokens + self.miss * misses


@dataclass(slots=True)
class _Rate:
    """Tokens and seconds of rounds of one kind, of which old ones count less."""

    rounds: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    misses: float = 0.0

    def add(self, tokens: int, seconds: float, misses: int) -> None:
        """Add a round."""
        self.rounds += 1
        for name, value in (("tokens", tokens), ("seconds", seconds), ("misses", misses)):
            setattr(self, name, (1 - _NEW / 2) * getattr(self, name) + value)

    @property
    def per_second(self) -> float:
        """Tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)


class StopRule(ABC):
    """Says how long a round goes on."""

    @abstractmethod
    def begins(self) -> bool:
        """Return whether the round that begins has guesses at all."""

    @abstractmethod
    def goes_on(self, guesses: Sequence[Guess]) -> bool:
        """Return whether another guess is to be made after some, which may be none."""

    @abstractmethod
    def takes(self, guesses: Sequence[Guess]) -> bool:
        """Return whether the last of some guesses is worth checking."""

    @abstractmethod
    def learn(self, checked: Round) -> None:
        """Take note of a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What guesses and the pass that checked them took, and brought.

    Attributes:
        guesses: those that were checked.
        num_right: how many of them were right.
        guessing: seconds of guessing.
        seconds: seconds of the pass.
        waited: those of them that it waited for experts.
        misses: experts that were not in memory.
    """

    guesses: Sequence[Guess]
    num_right: int
    guessing: float
    seconds: float
    waited: float
    misses: int


class FixedLength(StopRule):
    """So many guesses in each round, come what may."""

    def __init__(self, length: int) -> None:
        """Take the number of guesses."""
        self.length = length

    def begins(self) -> bool:
        """Return True."""
        return True

    def goes_on(self, guesses: Sequence[Guess]) -> bool:
        """Return whether there are fewer."""
        return len(guesses) < self.length

    def takes(self, guesses: Sequence[Guess]) -> bool:
        """Return True."""
        return True

    def learn(self, checked: Round) -> None:
        """Take note of nothing."""


@dataclass
class Worth(StopRule):
    """Guesses as far as they pay, and none where they do not; see the module.

    Attributes:
        acceptance: the probability that a guess is right.
        costs: what passes and guesses take.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    costs: Costs = field(default_factory=Costs)
    _with: _Rate = field(default_factory=_Rate)
    _without: _Rate = field(default_factory=_Rate)
    _round: int = 0
    _resting: int = 0
    _rest: int = _REST
    _is_told: bool = False

    @property
    def is_resting(self) -> bool:
        """Whether guesses were not worth it lately, and none are made for a while."""
        return self._resting > 0

    def begins(self) -> bool:
        """Return whether the round that begins has guesses at all."""
        if self.is_resting:
            return False
        self._round += 1
        every = 2 if self._round <= _TRIAL else _COMPARE
        return self._round % every != 0

    def goes_on(self, guesses: Sequence[Guess]) -> bool:
        """Return whether another guess is to be made, if it is as likely right as the last one."""
        if not guesses:
            return True
        if len(guesses) >= MOST or 1 - self._all_right(guesses) > THRESHOLD:
            return False
        last = self.acceptance.probability(guesses[-1], len(guesses) - 1)
        return self._pays(len(guesses) + 1, self._all_right(guesses) * last, None, guess=self.costs.guess)

    def takes(self, guesses: Sequence[Guess]) -> bool:
        """Return whether checking the last one brings more tokens for its time than come out anyway."""
        return self._pays(len(guesses), self._all_right(guesses), guesses[-1].misses, guess=0.0)

    def learn(self, checked: Round) -> None:
        """Take note of a round; where guesses turn out not to be worth it, make none for a while, and say so once."""
        number = len(checked.guesses)
        self.costs.learn_pass(number + 1, checked.seconds, checked.waited, checked.misses)
        if number:
            self.costs.learn_guess(checked.guessing / number)
        for position, guess in enumerate(checked.guesses[: checked.num_right + 1]):
            self.acceptance.learn(guess, position, is_right=position < checked.num_right)
        rate = self._with if number else self._without
        rate.add(checked.num_right + 1, checked.guessing + checked.seconds, checked.misses)
        self._resting = max(0, self._resting - checked.num_right - 1)
        if min(self._with.rounds, self._without.rounds) < _ENOUGH or not number:
            return
        if self._with.per_second < self._without.per_second:
            self._stop()

    def _stop(self) -> None:
        if not self._is_told:
            log.warning(
                "drafts stop for now: %.2f tokens a second came out with them, %.2f without; %.1f experts were missed "
                "for a token, and %.1f without", self._with.per_second, self._without.per_second,
                self._with.misses / self._with.tokens, self._without.misses / self._without.tokens,
            )  # fmt: skip
        self._is_told = True
        self._resting, self._rest = self._rest, 2 * self._rest
        self._with, self._without, self._round = _Rate(), _Rate(), 0

    def _all_right(self, guesses: Sequence[Guess]) -> float:
        """Return the probability that all guesses are right."""
        return math.prod(self.acceptance.probability(guess, position) for position, guess in enumerate(guesses))

    def _pays(self, number: int, chance: float, misses: int | None, *, guess: float) -> bool:
        """Return whether a pass of one guess more is worth its time; as long as little is known, it is."""
        if self._round <= _TRIAL:
            return True
        costs = self.costs
        more = costs.misses(number + 1) - costs.misses(number) if misses is None else misses
        seconds = guess + costs.each[1] + costs.miss * more
        rate = max(1 / max(costs.pass_seconds(1, costs.misses(1)), 1e-9), self._without.per_second)
        return chance > rate * seconds
