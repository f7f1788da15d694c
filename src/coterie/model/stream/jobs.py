"""Jobs that run in threads and stop wherever they call a part of a model, until somebody hands them the answer.

One thread runs at a time: `JobThread.go` returns when the job has stopped again, so nothing depends on timing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from coterie.model.stream.backward import Backward

if TYPE_CHECKING:
    from coterie.model.stream.unit import Unit


class _Aborted(BaseException):
    """Ends a job's thread from inside; never leaves it."""


class JobThread(threading.Thread):
    """A thread that runs a job and waits wherever the job calls a unit; it runs only between `go` and the next wait."""

    def __init__(self, number: int, job: Callable[[], Any], *, gradients: bool = False) -> None:
        super().__init__(daemon=True, name=f"coterie-job-{number}")
        self.number = number
        self.gradients = gradients
        self.unit: Unit | None = None
        self.request: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self.result: Any = None
        self._job = job
        self._error: BaseException | None = None
        self._answer: Any = None
        self._aborted = False
        self._may_go, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)

    @property
    def goes_back(self) -> bool:
        """Whether the job waits for gradients of what it passed to a unit before."""
        return bool(self.request[0]) and isinstance(self.request[0][0], Backward)

    def go(self, answer: Any = None) -> None:
        """Let the job run until it waits or ends; an error in it is raised here."""
        self._answer, self.unit, self.request = answer, None, ((), {})
        del answer
        if not self.is_alive():
            self.start()
        else:
            self._may_go.release()
        self._has_stopped.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, unit: Unit, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Wait, in the job's own thread, for the answer to a call."""
        self.unit, self.request = unit, (args, kwargs)
        del args, kwargs
        self._has_stopped.release()
        self._may_go.acquire()
        if self._aborted:
            raise _Aborted
        answer, self._answer = self._answer, None
        return answer

    def abort(self) -> None:
        """End a job that waits."""
        if self.is_alive():
            self._aborted = True
            self._may_go.release()
            self.join()

    def run(self) -> None:
        """Run the job; called by the thread itself."""
        try:
            with torch.set_grad_enabled(self.gradients):
                self.result = self._job()
        except _Aborted:
            pass
        except BaseException as error:  # raised again where the jobs are driven from
            self._error = error
        finally:
            self.unit = None
            self._has_stopped.release()
