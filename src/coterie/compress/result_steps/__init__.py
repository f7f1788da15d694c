"""Steps on the whole result, after its layers were compressed. One file each.

The module of a step holds two functions. ``prepare(job, **options) -> prepared | None`` checks what can be known
beforehand and announces time and memory; None leaves the step out. ``run(work, prepared, **options)`` does it, in
journaled steps of the run. What is prepared has a method ``header() -> JSON content`` for what it hangs on.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from coterie.errors import UnknownName

RESULT_STEPS: dict[str, str] = {"distill": "coterie.compress.result_steps.distill"}


def load_result_step(name: str) -> Any:
    """Return the module of a step by name; raises UnknownName."""
    if name not in RESULT_STEPS:
        raise UnknownName("step on a result", name, RESULT_STEPS)
    return import_module(RESULT_STEPS[name])
