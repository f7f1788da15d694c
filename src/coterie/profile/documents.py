"""Text folders: one domain a file, and its documents piece by piece, so that no text is too long to be read.

A text folder holds a file a domain:

- ``*.txt``: documents separated by a line that is only ``<|endoftext|>``.
- ``*.jsonl``: one JSON object a line, see `coterie.profile.rows`.
- ``*.txt.gz``, ``*.jsonl.gz``: the same, compressed.
- ``*.parquet``: the same rows as a table, and so are folders that ``save_to_disk`` of `datasets` made.

``*.qa.jsonl`` files hold questions with exact answers and are read by `coterie.evaluate`, not here. No torch here.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from coterie.errors import TextError, UnknownName
from coterie.model.disk.files import is_hub_id
from coterie.paths import user_path
from coterie.profile.data_sets import is_data_set, is_saved, saved_rows, table_rows
from coterie.profile.rows import EXPECTED, Document, Piece, check_characters, document_of

log = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "<|endoftext|>"
_SEPARATOR_LINE = re.compile(rf"\n?^{re.escape(DOCUMENT_SEPARATOR)}$\n?", flags=re.MULTILINE)

#: What the names of text files end with.
ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")
QUESTIONS = (".qa.jsonl", ".qa.jsonl.gz")

#: The same in words, for messages.
FORMATS = "*.txt, *.jsonl (either also as .gz) or *.parquet"

#: Characters that are read at a time.
READ_CHARACTERS = 2**18

#: Files that are not read are named up to so many.
_NAMED = 10

#: Bytes that tell how a file is encoded, and how other encodings begin.
_HEAD = 4096
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def text_files(folder: str | Path, domains: tuple[str, ...] | None = None) -> dict[str, Path]:
    """Return the text files of a folder by domain name, sorted; hidden files are none.

    A folder that ``save_to_disk`` made is one domain of its own name.

    Raises:
        TextError: no such folder, no text in it, two files for one domain, or a name that is not UTF-8.
        UnknownName: a domain was asked for that has no file.
    """
    path = user_path(folder)
    if not path.is_dir():
        raise no_folder(path)
    files: dict[str, Path] = {}
    for file in [path.resolve()] if is_saved(path) else sorted(path.iterdir()):
        domain = _domain(file)
        if domain is None:
            continue
        check_name(file.name, path)
        if domain in files:
            raise TextError(f"domain {domain!r} has two files: {files[domain].name} and {file.name}")
        files[domain] = file
    if not files:
        raise TextError(_nothing_in(path))
    chosen = files.keys() if domains is None else domains
    if not chosen:
        raise TextError(
            f"none of the domains {', '.join(sorted(files))} was asked for; name one or leave the choice out"
        )
    for domain in chosen:
        if domain not in files:
            raise UnknownName("domain", domain, files)
    return {domain: files[domain] for domain in sorted(set(chosen))}


def check_name(name: str, folder: str | Path) -> None:
    """Raise TextError for a name that is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise TextError(f"{folder}: the name {os.fsencode(name)!r} is not UTF-8; rename it") from None


def log_unread(folder: str | Path) -> None:
    """Warn of what a text folder holds and nobody reads, hidden files apart."""
    unread = list(_unread(user_path(folder)))
    for name, reason in unread[:_NAMED]:
        log.warning("%s is not read: %s", name, reason)
    if len(unread) > _NAMED:
        log.warning("%d more files and folders there are not read", len(unread) - _NAMED)


def document_pieces(file: Path) -> Iterator[Document]:
    """Yield the documents of one domain, text in pieces; those of nothing but white space are among them.

    A text in a row is one piece, one of a ``*.txt`` file has pieces of some `READ_CHARACTERS`.

    Raises:
        TextError: not UTF-8, not JSON, no gzip, or a row that is no document.
        InputError: what reads the format is not installed.
    """
    if file.is_dir() or file.suffix == ".parquet":
        rows = saved_rows(file) if file.is_dir() else table_rows(file)
        yield from (document_of(row, place, from_table=True) for place, row in rows)
    elif ".jsonl" in file.suffixes[-2:]:
        for place, row in json_rows(file, expected=EXPECTED):
            yield document_of(row, place)
    else:
        with _opened(file) as handle:
            yield from _between_separators(file, handle)


def json_rows(file: Path, *, expected: str) -> Iterator[tuple[str, object]]:
    """Yield (place, row) for every line of JSON in a file, blank ones apart; the place is file and line.

    Args:
        file: the file; with the ending .gz it is compressed.
        expected: what a line should be, for messages.

    Raises:
        TextError: not UTF-8, not JSON, or no gzip.
    """
    with _opened(file) as handle:
        # Only \n ends a line: other separators that str.splitlines knows may stand inside a JSON string.
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"{error.msg}, character {error.colno}"
                raise TextError(f"{place}: {expected}; this is not JSON ({reason})") from None
            except RecursionError:
                raise TextError(f"{place}: {expected}; this is nested too deeply") from None
            except ValueError:  # Python reads no whole number of more than some thousand digits
                raise TextError(
                    f"{place}: a number in it has more digits than can be read; shorten or remove it"
                ) from None
            yield place, row


def documents(pieces: Iterable[Document]) -> Iterator[str]:
    """Put documents together again; those of nothing but white space are left out.

    Raises:
        TextError: a conversation, which is text only for a model.
    """
    parts: list[str] = []
    for piece in pieces:
        if not isinstance(piece, tuple):
            raise TextError(f"{piece.place}: this becomes text by the chat template of a model")
        text, last = piece
        parts.append(text)
        if last:
            document = "".join(parts)
            parts.clear()
            if document.strip():
                yield document


