"""Numbers as words: one way to write bytes, percentages and scores everywhere on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from coterie.amounts import format_bytes

MISSING = "–"


def bytes_text(count: int | None) -> str:
    """Return bytes with a binary unit and three digits: ``12.3 MiB``."""
    return MISSING if count is None else format_bytes(count)


def percent_text(share: float | None, digits: int = 0) -> str:
    """Return a share as a percentage: ``54 %``."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{100 * share:.{digits}f}\u202f%"


def number_text(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits and no exponent where that stays short."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "∞" if value > 0 else MISSING
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def error_text(error: float | None) -> str:
    """Return a standard error as it stands behind a number: ``± 0.012``; nothing where there is none."""
    return "" if error is None else f"± {number_text(error, 2)}"


def times_text(ratio: float | None) -> str:
    """Return a ratio: ``1.08×``."""
    return MISSING if ratio is None else f"{number_text(ratio)}×"


def count_text(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun: ``1 layer``, ``6 layers``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def ranges_text(numbers: Sequence[int]) -> str:
    """Return ascending numbers with runs of three and more joined: ``1–4, 7, 9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts) or MISSING


def range_text(values: Sequence[int]) -> str:
    """Return the one value, or the smallest and the largest: ``16`` or ``12–20``."""
    if not values:
        return MISSING
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def note_text(value: object) -> str:
    """Return anything that a pass noted as short text: numbers rounded, long lists summed up."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number_text(value) if abs(value) >= 1e-3 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {note_text(entry)}" for key, entry in value.items()) or MISSING
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _list_text(value)
    return str(value)


def _list_text(values: Sequence[object]) -> str:
    if not values:
        return MISSING
    if all(isinstance(value, bool) for value in values):
        return f"{sum(map(bool, values))} of {len(values)}"
    values = [value for value in values if value is not None] or [None]
    numbers = [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) == len(values) and len(values) > 4:
        middle = sorted(numbers)[len(numbers) // 2]
        return f"{min(numbers):.3g} … {middle:.3g} … {max(numbers):.3g}"
    if len(values) > 8:
        return f"{len(values)} entries"
    return ", ".join(note_text(value) for value in values)
