"""Runs to test with: what the tests of the journal and of its faults share."""

import contextlib
import os
from pathlib import Path

import pytest

from coterie.journal import open_run

HEADER = {"model": "a" * 64, "settings": {"recipe": "reap", "keep": 0.5}, "order": (1, 2)}
posix_only = pytest.mark.skipif(os.name == "nt", reason="a POSIX matter")


class Crash(BaseException):
    """What no `except Exception` catches, like an interrupt from the keyboard."""


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"<folder>"
        for path in sorted(folder.rglob("*"))
    }


def partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def add(run, step: str, *, private: bool = False, drop=()) -> None:
    """Finish a step with a file of the result and, if asked for, a private one."""
    (run.folder / f"{step}.bin").write_bytes(f"weights of {step}".encode() * 10)
    if private:
        (run.private / f"{step}.state").write_bytes(f"state of {step}".encode() * 5)
    run.finish(step, files=[f"{step}.bin"], private=[f"{step}.state"] * private, drop=drop, content={"name": step})


def interrupted(target: Path, *steps: str, private: bool = False, header=HEADER) -> None:
    """Leave a run behind that was interrupted after these steps."""
    with contextlib.suppress(Crash), open_run(target, header, what="compression") as run:
        for step in steps:
            add(run, step, private=private)
        raise Crash


def finished(target: Path, header=HEADER) -> list[str]:
    """Open a run, return its finished steps, and leave it again."""
    found: list[str] = []
    with contextlib.suppress(Crash), open_run(target, header, what="compression") as run:
        found = list(run.finished)
        raise Crash
    return found
