"""Steps on the whole result, after its layers were compressed. One file each.

The module of a step holds two functions. ``prepare(job, **options)`` checks what can be known beforehand and announces
time and memory; it returns what it prepared, None where the step was not asked for, `LeftOut` where it cannot be done.
``run(work, prepared, **options)`` does it, in journaled steps of the run. What is prepared has a method ``header() ->
JSON content`` for what it hangs on, and `stages`, `times` and `disk`: the memory, the time, and the bytes that are
written meanwhile, by what they are. What free memory decides is decided once: `Job.recorded` is what the header of a
run that goes on says.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from coterie.errors import UnknownName


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A step that cannot be done here.

    Attributes:
        reason: why, in words that do not depend on the moment.
    """

    reason: str
    stages: tuple[()] = ()
    times: tuple[()] = ()

    @property
    def disk(self) -> dict[str, int]:
        """Nothing is written."""
        return {}

    def header(self) -> dict[str, str]:
        """Return the decision, for the header of the run."""
        return {"left out": self.reason}

    @classmethod
    def recorded(cls, header: object) -> LeftOut | None:
        """Return the decision that a header records; None where it records another one, or none."""
        reason = header.get("left out") if isinstance(header, dict) else None
        return cls(reason) if isinstance(reason, str) else None


RESULT_STEPS: dict[str, str] = {
    "distill": "coterie.compress.result_steps.distill",
    "distill-blocks": "coterie.compress.result_steps.distill_blocks",
}


def load_result_step(name: str) -> Any:
    """Return the module of a step by name; raises UnknownName."""
    if name not in RESULT_STEPS:
        raise UnknownName("step on a result", name, RESULT_STEPS)
    return import_module(RESULT_STEPS[name])
