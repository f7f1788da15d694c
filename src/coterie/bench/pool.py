"""The pool: tasks in worker processes, or in this one.

Workers are programs of their own (`coterie.bench.worker`) that are talked to by JSON lines. So whoever calls the bench
need not be importable, and a worker that the system ends for want of memory takes one task with it, not the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from coterie import errors
from coterie.errors import CoterieError

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Died:
    """In place of an answer: the worker process ended before it gave one."""

    reason: str


class Pool(Protocol):
    """Does tasks."""

    def run(self, tasks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any] | Died]]:
        """Do tasks and yield the number and the answer of each, in the order in which they are finished.

        Raises:
            CoterieError: a task raised it.
        """


@contextmanager
def open_pool(jobs: int) -> Iterator[Pool]:
    """Within the block, a pool does tasks in so many worker processes; with 0, in this process."""
    pool: _ThisProcess | _Workers = _Workers(jobs) if jobs else _ThisProcess()
    try:
        yield pool
    finally:
        pool.close()


class _ThisProcess:
    """Does tasks in this process, with one thread as workers have."""

    def __init__(self) -> None:
        from coterie.bench.tasks import Worker, set_threads

        self._worker = Worker()
        self._threads = set_threads()

    def run(self, tasks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any] | Died]]:
        for number, task in enumerate(tasks):
            # Through JSON and back, as it comes from a worker.
            yield number, json.loads(json.dumps(self._worker.do(json.loads(json.dumps(task)))))

    def close(self) -> None:
        import torch

        self._worker.close()
        torch.set_num_threads(self._threads)


class _Workers:
    """Does tasks in worker processes, each of which gets the next task when it has answered."""

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen[str] | None] = [None] * count

    def run(self, tasks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any] | Died]]:
        waiting = list(enumerate(tasks))[::-1]
        answers: SimpleQueue[tuple[int, int, dict[str, Any] | Died]] = SimpleQueue()
        running = 0

        def start(place: int) -> int:
            if not waiting:
                return 0
            number, task = waiting.pop()
            threading.Thread(target=self._ask, args=(place, number, task, answers), daemon=True).start()
            return 1

        for place in range(len(self._processes)):
            running += start(place)
        while running:
            place, number, answer = answers.get()
            running -= 1
            if isinstance(answer, dict) and "error" in answer:
                raise _error(answer)
            running += start(place)
            yield number, answer if isinstance(answer, Died) else answer["answer"]

    def _ask(
        self,
        place: int,
        number: int,
        task: Mapping[str, Any],
        answers: SimpleQueue[tuple[int, int, dict[str, Any] | Died]],
    ) -> None:
        """Send one task to the worker at a place, and put its answer into the queue."""
        process = self._processes[place] or _start()
        self._processes[place] = process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(task, ensure_ascii=False) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if line.endswith("\n"):
            answers.put((place, number, json.loads(line)))
            return
        self._processes[place] = None
        code = process.wait()
        _close_pipes(process)
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        hint = "; out of memory? try fewer jobs" if code == -9 else ""
        answers.put((place, number, Died(f"the worker process ended {how}{hint}")))

    def close(self) -> None:
        for process in self._processes:
            if process is not None:
                process.kill()
                process.wait()
                _close_pipes(process)


def _start() -> subprocess.Popen[str]:
    environment = os.environ | dict.fromkeys(_THREADS, "1") | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, "-m", "coterie.bench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        encoding="utf-8",
    )


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what could not be sent
                pipe.close()


def _error(answer: Mapping[str, Any]) -> Exception:
    """Return the error that a worker met: one of ours as itself, others as CoterieError with their name."""
    kind = getattr(errors, str(answer["error"]), None)
    message = str(answer["message"])
    if isinstance(kind, type) and issubclass(kind, CoterieError) and not issubclass(kind, OSError):
        try:
            return kind(message)
        except TypeError:
            pass
    return CoterieError(f"{answer['error']}: {message}")
