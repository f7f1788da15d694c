"""The fields of a GGUF header, asked for by name: numbers, texts and lists that are what they should be."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coterie.errors import CorruptCheckpoint
from coterie.model.disk.gguf.header import List


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFields:
    """Fields of a file, those of its architecture by the rest of their names.

    Attributes:
        where: the file, for messages.
        fields: values by their whole name.
        architecture: what llama.cpp calls the family.
    """

    where: str
    fields: Mapping[str, Any]
    architecture: str

    @classmethod
    def of(cls, where: str, fields: Mapping[str, Any]) -> GgufFields:
        """Take the fields of a header.

        Raises:
            CorruptCheckpoint: it names no architecture.
        """
        architecture = fields.get("general.architecture")
        if not isinstance(architecture, str):
            raise CorruptCheckpoint(f"{where}: it names no general.architecture; fetch this file again")
        return cls(where=where, fields=fields, architecture=architecture)

    def __contains__(self, key: str) -> bool:
        return self._name(key) in self.fields

    def whole(self, key: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        """Return a whole number from 0 on; of a list, the one that all its entries are."""
        value = self._value(key, default)
        if isinstance(value, List) and value.count <= 2**16:
            entries = set(value.values())
            if len(entries) != 1:
                raise self.wrong(key, f"differs by layer ({', '.join(str(entry) for entry in sorted(entries)[:4])})")
            value = entries.pop()
        if type(value) is not int or not 0 <= value <= most:
            raise self.wrong(key, f"is {str(value)[:40]!r}, which is no whole number up to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number with a fraction, as the shortest decimal that is the same in 32 bits."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(key, f"is {str(value)[:40]!r}, which is no number")
        return shortest(float(value))

    def truth(self, key: str, default: bool | None = None) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.wrong(key, f"is {str(value)[:40]!r}, which is neither true nor false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, f"is {str(value)[:40]!r}, which is no text")
        return value

    def list_of(self, key: str, kind: type) -> list[Any]:
        """Return the entries of a list, all of one kind."""
        value = self._value(key, None)
        entries = value.values() if isinstance(value, List) else None
        if entries is None or not all(type(entry) is kind for entry in entries):
            raise self.wrong(key, f"is no list of {kind.__name__}")
        return entries

    def wrong(self, key: str, what: str) -> CorruptCheckpoint:
        """Return the error that a field is not what it should be."""
        return CorruptCheckpoint(f"{self.where}: {self._name(key)} {what}; fetch this file again, or take another")

    def _name(self, key: str) -> str:
        return key if key.startswith(("general.", "tokenizer.", "split.")) else f"{self.architecture}.{key}"

    def _value(self, key: str, default: Any) -> Any:
        value = self.fields.get(self._name(key), default)
        if value is None:
            raise self.wrong(key, "is missing")
        return value


def shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same number in 32 bits: 1e-06 for 9.999999974752427e-07."""
    try:
        bits = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == bits:
            return short
    return value
