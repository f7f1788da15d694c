"""A context in which transformers says only errors, and what it says of an error in a line."""

from __future__ import annotations

import logging
import re


class quiet:  # noqa: N801  # used like the functions of contextlib
    """Context in which transformers says only errors and draws no progress bar; its settings come back after."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self._level = hf_logging.get_verbosity()
        self._bar = hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity(logging.ERROR)
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity(self._level)
        if self._bar:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def in_a_line(problem: object) -> str:
    """Return what an error of transformers says in one line: of a traceback that it quotes, the error at its end."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    errors = [re.match(r"[\w.]*(?:Error|Exception): (.+)", line) for line in lines]
    raised = [error[1] for error in errors if error is not None]
    return raised[-1] if "Traceback" in str(problem) and raised else " ".join(lines)
