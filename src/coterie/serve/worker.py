"""One thread that generates, and the jobs that wait for it: so many at most.

A job is admitted before anything is done for it, and refused at once where there is no room. The oldest one is next, so
each has its turn; where a batch has room for more, those that wait go with it, first those whose prompts begin like its
own, which pass the model once, and then by age. A job can be called off at any time: while it waits it is gone at once,
while it runs before the next layer, or the next token where it is not alone. An error ends the job that met it, and no
other, but for a disk that fails, which ends all that run.
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
from itertools import takewhile

from coterie.errors import Cancelled, CoterieError
from coterie.serve.generation import Answer, Called, Ended, Generator, Piece, Task
from coterie.serve.metrics import Metrics
from coterie.serve.refusals import Refusal, refusal_of

log = logging.getLogger(__name__)

#: Failures in a row after which a server says that it is not well.
_DEGRADED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Over:
    """A job is over.

    Attributes:
        error: what ended it, if it was not done.
    """

    error: Exception | None


Event = Piece | Called | Ended | Over


class Job:
    """A request on its way; made by `Worker.admit`."""

    def __init__(self, worker: Worker, emit: Callable[[Event], None]) -> None:
        """Be admitted."""
        self.task: Task | None = None
        self.cancelled = threading.Event()
        self.admitted = time.perf_counter()
        self.error: Exception | None = None
        self.num_left = 0
        self._worker, self._emit = worker, emit

    @property
    def is_unwanted(self) -> bool:
        """Whether nobody waits for more of it."""
        return self.cancelled.is_set() or self.error is not None

    def begin(self, task: Task) -> None:
        """Line up; what comes of it is emitted, an `Over` at the end, by other threads."""
        self.task = task
        self._worker._line_up(self)

    def cancel(self, reason: Exception | None = None) -> None:
        """Call it off, wherever it is, for a reason that is told; once it is over this does nothing."""
        self.cancelled.set()
        self._worker._withdraw(self, reason or Cancelled("the request was called off"))

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
        self.metrics.running.set_function(lambda: self.num_running)
        self._runtime = runtime
        self._changed = threading.Condition()
        self._jobs: set[Job] = set()
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._is_closed = False
        self._failures = 0
        self._usual_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that were admitted and do not run yet."""
        with self._changed:
            return len(self._jobs) - len(self._running)

    @property
    def num_running(self) -> int:
        """Jobs that run, all at once."""
        return len(self._running)

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
            if len(self._jobs) - len(self._running) >= self.queue + (not self._running):
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

    def _withdraw(self, job: Job, reason: Exception) -> None:
        """Forget a job that does not run."""
        with self._changed:
            if job in self._running or job not in self._jobs:
                return
            self._jobs.discard(job)
            if job in self._waiting:
                self._waiting.remove(job)
        self._end(job, reason)

    def _work(self) -> None:
        """Do one batch after the other until the worker is closed: what the thread does."""
        while jobs := self._next():
            begun = time.perf_counter()
            try:
                self._run(jobs, begun)
            except Exception as error:  # the next jobs may pass
                for job in jobs:
                    job.error = job.error or error
            self.metrics.context.set(0)
            for job in jobs:
                self._finish(job, begun)

    def _next(self) -> list[Job]:
        """Wait for a job; return it and those that go with it, or none where the worker is closed."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return []
            first = self._waiting.popleft()
            jobs = [first, *companions(first, self._waiting, self._runtime.batch)]
            for job in jobs[1:]:
                self._waiting.remove(job)
            self._running = set(jobs)
            return jobs

    def _run(self, jobs: Sequence[Job], begun: float) -> None:
        """Make the answers of jobs, as many at once as a batch holds."""
        answers = [answer for job in jobs for answer in self._answers(job, begun)]
        for start in range(0, len(answers), self._runtime.batch):
            together = answers[start : start + self._runtime.batch]
            wanted = [answer.begin() for answer in together if not answer.wanted.is_cancelled]
            self._runtime.generate_batch(wanted)

    def _answers(self, job: Job, begun: float) -> list[Answer]:
        assert job.task is not None
        job.num_left = job.task.count

        def over(error: Exception | None) -> None:
            job.error = job.error or error
            job.num_left -= 1
            if not job.num_left:
                self._finish(job, begun)

        return [
            Answer(
                self._runtime, job.task, number, job.emit, cancelled=lambda: job.is_unwanted, when_over=over,
                metrics=self.metrics, asked=job.admitted,
            )
            for number in range(job.task.count)
        ]  # fmt: skip

    def _finish(self, job: Job, begun: float) -> None:
        """Let a job that ran be over; once more does nothing."""
        error = job.error
        if isinstance(error, Cancelled) or (error is None and job.num_left):
            error = Cancelled("the server ends" if self._is_closed else "the request was called off")
        with self._changed:
            if job not in self._running:
                return
            self._running.discard(job)
            self._jobs.discard(job)
            if not isinstance(error, Cancelled):
                self._failures = self._failures + 1 if error and refusal_of(error).status >= 500 else 0
                self._usual_seconds += 0.3 * (time.perf_counter() - begun - self._usual_seconds)
        self._end(job, error)

    def _end(self, job: Job, error: Exception | None) -> None:
        """Say that a job is over, in all places; a refusal is told by whoever refuses."""
        if not isinstance(error, Refusal):
            outcome = "cancelled" if isinstance(error, Cancelled) else "done" if error is None else "failed"
            self.metrics.requests.labels(outcome).inc()
            self.metrics.request_seconds.observe(time.perf_counter() - job.admitted)
            if error is not None:
                tell(error)
        job.emit(Over(error=error))


def companions(first: Job, waiting: Sequence[Job], room: int) -> list[Job]:
    """Return which of the jobs that wait go with one in a batch.

    Args:
        first: the job that is next.
        waiting: the others, by age.
        room: answers that a batch holds.
    """
    beginning = _prompt_of(first)
    left, chosen = room - _count_of(first), []
    for job in sorted(waiting, key=lambda job: -_num_shared(beginning, _prompt_of(job))):
        if _count_of(job) <= left:
            left -= _count_of(job)
            chosen.append(job)
    return chosen


def _prompt_of(job: Job) -> list[int]:
    """Return the ids of the first prompt of a job that has lined up."""
    assert job.task is not None
    ids: list[int] = job.task.prompts[0][0].tolist()
    return ids


def _count_of(job: Job) -> int:
    assert job.task is not None
    return job.task.count


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two prompts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def tell(error: Exception) -> None:
    """Log an error; one that nobody foresaw by its place alone, as its text may hold what somebody wrote."""
    if isinstance(error, Cancelled):
        log.info("a request was called off")
    elif isinstance(error, CoterieError):
        log.error("a request failed: %s", error)
    else:
        place = "".join(traceback.format_tb(error.__traceback__))
        log.error("a request failed with %s; please report it:\n%s", type(error).__name__, place)
