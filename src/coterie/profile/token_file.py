"""Tokens of a text in a file that has no name: made once, in bounded memory, and read row by row.

A text is tokenized in pieces. Many short documents are one piece; a long document is cut into windows that overlap, and
two windows are joined where, within the overlap, they agree on many tokens in a row: what stands far away does not
change how text is cut into tokens, so the ids are those of the whole document.

Legend: N sequences, S tokens of a sequence.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.errors import InputError
from coterie.model.stream.spill import share_heaps
from coterie.profile.documents import Piece, no_text

#: Characters that are tokenized at a time; some 200 bytes of memory are needed for a token, which may be one character.
WINDOW = 2**17

#: Characters that two windows of a long document have in common.
OVERLAP = 2**12

#: Tokens in a row that two windows must agree on.
AGREEING = 16

#: Any text will do to see what a tokenizer puts before one.
_PROBE = "Some text."


class TokenFile:
    """The tokens of some domains.

    Attributes:
        start: tokens that the tokenizer puts before every text.
    """

    def __init__(self, tokenizer: Any, *, scratch: Path | None = None) -> None:
        """Begin with no domain.

        Args:
            tokenizer: a Hugging Face tokenizer.
            scratch: folder of the file; the system's own when None.

        Raises:
            InputError: see `start_ids`.
        """
        share_heaps()  # a tokenizer's threads would each leave theirs behind
        self.start = start_ids(tokenizer)
        self._tokenizer = tokenizer
        # The folder of an output that is made later: its nearest parent that exists is on the same disk.
        place = None if scratch is None else next(place for place in (scratch, *scratch.parents) if place.is_dir())
        self._file: Any = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 - closed when this goes
        weakref.finalize(self, self._file.close)
        self._begin = 0
        self._domains: dict[str, tuple[str, int, int]] = {}

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names, in the order in which they were added."""
        return tuple(self._domains)

    def add(self, domain: str, origin: str, pieces: Iterable[Piece]) -> None:
        """Tokenize the documents of a domain.

        Args:
            domain: its name.
            origin: where its text is from, for messages.
            pieces: the documents, see `coterie.profile.documents.document_pieces`.

        Raises:
            TextError: there is no text.
        """
        self._file.seek(4 * self._begin)
        count = 0
        for ids in encoded(self._tokenizer, pieces):
            self._file.write(np.array(ids, np.int32).tobytes())
            count += len(ids)
        if not count:
            raise no_text(origin)
        self._domains[domain] = (origin, self._begin, count)
        self._begin += count

    def origin(self, domain: str) -> str:
        """Return where the text of a domain is from."""
        return self._domains[domain][0]

    def num_tokens(self, domain: str) -> int:
        """Return how many tokens a domain has, those at the ends of documents included."""
        return self._domains[domain][2]

    def rows(self, domain: str, numbers: Sequence[int], *, seq_len: int) -> Tensor:
        """Read sequences of a domain: the start tokens, and as much text as there is room for behind them.

        Args:
            domain: its name.
            numbers: which sequences, counted from the begin of the domain.
            seq_len: S.

        Returns:
            (N, S), int64.
        """
        _, begin, _ = self._domains[domain]
        rows_NS = torch.empty(len(numbers), seq_len, dtype=torch.int64)
        rows_NS[:, : len(self.start)] = torch.tensor(self.start, dtype=torch.int64)
        length = seq_len - len(self.start)
        ids: np.ndarray[Any, Any] = np.empty(length, np.int32)
        for row_S, number in zip(rows_NS, numbers, strict=True):
            self._file.seek(4 * (begin + number * length))
            self._file.readinto(ids.data)
            row_S[len(self.start) :] = torch.from_numpy(ids)
        return rows_NS


