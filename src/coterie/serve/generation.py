"""Answers as they grow: their tokens as text, as calls of functions, and as numbers.

What becomes of a token is emitted as soon as nothing that follows changes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from coterie.run.batch import Outcome, Wanted
from coterie.run.engine import Sampling
from coterie.serve.metrics import Metrics
from coterie.serve.scores import ScoredToken, score_token
from coterie.serve.text import Text
from coterie.serve.tools import ToolCall, ToolForm, ToolText


class Generator(Protocol):
    """What generates: a `coterie.run.engine.Runtime`."""

    @property
    def tokenizer(self) -> object:
        """What turns tokens into text."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""

    @property
    def reused(self) -> int:
        """Tokens of the last prompt whose keys and values were there already."""

    @property
    def batch(self) -> int:
        """How many answers it makes at once, at most."""

    def generate_batch(self, wanted: Sequence[Wanted]) -> list[Outcome]:
        """Make answers, all at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be generated.

    Attributes:
        prompts: ids (1, S) of each prompt.
        num_answers: answers to each; they are numbered from prompt to prompt.
        max_tokens: tokens of an answer at most.
        sampling: how tokens are chosen; a seed is that of the first answer, and the next ones count on from it.
        stops: strings at which an answer ends.
        top: how many of the likeliest tokens are told beside each token, with logarithms of probabilities; None for
            no such thing.
        form: how functions are called, where the model may call some.
    """

    prompts: Sequence[Tensor]
    num_answers: int
    max_tokens: int
    sampling: Sampling
    stops: Sequence[str]
    top: int | None = None
    form: ToolForm | None = None

    @property
    def count(self) -> int:
        """Answers to all prompts."""
        return len(self.prompts) * self.num_answers

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(ids_1S.shape[1] for ids_1S in self.prompts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """More text of an answer.

    Attributes:
        answer: its number.
        text: what is new.
        tokens: the tokens that it comes from, where they are asked for.
    """

    answer: int
    text: str
    tokens: Sequence[ScoredToken] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Called:
    """A call of a function.

    Attributes:
        answer: the number of the answer.
        number: the number of the call in it.
        call: the call.
    """

    answer: int
    number: int
    call: ToolCall


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """An answer is whole.

    Attributes:
        answer: its number.
        reason: "stop" for the model's own end or a stop string, "tool_calls" where it calls functions, "length" where
            there was no more room.
        tokens: how many it has.
        reused: tokens of the prompt whose keys and values were there already.
    """

    answer: int
    reason: str
    tokens: int
    reused: int


class Answer:
    """An answer as it grows.

    Attributes:
        wanted: what a runtime is to make.
    """

    def __init__(
        self,
        runtime: Generator,
        task: Task,
        number: int,
        emit: Callable[[Piece | Called | Ended], None],
        *,
        cancelled: Callable[[], bool],
        when_over: Callable[[Exception | None], None],
        metrics: Metrics,
        asked: float,
    ) -> None:
        """Prepare it.

        Args:
            runtime: generates.
            task: what is asked for.
            number: the number of the answer, over all prompts.
            emit: gets what comes, as it comes.
            cancelled: asked before every layer; ends the generation where it says so.
            when_over: called once no more comes, with what ended it, if it was not done.
            metrics: counts what happens.
            asked: when the request came, by `time.perf_counter`.
        """
        self._runtime, self._task, self._number, self._emit = runtime, task, number, emit
        self._metrics, self._asked, self._when_over = metrics, asked, when_over
        self._last: float | None = None
        self.wanted = Wanted(
            ids_1S=task.prompts[number // task.num_answers], max_tokens=task.max_tokens,
            sampling=task.sampling.counted_on(number), on_token=self._take, cancelled=cancelled, on_end=self._end,
        )  # fmt: skip
        self._text = Text(runtime.tokenizer, task.stops)
        self._tools = None if task.form is None else ToolText(task.form)
        self._num_calls = 0
        self._scored: list[ScoredToken] = []

    def begin(self) -> Wanted:
        """Count its prompt from now on, and return what a runtime is to make."""
        self._metrics.context.inc(self.wanted.ids_1S.shape[1])
        return self.wanted

    def _take(self, token: int, scores_V: Tensor) -> bool:
        """Take a token and the scores of all; return whether it is the last one."""
        self._count()
        if token not in self._runtime.ends:
            if self._task.top is not None:
                self._scored.append(score_token(self._runtime.tokenizer, token, scores_V, top=self._task.top))
            self._say(self._text.add(token))
        return self._text.is_stopped

    def _count(self) -> None:
        """Count a token."""
        now = time.perf_counter()
        self._metrics.tokens.inc()
        if self._last is not None:
            self._metrics.token_seconds.observe(now - self._last)
        else:
            self._metrics.prompt_tokens.inc(self.wanted.ids_1S.shape[1])
            self._metrics.reused.inc(self._runtime.reused)
            if self._number == 0:
                self._metrics.first_seconds.observe(now - self._asked)
        self._metrics.context.inc()
        self._last = now

    def _end(self, outcome: Outcome) -> None:
        """Say what was kept back, and why the answer ends, given what became of it."""
        self._metrics.context.dec(self.wanted.ids_1S.shape[1] + len(outcome.ids))
        error = outcome.error
        try:
            if error is None:
                self._say_end(outcome.ids)
        except Exception as raised:  # of this answer alone
            error = raised
        self._when_over(error)

    def _say_end(self, ids: Sequence[int]) -> None:
        rest = self._text.rest()
        if self._text.is_stopped:
            self._scored.clear()  # of the stop string
        self._say(rest, is_last=True)
        reason = "stop" if self._text.is_stopped or ids[-1] in self._runtime.ends else "length"
        reason = "tool_calls" if self._num_calls and reason == "stop" else reason
        reused = self._runtime.reused
        self._emit(Ended(answer=self._number, reason=reason, tokens=len(ids), reused=reused))

    def _say(self, text: str, *, is_last: bool = False) -> None:
        if self._tools is not None:
            text = self._tools.add(text, is_last=is_last)
        if text or (is_last and self._scored):
            self._emit(Piece(answer=self._number, text=text, tokens=tuple(self._scored)))
            self._scored.clear()
        if self._tools is not None:
            for call in self._tools.calls[self._num_calls :]:
                self._emit(Called(answer=self._number, number=self._num_calls, call=call))
                self._num_calls += 1
