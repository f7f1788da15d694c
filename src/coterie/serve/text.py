"""The text of tokens that come one by one: none of it changes later, and none comes from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What stands for bytes that are no character, or not yet.
_UNFINISHED = "\ufffd"


class Text:
    """The text of an answer so far.

    Attributes:
        is_stopped: a stop string has come; there is no more text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, special: bool = False) -> None:
        """Begin.

        Args:
            tokenizer: turns tokens into text.
            stops: strings at which the text ends, before them.
            special: whether special tokens are part of the text.
        """
        self.is_stopped = False
        self._tokenizer, self._stops, self._special = tokenizer, tuple(stops), special
        self._ids: list[int] = []
        self._begin = self._read = 0
        self._kept = ""

    def add(self, token: int) -> str:
        """Take a token, and return the text that is certain now."""
        self._ids.append(token)
        # How a token is written may depend on the one before it, so some that are known are read again.
        known, text = self._decode(self._ids[self._begin : self._read]), self._decode(self._ids[self._begin :])
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._up_to_stop(text[len(known) :])

    def rest(self) -> str:
        """Return what was kept back, as no more tokens come."""
        known, text = self._decode(self._ids[self._begin : self._read]), self._decode(self._ids[self._begin :])
        certain = self._up_to_stop(text[len(known) :])
        kept, self._kept = self._kept, ""
        return certain if self.is_stopped else certain + kept

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not self._special))

    def _up_to_stop(self, text: str) -> str:
        """Return a text up to a stop string; keep back what may be the beginning of one."""
        if self.is_stopped:
            return ""
        text = self._kept + text
        begins = [begin for stop in self._stops if (begin := text.find(stop)) >= 0]
        if begins:
            self.is_stopped, self._kept = True, ""
            return text[: min(begins)]
        most = min(len(text), max(map(len, self._stops), default=1) - 1)
        count = next(
            (size for size in range(most, 0, -1) if any(stop.startswith(text[-size:]) for stop in self._stops)), 0
        )
        self._kept = text[len(text) - count :]
        return text[: len(text) - count]
