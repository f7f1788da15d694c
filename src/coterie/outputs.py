"""Places that results go to: one rule for all that writes, asked before anything is computed and again before writing.

What exists stays as it is, unless Coterie made it and it is of the kind that is to be written: then it is replaced,
which is said. Nothing is written into a folder that is read: a model, a profile, text.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from coterie.artifact import read_header
from coterie.errors import CorruptArtifact, InputError, OutputExists, StaleArtifact
from coterie.paths import user_path

log = logging.getLogger(__name__)

#: What the page of a report says of itself, within its first bytes.
PAGE_MARK = '<meta name="generator" content="coterie report">'

#: Bytes at the start of a file that tell whether it may be ours; no more is read of one that is not.
_HEAD = 4096


def check_output(
    place: str | Path,
    *,
    kind: str,
    reads: Mapping[str, Iterable[str | Path | None]] | None = None,
    accepts: Callable[[Path], bool] | None = None,
    folder: bool = False,
    makes_parents: bool = False,
) -> Path:
    """Return the path of an output, or raise where something would be lost or cannot be written; nothing is changed.

    Args:
        place: where the output goes; ``~`` is a home folder.
        kind: what is written, in a word: the kind of an artefact, or the noun for the message.
        reads: what is read, by the noun for the message ("model folder"); paths that are no folders do not count.
        accepts: tells of something that exists whether it may be replaced or gone on with; by default an artefact of
            the kind, whole and unchanged, may.
        folder: whether the output is a folder.
        makes_parents: whether missing folders above it are made when it is written; always so for a folder.

    Raises:
        OutputExists: the place is taken.
        InputError: it lies inside a folder that is read, in no folder, or in one that cannot be written to.
    """
    target = user_path(place)
    if not folder and target.is_dir():
        raise OutputExists(f"{target} is a folder; name the file to write, such as {target / 'NAME'}")
    if os.path.lexists(target) and not (accepts or functools.partial(is_artifact, kind=kind))(target):
        if folder:
            raise OutputExists(f"{target} exists; choose another place or remove it")
        raise OutputExists(
            f"{target} exists; choose another place or remove it: only a {kind} that coterie wrote is replaced"
        )
    above = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise OutputExists(f"{above} is not a folder; choose another place or remove it")
    for noun, sources in (reads or {}).items():
        for source in sources:
            if source is not None and _is_inside(target, user_path(source)):
                raise InputError(
                    f"{target} is inside the {noun} {source}, which is never written; choose another place"
                )
    if not (folder or makes_parents) and not target.parent.is_dir():
        raise InputError(f"{target.parent} is not a folder; make it first, or choose another place")
    if not os.access(above, os.W_OK):
        raise InputError(
            f"{target} cannot be written: {above} is not writable; choose another place, or change the permissions of "
            "that folder"
        )
    return target


def claim_output(place: str | Path, *, kind: str, accepts: Callable[[Path], bool] | None = None) -> Path:
    """Return the path of a file right before it is written, see `check_output`; say so where one is replaced.

    Folders above it may be missing; whoever writes makes them.
    """
    target = check_output(place, kind=kind, accepts=accepts, makes_parents=True)
    if target.exists():
        log.info("%s: the %s that was there is replaced", target, kind)
    return target


def is_artifact(path: Path, *, kind: str) -> bool:
    """Tell whether a file is an artefact of a kind, whole and unchanged since Coterie wrote it."""
    if b'"coterie"' not in _head(path):
        return False
    try:
        return bool(read_header(path)["kind"] == kind)
    except (CorruptArtifact, StaleArtifact):
        return False


def is_page(path: Path) -> bool:
    """Tell whether a file is the page of a report."""
    return PAGE_MARK.encode() in _head(path)


def is_empty_folder(path: Path) -> bool:
    """Tell whether a path is a folder, and no link to one, with nothing in it."""
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None


def free_space(place: Path) -> tuple[Path, int]:
    """Return the folder that is there already of those that a path is in, and the bytes that are free in it."""
    existing = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    return existing, shutil.disk_usage(existing).free


def _head(path: Path) -> bytes:
    """Return the first bytes of a regular file; none of anything else, which may have no end."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(_HEAD)


def _is_inside(target: Path, source: Path) -> bool:
    """Tell whether a path, its links followed, is a folder that exists or lies in it, however either is spelled."""
    if not source.is_dir():
        return False
    real = target.resolve()
    return any(parent.exists() and parent.samefile(source) for parent in (real, *real.parents))
