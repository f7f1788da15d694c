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
from collections.abc import Callable
from dataclasses import dataclass

from coterie.errors import Cancelled, CoterieError
from coterie.serve.generation import Called, Ended, Generator, Piece, Task, generate
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
        self._worker, self._emit = worker, emit

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
            if job is self._running or job not in self._jobs:
                return
            self._jobs.discard(job)
            if job in self._waiting:
                self._waiting.remove(job)
        self._end(job, reason)

    def _work(self) -> None:
        """Do one job after the other until the worker is closed: what the thread does."""
        while (job := self._next()) is not None:
            begun = time.perf_counter()
            error: Exception | None = None
            try:
                self._run(job)
            except Cancelled:
                error = Cancelled("the server ends" if self._is_closed else "the request was called off")
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
        """Say that a job is over, in all places; a refusal is told by whoever refuses."""
        if not isinstance(error, Refusal):
            outcome = "cancelled" if isinstance(error, Cancelled) else "done" if error is None else "failed"
            self.metrics.requests.labels(outcome).inc()
            self.metrics.request_seconds.observe(time.perf_counter() - job.admitted)
            if error is not None:
                tell(error)
        job.emit(Over(error=error))

    def _run(self, job: Job) -> None:
        assert job.task is not None
        for number in range(job.task.count):
            generate(
                self._runtime, job.task, number, job.emit, cancelled=job.cancelled.is_set, metrics=self.metrics,
                asked=job.admitted,
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
