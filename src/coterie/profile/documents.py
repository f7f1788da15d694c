"""Text folders: one domain a file, and its documents piece by piece, so that no text is too long to be read.

A text folder holds one ``*.txt`` file a domain (documents separated by a line that is only ``<|endoftext|>``) or one
``*.jsonl`` file a domain (one JSON object a line with a ``text`` field). ``*.qa.jsonl`` files hold questions with exact
answers and are read by `coterie.evaluate`, not here. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from coterie.errors import TextError, UnknownName
from coterie.paths import user_path

DOCUMENT_SEPARATOR = "<|endoftext|>"
_SEPARATOR_LINE = re.compile(rf"\n?^{re.escape(DOCUMENT_SEPARATOR)}$\n?", flags=re.MULTILINE)

#: Characters that are read at a time.
READ_CHARACTERS = 2**18

#: A part of a document, and whether the document ends with it.
Piece = tuple[str, bool]


def text_files(folder: str | Path, domains: tuple[str, ...] | None = None) -> dict[str, Path]:
    """Return the text files of a folder by domain name, sorted.

    Raises:
        TextError: no such folder, no text in it, or two files for one domain.
        UnknownName: a domain was asked for that has no file.
    """
    path = user_path(folder)
    if not path.is_dir():
        raise TextError(f"{path} is not a folder; --text takes a folder with one *.txt or *.jsonl file a domain")
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.name.endswith(".qa.jsonl") or file.suffix not in (".txt", ".jsonl") or not file.is_file():
            continue
        if file.stem in files:
            raise TextError(f"domain {file.stem!r} has two files: {files[file.stem].name} and {file.name}")
        files[file.stem] = file
    if not files:
        raise TextError(f"{path} holds no *.txt and no *.jsonl file; put one file a domain there")
    chosen = files.keys() if domains is None else domains
    if not chosen:
        raise TextError(
            f"none of the domains {', '.join(sorted(files))} was asked for; name one or leave the choice out"
        )
    for domain in chosen:
        if domain not in files:
            raise UnknownName("domain", domain, files)
    return {domain: files[domain] for domain in sorted(set(chosen))}


def document_pieces(file: Path) -> Iterator[Piece]:
    """Yield the documents of one domain in pieces; those of nothing but white space are among them.

    A document of a ``*.jsonl`` file is one piece, one of a ``*.txt`` file has pieces of some `READ_CHARACTERS`.

    Raises:
        TextError: not UTF-8, not JSON, or a line without ``text``.
    """
    try:
        with file.open(encoding="utf-8-sig") as handle:
            yield from _lines_of_json(file, handle) if file.suffix == ".jsonl" else _between_separators(handle)
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8 text: {error}") from None


def documents(pieces: Iterable[Piece]) -> Iterator[str]:
    """Put documents together again; those of nothing but white space are left out."""
    parts: list[str] = []
    for text, last in pieces:
        parts.append(text)
        if last:
            document = "".join(parts)
            parts.clear()
            if document.strip():
                yield document


def read_documents(file: Path) -> list[str]:
    """Read all documents of one domain.

    Raises:
        TextError: not UTF-8, not JSON, a line without ``text``, or no text at all.
    """
    found = list(documents(document_pieces(file)))
    if not found:
        raise no_text(file)
    return found


def no_text(origin: str | Path) -> TextError:
    """Return the error that says so."""
    return TextError(f"{origin} is empty; every domain needs text")


def _lines_of_json(file: Path, handle: TextIO) -> Iterator[Piece]:
    # Only \n ends a line: other separators that str.splitlines knows may stand inside a JSON string.
    for number, line in enumerate(handle, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
            document = None
        if not isinstance(document, str):
            raise TextError(f'{file}, line {number}: expected a JSON object with a "text" field that is a string')
        yield document, True


def _between_separators(handle: TextIO) -> Iterator[Piece]:
    """Split at lines that are the separator, each with the line breaks before and after it."""
    left = ""  # begins where a line begins, with the break before one, or with a character within one
    while chunk := handle.read(READ_CHARACTERS):
        text = left + chunk
        end = text.rfind("\n")
        if len(text) - (end + 1) > len(DOCUMENT_SEPARATOR) + 1:  # the line that has not ended is no separator
            ready, left = text[:-1], text[-1:]
        else:
            ready, left = text[: max(end, 0)], text[max(end, 0) :]
            if end >= 0 and ready[ready.rfind("\n") + 1 :] == DOCUMENT_SEPARATOR:
                left = left[1:]
        *whole, rest = _SEPARATOR_LINE.split(ready)
        yield from ((document, True) for document in whole)
        yield rest, False
    yield from ((document, True) for document in _SEPARATOR_LINE.split(left))