def start_ids(tokenizer: Any) -> list[int]:
    """Return the start tokens that a tokenizer puts before every text: one, or none, for most.

    What it puts behind a text, such as an end-of-text token, is none of these.

    Raises:
        InputError: it turns a text into other tokens when it adds its own.
    """
    whole, text = (list(tokenizer(_PROBE, add_special_tokens=added)["input_ids"]) for added in (True, False))
    for place in range(len(whole) - len(text) + 1):
        if whole[place : place + len(text)] == text:
            return whole[:place]
    raise InputError(
        f"the tokenizer turns {_PROBE!r} into {text} and, with its special tokens, into {whole}, where the former is "
        "no part of the latter; so it cannot be told what a text begins with: mend tokenizer.json"
    )


def encoded(tokenizer: Any, pieces: Iterable[Piece]) -> Iterator[list[int]]:
    """Tokenize documents and join them with the end-of-text token (when the tokenizer has one), piece by piece.

    Documents of nothing but white space are left out.
    """
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    short: list[str] = []
    parts: list[str] = []
    long: _LongDocument | None = None
    for text, last in pieces:
        parts.append(text)
        document = "".join(parts)
        if len(document) > WINDOW and tokenizer.is_fast and document.strip():
            yield from _ids_of(tokenizer, short, end)
            short.clear()
            long = long or _LongDocument(tokenizer)
        if long is not None and (last or len(document) > WINDOW):
            for start in range(0, len(document), WINDOW):
                yield long.extend(document[start : start + WINDOW])
            if last:
                yield long.finish() + end
                long = None
            document = ""
        elif last:
            if document.strip():
                short.append(document)
            document = ""
            if sum(map(len, short)) > WINDOW:
                yield from _ids_of(tokenizer, short, end)
                short.clear()
        parts = [document]
    yield from _ids_of(tokenizer, short, end)


def _ids_of(tokenizer: Any, documents: list[str], end: list[int]) -> Iterator[list[int]]:
    if documents:
        # verbose=False: documents longer than the model's context are cut into sequences later on.
        each = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        yield [token for ids in each for token in (*ids, *end)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Window:
    """A part of a document and its tokens: their ids, and where in the document they begin."""

    text: str
    begin: int
    ids: list[int]
    places: list[int]

    @property
    def stop(self) -> int:
        """Where it ends in the document."""
        return self.begin + len(self.text)


class _LongDocument:
    """A document that comes in pieces; its tokens go as soon as the window after them is known."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: _Window | None = None
        self._given = 0  # tokens of the window that are out already

    def extend(self, text: str) -> list[int]:
        """Take the next part of the text; return the tokens that are certain now and were not before."""
        if self._window is None:
            self._window = self._encode(text, 0)
            return []
        old = self._window
        new = self._encode(old.text[-OVERLAP:] + text, max(old.begin, old.stop - OVERLAP))
        joint = _joint(old, new, self._given)
        if joint is None:  # nothing to hold on to, as in one character over and over: one window of both
            self._window = self._encode(old.text + text, old.begin)
            return []
        ids = old.ids[self._given : joint[0]]
        self._window, self._given = new, joint[1]
        return ids

    def finish(self) -> list[int]:
        """Return the tokens that are left."""
        return [] if self._window is None else self._window.ids[self._given :]

    def _encode(self, text: str, begin: int) -> _Window:
        encoding = self._tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        places = [begin + place for place, _ in encoding["offset_mapping"]]
        return _Window(text=text, begin=begin, ids=list(encoding["input_ids"]), places=places)


def _joint(old: _Window, new: _Window, given: int) -> tuple[int, int] | None:
    """Return the numbers, in either window, of a token from which on they agree well within what they share."""
    margin = (old.stop - new.begin) // 4
    numbers = {place: number for number, place in reversed(list(enumerate(new.places))) if place < old.stop}
    first = next((number for number, place in enumerate(old.places) if place >= new.begin + margin), len(old.places))
    for number in range(max(first, given), len(old.places) - AGREEING):
        other = numbers.get(old.places[number])
        if old.places[number + AGREEING] > old.stop - margin:
            return None
        if other is None:
            continue
        mine, its = slice(number, number + AGREEING), slice(other, other + AGREEING)
        if old.ids[mine] == new.ids[its] and old.places[mine] == new.places[its]:
            return number, other
    return None
