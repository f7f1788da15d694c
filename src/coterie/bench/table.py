"""Tables of a bench, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.amounts import format_bytes, format_count
from coterie.bench.summary import Original, Row, Spread, gaps

#: After the name of a method whose result only Coterie loads.
MARK = "†"

MISSING = "–"


@dataclass(frozen=True, slots=True)
class _MethodColumn:
    """A column: its heading, a row's number, the number as text, and whether large ones are good."""

    heading: str
    value: Callable[[Row], float | None]
    text: Callable[[Row], str]
    large_is_good: bool = False
    best: bool = True


def tables(
    originals: Sequence[Original], rows: Sequence[Row], cells: Sequence[Mapping[str, Any]], *, domains: bool = True
) -> str:
    """Return all tables as one Markdown text, those by domain folded up or left out."""
    parts = []
    for original in originals:
        own = [row for row in rows if row.model == original.name]
        parts.append(f"## {original.title}\n\n{_headline(original)}\n")
        sizes = sorted({row.removed for row in own})
        if len(sizes) > 1:
            parts.append(
                "### All sizes\n\nKL to the original in nats and questions answered exactly, by the share of the "
                f"expert parameters that is removed.\n\n{_overview(own, sizes)}"
            )
        for removed in sizes:
            rows_of_size = _ordered(row for row in own if row.removed == removed)
            parts.append(f"### {share(removed)} of the expert parameters removed\n\n{_main(rows_of_size)}")
        gap = _gap_table(original.name, own, cells)
        if gap:
            parts.append(
                "### What fewer router rows cost\n\nKL with M router rows minus KL with the original's E rows and a "
                f"map from them to the M experts, on the same calibration text.\n\n{gap}"
            )
        for removed in sizes if domains else ():
            rows_of_size = _ordered(row for row in own if row.removed == removed and row.seeds)
            if rows_of_size:
                summary = f"<details><summary>By domain, {share(removed)} removed</summary>"
                parts.append(f"{summary}\n\n{_by_domain(original, rows_of_size)}\n</details>\n")
        parts.append(_left_out(own))
        parts.append(_shared_costs(original.name, cells))
    return "\n".join(part for part in parts if part)


def share(value: float) -> str:
    """Return a share as a percentage without needless digits: 62.5 %."""
    return f"{100 * value:g} %"


def name_of(row: Row) -> str:
    """Return the name of a row's method, marked where only Coterie loads the result."""
    return row.method if row.stock else f"{row.method} {MARK}"


def with_spread(value: Spread | None, digits: int, *, factor: float = 1.0, unit: str = "") -> str:
    """Write mean and deviation with so many digits after the point."""
    if value is None:
        return MISSING
    if not math.isfinite(value.mean):
        return "∞"
    text = f"{factor * value.mean:.{digits}f}"
    if value.deviation is not None:
        text += f" ± {factor * value.deviation:.{digits}f}"
    return text + unit


def damage(value: Spread | None) -> str:
    """Write a KL divergence: three digits after the point, more where it is small."""
    size = 0.0 if value is None or not math.isfinite(value.mean) else abs(value.mean)
    digits = 3 if size == 0 or size >= 0.01 else min(8, 1 - math.floor(math.log10(size)))
    return with_spread(value, digits)


