"""Tokens of a text in a file that has no name: made once, in bounded memory, and read row by row.

A text is tokenized in pieces. Many short documents are one piece; a long document is cut into windows that overlap, and
two windows are joined where, within the overlap, they agree on many tokens in a row: what stands far away does not
change how text is cut into tokens, so the ids are those of the whole document.

Where only answers count, a second file says of every token whether it is part of one: a token is where one of its
characters is.

Legend: N sequences, S tokens of a sequence.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.errors import InputError, TextError
from coterie.model.stream.spill import share_heaps
from coterie.profile.chat import Span, write_out
from coterie.profile.documents import no_text
from coterie.profile.rows import Conversation, Document

log = logging.getLogger(__name__)

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
        answers: whether only tokens of answers count.
    """

    def __init__(self, tokenizer: Any, *, scratch: Path | None = None, answers: bool = False) -> None:
        """Begin with no domain.

        Args:
            tokenizer: a Hugging Face tokenizer.
            scratch: folder of the file; the system's own when None.
            answers: whether only tokens of answers count.

        Raises:
            InputError: see `start_ids`; or answers are asked for, and the tokenizer does not say where its tokens are.
        """
        if answers and not tokenizer.is_fast:
            raise InputError(
                "this tokenizer does not say which characters its tokens are, so those of answers cannot be told from "
                "others: make a tokenizer.json of it, or leave --on assistant out"
            )
        share_heaps()  # a tokenizer's threads would each leave theirs behind
        self.start = start_ids(tokenizer)
        self._tokenizer = tokenizer
        # The folder of an output that is made later: its nearest parent that exists is on the same disk.
        place = None if scratch is None else next(place for place in (scratch, *scratch.parents) if place.is_dir())
        self.answers = answers
        self._file: Any = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 - closed when this goes
        self._marks: Any = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
        for file in (self._file, self._marks):
            weakref.finalize(self, file.close)
        self._begin = 0
        self._domains: dict[str, tuple[str, int, int]] = {}
        self._with_chat: set[str] = set()

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names, in the order in which they were added."""
        return tuple(self._domains)

    def add(self, domain: str, origin: str, pieces: Iterable[Document], *, limit: int | None = None) -> None:
        """Tokenize the documents of a domain.

        Args:
            domain: its name.
            origin: where its text is from, for messages.
            pieces: the documents, see `coterie.profile.documents.document_pieces`.
            limit: read no more where there are so many tokens; None to read all.

        Raises:
            TextError: there is no text or, where only answers count, no answer.
        """
        self._file.seek(4 * self._begin)
        self._marks.seek(self._begin)
        count = num_answers = 0
        for tokens in _tokens(self._tokenizer, self._noting_chat(domain, pieces), answers=self.answers):
            self._file.write(np.array(tokens.ids, np.int32).tobytes())
            count += len(tokens.ids)
            if self.answers:
                self._marks.write(tokens.counts.tobytes())
                num_answers += int(tokens.counts.sum())
            if limit is not None and count >= limit:
                log.warning("of %s the first %d tokens are read; a folder of it is read as a whole", origin, count)
                break
        if not count:
            raise no_text(origin)
        if self.answers and not num_answers:
            raise TextError(
                f"{origin} holds no answers, that is no messages of the role assistant and no completions: leave it "
                "out, or leave --on assistant out"
            )
        self._domains[domain] = (origin, self._begin, count)
        self._begin += count

    def _noting_chat(self, domain: str, pieces: Iterable[Document]) -> Iterator[Document]:
        for piece in pieces:
            if isinstance(piece, Conversation):
                self._with_chat.add(domain)
            yield piece

    def origin(self, domain: str) -> str:
        """Return where the text of a domain is from."""
        return self._domains[domain][0]

    def num_tokens(self, domain: str) -> int:
        """Return how many tokens a domain has, those at the ends of documents included."""
        return self._domains[domain][2]

    def num_rows(self, domain: str, *, seq_len: int) -> int:
        """Return how many sequences of a domain there are."""
        # A sequence that begins with a conversation may take the room of its start tokens as well.
        spare = len(self.start) if domain in self._with_chat else 0
        return max(0, self.num_tokens(domain) - spare) // (seq_len - len(self.start))

    def rows(self, domain: str, numbers: Sequence[int], *, seq_len: int) -> Tensor:
        """Read sequences of a domain: the start tokens, and as much text as there is room for behind them.

        A sequence that begins where a chat template wrote the start tokens itself has them once: it ends as many tokens
        later, with those that the next one begins with.

        Args:
            domain: its name.
            numbers: which sequences, counted from the begin of the domain.
            seq_len: S.

        Returns:
            (N, S), int64.
        """
        rows_NS = torch.empty(len(numbers), seq_len, dtype=torch.int64)
        for row_S, (ids, _) in zip(rows_NS, self._cut(domain, numbers, seq_len, marks=False), strict=True):
            row_S[:] = torch.from_numpy(ids)
        return rows_NS

    def counts(self, domain: str, numbers: Sequence[int], *, seq_len: int) -> Tensor:
        """Tell of every token of sequences, see `rows`, whether it is part of an answer; (N, S), bool."""
        counts_NS = torch.empty(len(numbers), seq_len, dtype=torch.bool)
        for row_S, (_, marks) in zip(counts_NS, self._cut(domain, numbers, seq_len, marks=True), strict=True):
            row_S[:] = torch.from_numpy(marks)
        return counts_NS

    def _cut(
        self, domain: str, numbers: Sequence[int], seq_len: int, *, marks: bool
    ) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Yield the tokens of sequences, and which of them are answers."""
        _, begin, _ = self._domains[domain]
        start = np.array(self.start, np.int32)
        length = seq_len - len(start)
        read = seq_len if domain in self._with_chat else length
        for number in numbers:
            place = begin + number * length
            ids = _read(self._file, place, read, np.int32)
            own = len(start) > 0 and read == seq_len and bool((ids[: len(start)] == start).all())
            counts = _read(self._marks, place, read, np.bool_) if marks else np.zeros(read, np.bool_)
            if own:
                yield ids, counts
            else:
                yield (
                    np.concatenate((start, ids[:length])),
                    np.concatenate((np.zeros(len(start), np.bool_), counts[:length])),
                )


