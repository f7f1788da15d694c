"""One answer generated: its tokens as text, as calls of functions, and as numbers.

What becomes of a token is emitted as soon as nothing that follows changes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

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

    def generate_ids(
        self,
        ids_1S: Tensor,
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        on_token: Callable[[int, Tensor], bool] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[int]:
        """Go on with the ids of a prompt."""


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


def generate(
    runtime: Generator,
    task: Task,
    number: int,
    emit: Callable[[Piece | Called | Ended], None],
    *,
    cancelled: Callable[[], bool],
    metrics: Metrics,
    asked: float,
) -> None:
    """Generate an answer.

    Args:
        runtime: generates.
        task: what is asked for.
        number: the number of the answer, over all prompts.
        emit: gets what comes, as it comes.
        cancelled: asked before every layer; ends the generation where it says so.
        metrics: counts what happens.
        asked: when the request came, by `time.perf_counter`.

    Raises:
        Cancelled, CorruptCheckpoint, ReadError: see `coterie.run.engine.Runtime.generate`.
    """
    ids_1S = task.prompts[number // task.num_answers]
    answer = _Answer(runtime, task, number, emit)
    metrics.context.set(ids_1S.shape[1])
    last: float | None = None

    def take(token: int, scores_V: Tensor) -> bool:
        nonlocal last
        now = time.perf_counter()
        metrics.tokens.inc()
        metrics.context.inc()
        if last is not None:
            metrics.token_seconds.observe(now - last)
        else:
            metrics.prompt_tokens.inc(ids_1S.shape[1])
            metrics.reused.inc(runtime.reused)
            if number == 0:
                metrics.first_seconds.observe(now - asked)
        last = now
        return answer.take(token, scores_V)

    sampling = task.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed + number)
    ids = runtime.generate_ids(
        ids_1S, max_tokens=task.max_tokens, sampling=sampling, on_token=take, cancelled=cancelled
    )
    answer.end(ids)


class _Answer:
    """An answer as it grows."""

    def __init__(
        self, runtime: Generator, task: Task, number: int, emit: Callable[[Piece | Called | Ended], None]
    ) -> None:
        self._runtime, self._task, self._number, self._emit = runtime, task, number, emit
        self._text = Text(runtime.tokenizer, task.stops)
        self._tools = None if task.form is None else ToolText(task.form)
        self._num_calls = 0
        self._scored: list[ScoredToken] = []

    def take(self, token: int, scores_V: Tensor) -> bool:
        """Take a token and the scores of all; return whether it is the last one."""
        if token not in self._runtime.ends:
            if self._task.top is not None:
                self._scored.append(score_token(self._runtime.tokenizer, token, scores_V, top=self._task.top))
            self._say(self._text.add(token))
        return self._text.is_stopped

    def end(self, ids: Sequence[int]) -> None:
        """Say what was kept back, and why the answer ends, given all of its tokens."""
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
