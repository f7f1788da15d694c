"""Read JSON content strictly: every field of its type and range, none missing, none unknown.

Errors name the file and the path of the field, such as ``OUT/coterie.json: layers[3].expert_map[5] is 9``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from coterie.errors import CorruptArtifact

_SHOWN = 60  # characters of a wrong value in a message

#: Whole numbers are below this on either side of zero: tensors and other libraries hold 64 bits.
_BEYOND = 2**63


def shown(value: object) -> str:
    """Return a value for a message of one line: a plain text as it is, all else as code, and never long."""
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class Fields:
    """One JSON object, read field by field within `all_read`."""

    def __init__(self, content: object, *, where: str, path: str = "") -> None:
        """Begin with an object.

        Args:
            content: what JSON says.
            where: the file, for messages.
            path: where the object is in it, for messages; empty for the whole.

        Raises:
            CorruptArtifact: it is no object.
        """
        self._where = where
        self._path = path
        self._read: set[str] = set()
        if not isinstance(content, dict):
            raise self.wrong("", content, "should be an object")
        self._content: dict[str, Any] = content

    def wrong(self, field: str, value: object, why: str) -> CorruptArtifact:
        """Return the error for one field of this object; an empty name means the object itself."""
        path = self._inside(field) if field else self._path or "the content"
        text = repr(value)
        short = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
        return CorruptArtifact(f"{self._where}: {path} is {short}: {why}")

    def names(self) -> tuple[str, ...]:
        """Return the names of all fields, for an object whose names say something."""
        return tuple(self._content)

    def ignore(self, *names: str) -> None:
        """Count fields as read that are read elsewhere."""
        self._read.update(names)

    def null(self, name: str) -> bool:
        """Tell whether a field says null."""
        return self._take(name) is None

    def said(self, name: str) -> bool:
        """Tell whether a field that may be left out is there, and says more than null."""
        self._read.add(name)
        return self._content.get(name) is not None

    def text(self, name: str, choices: Sequence[str] = ()) -> str:
        """Return a text; one of `choices`, where there are some."""
        value = self._take(name)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.wrong(name, value, f"should be {' or '.join(choices) if choices else 'a text'}")
        return value

    def whole(self, name: str, *, least: int | None = 0) -> int:
        """Return a whole number, `least` or more."""
        return self._whole(name, self._take(name), least)

    def yes_or_no(self, name: str) -> bool:
        """Return true or false."""
        value = self._take(name)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "should be true or false")
        return value

    def text_or_whole(self, name: str) -> str | int:
        """Return a text or a whole number."""
        value = self._take(name)
        if isinstance(value, str):
            return value
        if type(value) is not int:
            raise self.wrong(name, value, "should be a text or a whole number")
        return self._whole(name, value, None)

    def number(self, name: str, *, least: float | None = None, infinite: bool = False) -> float:
        """Return a finite number, `least` or more; or infinity where that can be."""
        return self._number(name, self._take(name), least, infinite=infinite)

    def numbers(self, name: str, *, least: float | None = None) -> tuple[float, ...]:
        """Return a list of finite numbers, each `least` or more."""
        return tuple(
            self._number(f"{name}[{position}]", value, least) for position, value in enumerate(self._list(name))
        )

    def _number(self, name: str, value: Any, least: float | None, *, infinite: bool = False) -> float:
        proper = type(value) in (int, float) and (
            abs(value) < math.inf if type(value) is float else abs(value) < _BEYOND
        )
        if not proper and not (infinite and value == math.inf):
            raise self.wrong(name, value, "should be a number" if infinite else "should be a finite number")
        if least is not None and value < least:
            raise self.wrong(name, value, f"should be {least:g} or more")
        return float(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts."""
        values = self._list(name)
        for position, value in enumerate(values):
            if not isinstance(value, str):
                raise self.wrong(f"{name}[{position}]", value, "should be a text")
        return tuple(values)

    def wholes(self, name: str, *, least: int | None = 0) -> tuple[int, ...]:
        """Return a list of whole numbers, each `least` or more."""
        return tuple(
            self._whole(f"{name}[{position}]", value, least) for position, value in enumerate(self._list(name))
        )

    def rows(self, name: str, *, least: int = 0) -> tuple[tuple[int, ...], ...]:
        """Return a list of lists of whole numbers, each `least` or more."""
        rows = []
        for position, value in enumerate(self._list(name)):
            if not isinstance(value, list):
                raise self.wrong(f"{name}[{position}]", value, "should be a list")
            numbers = (self._whole(f"{name}[{position}][{place}]", number, least) for place, number in enumerate(value))
            rows.append(tuple(numbers))
        return tuple(rows)

    def named_wholes(self, name: str) -> tuple[tuple[str, int], ...]:
        """Return a list of names with a whole number from 0 on each: ``[["a", 0], ["b", 1]]``."""
        pairs = []
        for position, value in enumerate(self._list(name)):
            match value:
                case [str(key), int(number)] if type(number) is int and 0 <= number < _BEYOND:
                    pairs.append((key, number))
                case _:
                    raise self.wrong(f"{name}[{position}]", value, "should be a name and a whole number from 0 on")
        return tuple(pairs)

    def pairs(self, name: str) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Return a list of names with an object of any content each: ``[["a", {}], ["b", {"x": 1}]]``."""
        return tuple(self._pair(f"{name}[{position}]", value) for position, value in enumerate(self._list(name)))

    def pair(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return a name with an object of any content: ``["a", {}]``."""
        return self._pair(name, self._take(name))

    def _pair(self, field: str, value: Any) -> tuple[str, dict[str, Any]]:
        match value:
            case [str(key), dict(content)]:
                self._check_finite(field, content)
                return key, content
        raise self.wrong(field, value, "should be a name and an object")

    def nested(self, name: str) -> Fields:
        """Return an object to be read on."""
        return Fields(self._take(name), where=self._where, path=self._inside(name))

    def each(self, name: str) -> list[Fields]:
        """Return a list of objects to be read on."""
        return [
            Fields(value, where=self._where, path=self._inside(f"{name}[{position}]"))
            for position, value in enumerate(self._list(name))
        ]

    def each_by_name(self, name: str) -> dict[str, Fields]:
        """Return an object of objects to be read on, by name."""
        inside = self.nested(name)
        return {key: inside.nested(key) for key in inside.names()}

    def wholes_by_name(self, name: str) -> dict[str, int]:
        """Return an object of whole numbers, each 0 or more."""
        inside = self.nested(name)
        return {key: inside.whole(key) for key in inside.names()}

    def texts_by_name(self, name: str) -> dict[str, str]:
        """Return an object of texts."""
        inside = self.nested(name)
        return {key: inside.text(key) for key in inside.names()}

    def texts_or_wholes_by_name(self, name: str) -> dict[str, str | int]:
        """Return an object of texts and whole numbers."""
        inside = self.nested(name)
        return {key: inside.text_or_whole(key) for key in inside.names()}

    def content(self, name: str) -> dict[str, Any]:
        """Return an object of any content, but without numbers that are none, which JSON does not have."""
        value = self._take(name)
        if not isinstance(value, dict):
            raise self.wrong(name, value, "should be an object")
        self._check_finite(name, value)
        return value

    @contextmanager
    def all_read(self) -> Iterator[None]:
        """Refuse, when the block is left, fields that it did not read, and what the type that it built refuses.

        Raises:
            CorruptArtifact: a field is unknown, or the block raised ValueError with a message that begins with a field.
        """
        try:
            yield
        except ValueError as error:
            path = f"{self._path}." if self._path else ""
            raise CorruptArtifact(f"{self._where}: {path}{error}") from None
        for name in sorted(self._content.keys() - self._read):
            raise self.wrong(name, self._content[name], "no such field is known")

    def _inside(self, field: str) -> str:
        return f"{self._path}.{shown(field)}" if self._path else shown(field)

    def _take(self, name: str) -> Any:
        self._read.add(name)
        if name not in self._content:
            raise CorruptArtifact(f"{self._where}: {self._inside(name)} is missing")
        return self._content[name]

    def _list(self, name: str) -> list[Any]:
        value = self._take(name)
        if not isinstance(value, list):
            raise self.wrong(name, value, "should be a list")
        return value

    def _whole(self, field: str, value: object, least: int | None) -> int:
        if type(value) is not int or (least is not None and value < least):
            raise self.wrong(field, value, "should be a whole number" + ("" if least is None else f" from {least} on"))
        self._check_bits(field, value)
        return value

    def _check_bits(self, field: str, value: object) -> None:
        if type(value) is int and abs(value) >= _BEYOND:
            raise self.wrong(field, value, "should be a whole number of at most 64 bits")

    def _check_finite(self, field: str, value: object) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise self.wrong(field, value, "should be a finite number")
        self._check_bits(field, value)
        entries = (
            ((f"{field}.{key}", entry) for key, entry in value.items())
            if isinstance(value, dict)
            else ((f"{field}[{position}]", entry) for position, entry in enumerate(value))
            if isinstance(value, list)
            else ()
        )
        for path, entry in entries:
            self._check_finite(path, entry)


def plain_content(value: Any) -> Any:
    """Return what JSON keeps of a value: tuples become lists, mappings dicts, and numbers that are none null."""
    if isinstance(value, Mapping):
        return {str(key): plain_content(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [plain_content(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