def markdown(headings: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table: names to the left, numbers to the right."""
    lines = [headings, ("---", *("---:" for _ in headings[1:])), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _mean(value: Spread | None) -> float | None:
    return None if value is None else value.mean


_KL = _MethodColumn("KL (nats)", lambda row: _mean(row.kl), lambda row: damage(row.kl))
_EXACT = _MethodColumn(
    "exact answers", lambda row: _mean(row.accuracy),
    lambda row: with_spread(row.accuracy, 1, factor=100, unit=" %"), large_is_good=True,
)  # fmt: skip
_COLUMNS = (
    _KL,
    _MethodColumn(
        "top-1 agreement", lambda row: _mean(row.agreement),
        lambda row: with_spread(row.agreement, 1, factor=100, unit=" %"), large_is_good=True,
    ),
    _EXACT,
    _MethodColumn(
        "perplexity, times the original's", lambda row: _mean(row.perplexity_ratio),
        lambda row: with_spread(row.perplexity_ratio, 3),
    ),
    _MethodColumn(
        "bytes", lambda row: row.num_bytes,
        lambda row: MISSING if row.num_bytes is None else format_bytes(round(row.num_bytes)), best=False,
    ),
    _MethodColumn("seconds", lambda row: _mean(row.seconds), lambda row: with_spread(row.seconds, 1)),
    _MethodColumn(
        "peak memory", lambda row: row.peak_bytes,
        lambda row: MISSING if row.peak_bytes is None else format_bytes(row.peak_bytes),
    ),
)  # fmt: skip


def _overview(rows: Sequence[Row], sizes: Sequence[float]) -> str:
    """Return KL and exact answers at all sizes, methods in the order of the KL at the middle one."""
    methods: dict[str, dict[float, Row]] = {}
    for row in _ordered(row for row in rows if row.seeds):
        methods.setdefault(name_of(row), {})[row.removed] = row
    middle = sizes[(len(sizes) - 1) // 2]
    ordered = sorted(methods.items(), key=lambda entry: (middle not in entry[1], _kl(entry[1].get(middle))))
    body = [[name] for name, _ in ordered]
    headings = ["method"]
    for heading, column in (("KL", _KL), ("exact", _EXACT)):
        for size in sizes:
            headings.append(f"{heading}, {share(size)}")
            rows_of_size = [by_size.get(size) for _, by_size in ordered]
            for line, row_of_size in zip(body, rows_of_size, strict=True):
                line.append(MISSING if row_of_size is None else column.text(row_of_size))
            _embolden(body, rows_of_size, column)
    return markdown(headings, body)


def _kl(row: Row | None) -> float:
    return math.inf if row is None or row.kl is None else row.kl.mean


def _main(rows: Sequence[Row]) -> str:
    body = [[name_of(row)] for row in rows]
    for column in _COLUMNS:
        for line, row in zip(body, rows, strict=True):
            line.append(column.text(row))
        if column.best:
            _embolden(body, rows, column)
    return markdown(["method", *(column.heading for column in _COLUMNS)], body)


def _embolden(body: Sequence[list[str]], rows: Sequence[Row | None], column: _MethodColumn) -> None:
    """Make the best of the last entries bold."""
    # What stock loaders cannot load is no answer to the same question, so it does not compete.
    values = [column.value(row) if row is not None and row.stock and row.seeds else None for row in rows]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return
    best = max(finite) if column.large_is_good else min(finite)
    texts = [line[-1] for line, value in zip(body, values, strict=True) if value == best]
    for line, value in zip(body, values, strict=True):
        if value is not None and line[-1] in texts:
            line[-1] = f"**{line[-1]}**"


def _headline(original: Original) -> str:
    facts = [f"{format_count(original.parameters)} parameters", format_bytes(original.num_bytes)]
    if original.perplexity is not None:
        facts.append(f"perplexity {original.perplexity:.2f}")
    if original.accuracy is not None:
        facts.append(f"{100 * original.accuracy:.1f} % exact answers")
    return f"The original: {', '.join(facts)}."


def _ordered(rows: Iterable[Row]) -> list[Row]:
    """Return rows from the least to the most damage, those that cannot be done last."""
    return sorted(rows, key=lambda row: (row.kl is None, 0 if row.kl is None else row.kl.mean, row.method))


def _gap_table(model: str, rows: Sequence[Row], cells: Sequence[Mapping[str, Any]]) -> str:
    by_method = {method: values for (name, method), values in gaps(rows, cells).items() if name == model}
    if not by_method:
        return ""
    sizes = sorted({removed for values in by_method.values() for removed in values})
    body = [
        [method, *(damage(values.get(removed)) for removed in sizes)] for method, values in sorted(by_method.items())
    ]
    return markdown(["method", *(f"{share(removed)} removed" for removed in sizes)], body)


def _by_domain(original: Original, rows: Sequence[Row]) -> str:
    domains = [domain for domain in rows[0].domain_kl if all(domain in row.domain_kl for row in rows)]
    if not domains:
        return ""
    kl = [[name_of(row), *(damage(row.domain_kl[domain]) for domain in domains)] for row in rows]
    base = ["the original", *(f"{original.domains[domain]:.2f}" for domain in domains)]
    text = [[name_of(row), *(with_spread(row.domain_perplexity[domain], 2) for domain in domains)] for row in rows]
    return markdown(["KL (nats)", *domains], kl) + "\n" + markdown(["perplexity", *domains], [base, *text])


def _left_out(rows: Sequence[Row]) -> str:
    listed = [f"- {row.method}, {share(row.removed)} removed: {row.reason}" for row in rows if row.reason is not None]
    return "### Not measured\n\n" + "\n".join(listed) + "\n" if listed else ""


def _shared_costs(model: str, cells: Sequence[Mapping[str, Any]]) -> str:
    own = [cell for cell in cells if cell["model"] == model and cell["status"] == "done"]
    if not own:
        return ""
    seconds = sorted({cell["seconds"]["profile"] for cell in own})
    lines = [
        "Mean ± sample standard deviation over draws of the calibration text; the best plain result in bold. Seconds "
        "and peak memory (of the whole process) are those of compressing with one thread; the profile that methods "
        f"share took {seconds[0]:.0f} to {seconds[-1]:.0f} s more a draw."
    ]
    if any(cell["loads_with"] != "transformers" for cell in own):
        lines.append(f"{MARK} stock loaders cannot load the result, `coterie.load_model` does.")
    return "\n\n".join(lines) + "\n"
