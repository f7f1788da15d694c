"""The lines of a journal: a header, then one for every finished step; each carries the digest of itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from coterie.artifact import digest_of
from coterie.errors import CorruptArtifact

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
RESULT = "result"
PRIVATE = "private"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A finished step.

    Attributes:
        files: files in `Run.folder` that it made: name -> SHA-256 of the whole file.
        private: the same for files in `Run.private`; those that a later step dropped are still named here.
        content: what the caller wanted to remember; anything that JSON can hold.
    """

    files: Mapping[str, str]
    private: Mapping[str, str]
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """A step as the journal holds it; files are named from the run's root: name -> (size in bytes, SHA-256)."""

    files: Mapping[str, tuple[int, str]]
    drop: tuple[str, ...]
    content: Mapping[str, Any]

    def step(self) -> Step:
        """Return the step, its files named from their folders."""

        def below(place: str) -> dict[str, str]:
            start = place + "/"
            return {name.removeprefix(start): entry[1] for name, entry in self.files.items() if name.startswith(start)}

        return Step(files=below(RESULT), private=below(PRIVATE), content=self.content)


def run_folder(target: Path) -> Path:
    """Return the hidden folder beside `target` in which it is made."""
    return target.with_name(f".{target.name}.partial")


def begun(target: Path) -> Mapping[str, Any] | None:
    """Return what the interrupted run that makes `target` recorded when it began: its ``header`` and its ``notes``.

    None where there is no such run, or its journal cannot be read.
    """
    if target.name in ("", ".."):
        return None
    try:
        with (run_folder(target) / JOURNAL).open("rb") as file:
            document = _parse(file.readline().rstrip(b"\n"))
    except OSError:
        return None
    parts = ("header", "notes")
    return document if document and all(isinstance(document.get(part), dict) for part in parts) else None


def read_journal(journal: Path) -> tuple[dict[str, Any], dict[str, Line], bool]:
    """Return the header, the steps, and whether every line could be read."""
    first, *texts = journal.read_bytes().split(b"\n")
    header = _parse(first)
    if header is None or not texts:
        raise CorruptArtifact(
            f"{journal}: the first line is damaged, so nobody can tell what the folder belongs to; "
            f"remove {journal.parent} to start anew"
        )
    lines: dict[str, Line] = {}
    whole = texts[-1] == b""  # else the run was killed while it wrote that line
    for number, text in enumerate(texts[:-1], start=2):
        document = _parse(text)
        line = None if document is None else _line_from(document)
        if document is None or line is None:
            log.warning("%s: line %d is damaged; its step is done again", journal, number)
            whole = False
            continue
        lines.pop(document["step"], None)
        lines[document["step"]] = line
    return header, lines, whole


def line_text(content: Mapping[str, Any]) -> bytes:
    """Return a line of a journal."""
    return json.dumps({**content, "digest": digest_of(content)}, ensure_ascii=False).encode() + b"\n"


def step_text(step: str, line: Line) -> bytes:
    """Return the line of a step."""
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in line.files.items()}
    return line_text({"step": step, "files": files, "drop": list(line.drop), "content": dict(line.content)})


def _parse(text: bytes) -> dict[str, Any] | None:
    """Return what a line says, None when it is not what was written."""
    try:
        document = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    digest = document.pop("digest", None)
    return document if digest == digest_of(document) else None


def _line_from(document: Mapping[str, Any]) -> Line | None:
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in document["files"].items()}
        line = Line(files, tuple(document["drop"]), dict(document["content"]))
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
    if not isinstance(document.get("step"), str) or not all(map(is_inside, (*line.files, *line.drop))):
        return None
    return line


def is_inside(name: object) -> bool:
    """Tell whether a name is that of a file in the run's folders; a journal must not reach other places."""
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    parts = PurePosixPath(name).parts
    return "/".join(parts) == name and len(parts) > 1 and parts[0] in (RESULT, PRIVATE) and ".." not in parts
