"""Bytes and counts as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from coterie.errors import InputError

_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | _BINARY

#: Digits of an amount at most, and bytes below which one without a unit is a slip.
_DIGITS, _FEW = 40, 1024

#: Letters behind a number of parameters.
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

_BY_LOWER = {name.lower(): size for name, size in _UNITS.items()}


def parse_bytes(text: str | int) -> int:
    """Read an amount of bytes: ``12GiB`` (2^30), ``12GB`` (10^9), ``1.5 GiB``, ``800MB``, or plain bytes.

    Upper and lower case do not matter. Fractions of a byte are cut off.

    Raises:
        InputError: not an amount, an ambiguous or unknown unit, or nothing at all (zero, negative).
    """
    examples = "write an amount like 12GiB (2^30 bytes), 12GB (10^9 bytes), 800MB, or plain bytes like 12884901888"
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text), flags=re.ASCII)
    if match is None:
        raise InputError(f"{str(text)!r} is no amount of bytes; {examples}")
    number, unit = match.groups()
    if unit.lower() in ("k", "m", "g", "t"):
        letter = unit.upper()
        raise InputError(f"{str(text)!r} can mean two things; write {number}{letter}iB or {number}{letter}B")
    if unit and unit.lower() not in _BY_LOWER:
        raise InputError(f"{str(text)!r} has the unknown unit {unit!r}; {examples}")
    if not unit and "." in number:
        raise InputError(f"{str(text)!r} has no unit, and bytes come whole; did you mean {number}GiB? {examples}")
    if len(number) > _DIGITS:
        raise InputError(f"an amount of {len(number)} digits is more than there is; {examples}")
    size = int(Fraction(number) * _BY_LOWER.get(unit.lower(), 1))
    if size <= 0:
        raise InputError(f"{str(text)!r} is {size} bytes, which holds nothing; {examples}")
    if not unit and size < _FEW:
        raise InputError(
            f"{str(text)!r} has no unit, and {size} bytes hold no model; did you mean {number}GiB? {examples}"
        )
    return size


def parse_count(text: str | int) -> int:
    """Read a number of parameters: ``15B`` (10^9), ``350M``, ``1.5 T``, or a plain number. Fractions are cut off.

    Raises:
        InputError: no number, an unknown unit, or nothing at all (zero, negative).
    """
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*([A-Za-z]?)\s*", str(text), flags=re.ASCII)
    examples = "write a number like 15B (10^9), 350M, or 15000000000"
    if match is None or match[2].lower() not in _COUNTS:
        raise InputError(f"{str(text)!r:.60} is no number of parameters; {examples}")
    number, unit = match.groups()
    if len(number) > _DIGITS:
        raise InputError(f"a number of {len(number)} digits is more than there is; {examples}")
    count = int(Fraction(number) * _COUNTS[unit.lower()])
    if count <= 0:
        raise InputError(f"{str(text)!r} parameters are none; {examples}")
    return count


def parse_share(text: str | float) -> float:
    """Read a share: ``0.5``, or ``50%``; whether it is in range is not asked.

    Raises:
        InputError: it is no number.
    """
    match = re.fullmatch(r"\s*(\S+?)\s*(%?)\s*", str(text))
    try:
        if match is None:
            raise ValueError
        share = float(match[1])
    except ValueError:
        raise InputError(f"{str(text)!r:.60} is no share; write 0.5 or 50%") from None
    return share / 100 if match[2] else share


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that random numbers cannot be drawn from: it has 63 bits, and no sign."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed {seed!s:.40} cannot be; give a whole number from 0 to {2**63 - 1}")


def format_bytes(size: int) -> str:
    """Write an amount of bytes with a binary unit and three digits: ``11.9 GiB``, ``832 B``."""
    value = float(size)
    for unit in ("B", *_BINARY):
        if abs(value) < 999.5 or unit == "TiB":
            return f"{size} B" if unit == "B" else f"{_three_digits(value)} {unit}"
        value /= 1024
    raise AssertionError


def format_count(count: int) -> str:
    """Write a number of parameters with three digits: ``30.5 B`` (10^9), ``393 k``, ``832``."""
    value = float(count)
    for unit in ("", "k", "M", "B", "T"):
        if abs(value) < 999.5 or unit == "T":
            return str(count) if not unit else f"{_three_digits(value)} {unit}"
        value /= 1000
    raise AssertionError


def _three_digits(value: float) -> str:
    for decimals in (2, 1):
        if abs(round(value, decimals)) < 10 ** (3 - decimals):
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"