def read_documents(file: Path) -> list[str]:
    """Read all documents of one domain.

    Raises:
        TextError: not UTF-8, not JSON, a row that is no text, or no text at all.
    """
    texts = list(documents(document_pieces(file)))
    if not texts:
        raise no_text(file)
    return texts


def no_text(origin: str | Path) -> TextError:
    """Return the error that says so."""
    return TextError(f"{origin} is empty; every domain needs text")


def no_folder(path: Path) -> TextError:
    """Return the error that says so."""
    takes = "--text takes a folder with one *.txt or *.jsonl file a domain"
    if path.is_file():
        way_out = "give that one" if _domain(path) else f"put {FORMATS} into one"
        return TextError(f"{path} is not a folder but a file; {takes}: it is in {path.parent}, {way_out}")
    near = is_hub_id(str(path))
    return TextError(f"{path} is not a folder; {takes}, or a data set: hf:{path if near else 'ORG/NAME'}")


def _domain(file: Path) -> str | None:
    """Return the domain that a file, or a saved data set, is; None for anything else."""
    if file.name.startswith("."):
        return None
    if file.is_dir():
        return file.name if is_saved(file) else None
    if file.name.endswith(QUESTIONS) or not file.is_file():
        return None
    return next((file.name.removesuffix(end) for end in ENDINGS if file.name.endswith(end)), None)


def _unread(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the names of what is not read in a folder, and why."""
    if is_saved(folder):
        return
    for file in sorted(folder.iterdir()):
        name = file.name.encode(errors="backslashreplace").decode()
        about = file.with_suffix(".json") == file and file.with_suffix(".jsonl").is_file()  # how a model wrote text
        if file.name.startswith(".") or file.name.endswith(QUESTIONS) or about or _domain(file) is not None:
            continue
        if file.is_dir():
            yield name, "it is a folder; put its files beside the others"
        elif not file.exists():
            yield name, "it is a link that leads nowhere"
        elif not file.is_file():
            yield name, "it is no regular file"
        else:
            yield name, f"text is {FORMATS}"


def _nothing_in(folder: Path) -> str:
    unread = [f"{name} ({reason})" for name, reason in _unread(folder)]
    more = f", and {len(unread) - 3} more" if len(unread) > 3 else ""
    there = f"; there is {', '.join(unread[:3])}{more}" if unread else ""
    hint = f"; it looks like a data set: give hf:{folder}" if is_data_set(folder) else ""
    return f"{folder} holds no *.txt and no *.jsonl file, nor any as .gz or *.parquet; put one file a domain there" + (
        hint or there
    )


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """Open a file as text; raises TextError where it is not UTF-8, or no whole gzip file."""
    try:
        with _raw(file) as binary:
            encoding = _other_encoding(binary.read(_HEAD))
        if encoding is not None:
            raise TextError(
                f"{file} is not UTF-8 text: line 1 begins as {encoding} does; save it as UTF-8, as with "
                f"iconv -f {encoding} -t UTF-8"
            )
        with io.TextIOWrapper(_raw(file), encoding="utf-8-sig") as handle:
            yield handle
    except UnicodeDecodeError as error:
        line, byte = _undecodable(file)
        raise TextError(
            f"{file} is not UTF-8 text: line {line} holds the byte 0x{byte:02x} as {error.reason}; save it as UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(f"{file} is no whole gzip file ({error}); make it again") from None


def _raw(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _other_encoding(head: bytes) -> str | None:
    """Return the encoding that the first bytes of a file are in, where that is UTF-16 or UTF-32."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    # Without a mark: every second byte of Latin letters is NUL, and none of the others.
    even, odd = head[0::2], head[1::2]
    for zeros, others, name in ((odd, even, "UTF-16LE"), (even, odd, "UTF-16BE")):
        if len(head) >= 4 and zeros.count(0) > 0.7 * len(zeros) and others.count(0) < 0.1 * len(others):
            return name
    return None


def _undecodable(file: Path) -> tuple[int, int]:
    """Return the line and the value of the first byte that is not UTF-8."""
    decoder, line, last = codecs.getincrementaldecoder("utf-8-sig")(), 1, b""
    with _raw(file) as binary:
        while True:
            chunk = binary.read(READ_CHARACTERS)
            last = decoder.getstate()[0] + chunk
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                return line + last[: error.start].count(b"\n"), last[error.start]
            if not chunk:
                return line, 0


def _between_separators(file: Path, handle: TextIO) -> Iterator[Piece]:
    """Split at lines that are the separator, each with the line breaks before and after it."""
    left = ""  # begins where a line begins, with the break before one, or within one that is longer than a separator
    longer = len(DOCUMENT_SEPARATOR) + 1
    line = 1
    while chunk := handle.read(READ_CHARACTERS):
        if "\0" in chunk:
            check_characters("\0", f"{file}, line {line + chunk[: chunk.index(chr(0))].count(chr(10))}")
        line += chunk.count("\n")
        text = left + chunk
        end = text.rfind("\n")
        if len(text) - (end + 1) > longer:  # the line that has not ended is no separator, nor is what stays of it
            ready, left = text[:-longer], text[-longer:]
        else:
            ready, left = text[: max(end, 0)], text[max(end, 0) :]
            if end >= 0 and ready[ready.rfind("\n") + 1 :] == DOCUMENT_SEPARATOR:
                left = left[1:]
        *whole, rest = _SEPARATOR_LINE.split(ready)
        yield from ((document, True) for document in whole)
        yield rest, False
    yield from ((document, True) for document in _SEPARATOR_LINE.split(left))
