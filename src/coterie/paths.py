"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from coterie.errors import InputError


def user_path(path: str | Path) -> Path:
    """Return a path with ``~`` and ``~name`` as the home folder that they stand for.

    Raises:
        InputError: there is no such home folder, or the path holds the character NUL, which no file system has.
    """
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} holds the character NUL, which no path can; leave it out")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{path}: the home folder of {Path(path).parts[0]} is not known; write the path in full"
        ) from None
