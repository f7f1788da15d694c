"""One thread that generates, and the jobs that wait for it: so many at most, first come, first served.

A job is admitted before anything is done for it, and refused at once where there is no room. It can be called off at
any time: while it waits it is gone at once, while it runs before the next layer. An error ends the job that met it, and
no other.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from coterie.errors import Cancelled, CoterieError
from coterie.run.engine import Sampling
from coterie.serve.metrics import Metrics
from coterie.serve.refusals import Refusal, refusal_of
from coterie.serve.scores import ScoredToken, score_token
from coterie.serve.text import Text

log = logging.getLogger(__name__)

#: Failures in a row after which a server says that it is not well.
_DEGRADED = 3


class Generator(Protocol):
    """What generates: a `coterie.run.engine.Runtime`."""

    @property
    def tokenizer(self) -> object:
        """What turns tokens into text."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""

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
    """

    prompts: Sequence[Tensor]
    num_answers: int
    max_tokens: int
    sampling: Sampling
    stops: Sequence[str]
    top: int | None = None

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
class Ended:
    """An answer is whole.

    Attributes:
        answer: its number.
        reason: "stop" for the model's own end or a stop string, "length" where there was no more room.
        tokens: how many it has.
    """

    answer: int
    reason: str
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Over:
    """A job is over.

    Attributes:
        error: what ended it, if it was not done.
    """

    error: Exception | None


Event = Piece | Ended | Over


class Job:
    """A request on its way; made by `Worker.admit`."""

    def __init__(self, worker: Worker, emit: Callable[[Event], None]) -> None:
        """Be admitted."""
        self.task: Task | None = None
        self.cancelled = threading.Event()
        self.admitted = time.perf_counter()
        self._worker, self._emit = worker, emit

    def begin(self, task: Task) -> None:
        """Line up; what comes of it is emitted, an `Over` at the end, by other threads."""
        self.task = task
        self._worker._line_up(self)

    def cancel(self) -> None:
        """Call it off, wherever it is; once it is over this does nothing."""
        self.cancelled.set()
        self._worker._withdraw(self)

    def emit(self, event: Event) -> None:
        """Tell whoever waits."""
        self._emit(event)


class Worker:
    """The thread that generates."""

    def __init__(self, runtime: Generator, *, queue: int, metrics: Metrics | None = None) -> None:
        """Start it.

        Args:
            runtime: what generates, called by this thread alone.
            queue: jobs that wait at most, beside the one that runs.
            metrics: where it counts what it does.
        """
        self.queue = queue
        self.metrics = metrics or Metrics()
        self.metrics.queue.set(queue)
        self.metrics.waiting.set_function(lambda: self.num_waiting)
        self.metrics.running.set_function(lambda: self.is_running)
        self._runtime = runtime
        self._changed = threading.Condition()
        self._jobs: set[Job] = set()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._is_closed = False
        self._failures = 0
        self._usual_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that were admitted and do not run yet."""
        with self._changed:
            return len(self._jobs) - (self._running is not None)

    @property
    def is_running(self) -> bool:
        """Whether a job runs."""
        return self._running is not None

    @property
    def state(self) -> str:
        """Return "ready", "degraded" where the last jobs all failed, or "closing"."""
        return "closing" if self._is_closed else "degraded" if self._failures >= _DEGRADED else "ready"

    def admit(self, emit: Callable[[Event], None]) -> Job:
        """Take a job in, which counts from now on.

        Args:
            emit: called with each event of the job, by the thread that generates.

        Raises:
            Refusal: the queue is full, or the server closes.
        """
        with self._changed:
            self._check_open()
            if len(self._jobs) > self.queue:
                self.metrics.requests.labels("rejected").inc()
                seconds = max(1, math.ceil(self._usual_seconds))
                raise Refusal(
                    429, f"{self.queue} requests wait already; try again in {seconds} seconds",
                    code="rate_limit_exceeded", headers={"Retry-After": str(seconds)},
                )  # fmt: skip
            job = Job(self, emit)
            self._jobs.add(job)
            return job

    def close(self) -> None:
        """End what runs, before its next layer, and what waits; return when the thread has ended."""
        with self._changed:
            self._is_closed = True
            waiting = list(self._waiting)
            for job in self._jobs:
                job.cancelled.set()
            self._jobs.difference_update(waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for job in waiting:
            self._end(job, Cancelled("the server ends"))
        self._thread.join()

    def _check_open(self) -> None:
        if self._is_closed:
            raise Refusal(503, "the server ends", code="closing", headers={"Retry-After": "10"})

    def _line_up(self, job: Job) -> None:
        with self._changed:
            self._check_open()
            if job in self._jobs:
                self._waiting.append(job)
                self._changed.notify_all()

    def _withdraw(self, job: Job) -> None:
        """Forget a job that does not run."""
        with self._changed:
            if job is self._running or job not in self._jobs:
                return
            self._jobs.discard(job)
            if job in self._waiting:
                self._waiting.remove(job)
        self._end(job, Cancelled("the request was called off"))

    def _work(self) -> None:
        """Do one job after the other until the worker is closed: what the thread does."""
        while (job := self._next()) is not None:
            begun, error = time.perf_counter(), None
            try:
                self._run(job)
            except Exception as raised:  # the next job may pass
                error = raised
            seconds = time.perf_counter() - begun
            self.metrics.context.set(0)
            with self._changed:
                self._running = None
                self._jobs.discard(job)
                if not isinstance(error, Cancelled):
                    self._failures = self._failures + 1 if error and refusal_of(error).status >= 500 else 0
                    self._usual_seconds += 0.3 * (seconds - self._usual_seconds)
            self._end(job, error)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _end(self, job: Job, error: Exception | None) -> None:
        """Say that a job is over, in all places."""
        outcome = "cancelled" if isinstance(error, Cancelled) else "done" if error is None else "failed"
        self.metrics.requests.labels(outcome).inc()
        self.metrics.request_seconds.observe(time.perf_counter() - job.admitted)
        if error is not None:
            tell(error)
        job.emit(Over(error=error))

    def _run(self, job: Job) -> None:
        assert job.task is not None
        for number in range(len(job.task.prompts) * job.task.num_answers):
            self._answer(job, job.task, number)

    def _answer(self, job: Job, task: Task, number: int) -> None:
        """Generate one answer of a job."""
        text, ends, metrics = Text(self._runtime.tokenizer, task.stops), self._runtime.ends, self.metrics
        ids_1S = task.prompts[number // task.num_answers]
        metrics.context.set(ids_1S.shape[1])
        last: float | None = None
        scored: list[ScoredToken] = []

        def take(token: int, scores_V: Tensor) -> bool:
            nonlocal last
            now = time.perf_counter()
            metrics.tokens.inc()
            metrics.context.inc()
            if last is not None:
                metrics.token_seconds.observe(now - last)
            else:
                metrics.prompt_tokens.inc(ids_1S.shape[1])
                if number == 0:
                    metrics.first_seconds.observe(now - job.admitted)
            last = now
            if token not in ends:
                if task.top is not None:
                    scored.append(score_token(self._runtime.tokenizer, token, scores_V, top=task.top))
                new = text.add(token)
                if new:
                    job.emit(Piece(answer=number, text=new, tokens=tuple(scored)))
                    scored.clear()
            return text.is_stopped

        ids = self._runtime.generate_ids(
            ids_1S, max_tokens=task.max_tokens,
            sampling=_sampling_of(task.sampling, number), on_token=take, cancelled=job.cancelled.is_set,
        )  # fmt: skip
        rest = text.rest()
        if text.is_stopped:
            scored.clear()  # of the stop string
        if rest or scored:
            job.emit(Piece(answer=number, text=rest, tokens=tuple(scored)))
        is_stop = text.is_stopped or ids[-1] in ends
        job.emit(Ended(answer=number, reason="stop" if is_stop else "length", tokens=len(ids)))


def _sampling_of(sampling: Sampling, number: int) -> Sampling:
    if sampling.seed is None:
        return sampling
    return Sampling(
        temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty, seed=sampling.seed + number,
    )  # fmt: skip


def tell(error: Exception) -> None:
    """Log an error; one that nobody foresaw by its place alone, as its text may hold what somebody wrote."""
    if isinstance(error, Cancelled):
        log.info("a request was called off")
    elif isinstance(error, CoterieError):
        log.error("a request failed: %s", error)
    else:
        place = "".join(traceback.format_tb(error.__traceback__))
        log.error("a request failed with %s; please report it:\n%s", type(error).__name__, place)