def _read(file: Any, place: int, count: int, dtype: Any) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = np.empty(count, dtype)
    file.seek(values.itemsize * place)
    file.readinto(values.data)
    return values


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


def encoded(tokenizer: Any, pieces: Iterable[Document]) -> Iterator[list[int]]:
    """Tokenize documents and join them with the end-of-text token (when the tokenizer has one), piece by piece.

    Documents of nothing but white space are left out. Nothing is put behind what a chat template wrote.

    Raises:
        TextError: a chat template is missing, or does not take the messages.
    """
    return (tokens.ids for tokens in _tokens(tokenizer, pieces, answers=False))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """Tokens in a row: their ids, and which of them are part of answers, where somebody asked."""

    ids: list[int]
    counts: np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """The text of a whole document, the answers in it, and what is put behind it."""

    text: str
    answers: tuple[Span, ...]
    end: list[int]


def _tokens(tokenizer: Any, pieces: Iterable[Document], *, answers: bool) -> Iterator[_Tokens]:
    """Tokenize documents, piece by piece; `answers` tells whether to mark them."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    short: list[_Text] = []
    num_characters = 0  # in these
    parts: list[str] = []
    long: _LongDocument | None = None
    for piece in pieces:
        spans: tuple[Span, ...] = ()
        behind = end
        if isinstance(piece, tuple):
            text, last = piece
        else:
            written = write_out(tokenizer, piece, answers=answers)
            text, last, spans = written.text, True, written.answers
            behind = end if written.ends else []
        parts.append(text)
        document = "".join(parts)
        if len(document) > WINDOW and tokenizer.is_fast and document.strip():
            yield from _tokens_of(tokenizer, short, answers=answers)
            short.clear()
            num_characters = 0
            long = long or _LongDocument(tokenizer)
        if long is not None and (last or len(document) > WINDOW):
            for start in range(0, len(document), WINDOW):
                yield _marked(long.extend(document[start : start + WINDOW]), spans, [])
            if last:
                yield _marked(long.finish(), spans, behind)
                long = None
            document = ""
        elif last:
            if document.strip():
                short.append(_Text(text=document, answers=spans, end=behind))
                num_characters += len(document)
            document = ""
            if num_characters > WINDOW:
                yield from _tokens_of(tokenizer, short, answers=answers)
                short.clear()
                num_characters = 0
        parts = [document]
    yield from _tokens_of(tokenizer, short, answers=answers)


def _tokens_of(tokenizer: Any, documents: list[_Text], *, answers: bool) -> Iterator[_Tokens]:
    if not documents:
        return
    # verbose=False: documents longer than the model's context are cut into sequences later on.
    encoding = tokenizer(
        [each.text for each in documents], add_special_tokens=False, verbose=False,
        **({"return_offsets_mapping": True} if answers else {}),
    )  # fmt: skip
    if not answers:
        ids = [
            token for each, text in zip(encoding["input_ids"], documents, strict=True) for token in (*each, *text.end)
        ]
        yield _Tokens(ids=ids, counts=np.zeros(0, np.bool_))
        return
    for ids, places, text in zip(encoding["input_ids"], encoding["offset_mapping"], documents, strict=True):
        yield _marked(
            _Cut(ids=list(ids), places=[p for p, _ in places], stops=[s for _, s in places]), text.answers, text.end
        )


def _marked(cut: _Cut, answers: tuple[Span, ...], end: list[int]) -> _Tokens:
    """Return tokens, and those behind them, with which of them are part of answers."""
    counts = np.zeros(len(cut.ids) + len(end), np.bool_)
    if answers:
        begins, stops = np.array(answers, np.int64).T
        first = np.searchsorted(stops, np.array(cut.places, np.int64), side="right")  # the answer that ends behind it
        inside = first < len(stops)
        counts[: len(cut.ids)] = inside & (begins[first.clip(max=len(stops) - 1)] < np.array(cut.stops, np.int64))
        counts[len(cut.ids) :] = True
    return _Tokens(ids=[*cut.ids, *end], counts=counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cut:
    """Tokens in a row: their ids, and where in the document they begin and stop."""

    ids: list[int]
    places: list[int]
    stops: list[int]


_NOTHING = _Cut(ids=[], places=[], stops=[])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Window:
    """A part of a document and its tokens: their ids, and where in the document they begin and stop."""

    text: str
    begin: int
    ids: list[int]
    places: list[int]
    stops: list[int]

    def part(self, first: int, last: int | None = None) -> _Cut:
        """Return some of its tokens, by their numbers."""
        here = slice(first, last)
        return _Cut(ids=self.ids[here], places=self.places[here], stops=self.stops[here])

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

    def extend(self, text: str) -> _Cut:
        """Take the next part of the text; return the tokens that are certain now and were not before."""
        if self._window is None:
            self._window = self._encode(text, 0)
            return _NOTHING
        old = self._window
        new = self._encode(old.text[-OVERLAP:] + text, max(old.begin, old.stop - OVERLAP))
        joint = _joint(old, new, self._given)
        if joint is None:  # nothing to hold on to, as in one character over and over: one window of both
            self._window = self._encode(old.text + text, old.begin)
            return _NOTHING
        cut = old.part(self._given, joint[0])
        self._window, self._given = new, joint[1]
        return cut

    def finish(self) -> _Cut:
        """Return the tokens that are left."""
        return _NOTHING if self._window is None else self._window.part(self._given)

    def _encode(self, text: str, begin: int) -> _Window:
        encoding = self._tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        places, stops = ([begin + pair[side] for pair in encoding["offset_mapping"]] for side in (0, 1))
        return _Window(text=text, begin=begin, ids=list(encoding["input_ids"]), places=places, stops=stops)


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
