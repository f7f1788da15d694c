"""The plot of a bench: damage against bytes, a line a method, a panel a model; as SVG and, with matplotlib, as PNG."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coterie.amounts import format_bytes
from coterie.artifact import atomic_path
from coterie.bench.summary import Original, Row
from coterie.bench.table import name_of
from coterie.report.draw import NUM_SERIES, Drawing, marker_of, tick_label, ticks
from coterie.report.plots import Scale

log = logging.getLogger(__name__)

CAPTION_X = "bytes"
CAPTION_Y = "KL to the original in nats (log scale)"

#: Colours of the series of a picture that stands alone, and for pages with a dark background.
_LIGHT = ("0072b2", "d55e00", "009e73", "cc79a7", "b8860b", "56b4e9", "6b7280")
_DARK = ("4aa3e0", "f08a3c", "2fc79b", "e09cc4", "d9b23c", "8fd0f5", "9ca3af")

_STYLE = """
svg { background: %(back)s; } text { fill: %(ink)s; font: 12.5px system-ui, sans-serif; }
.end { text-anchor: end; } .middle { text-anchor: middle; } .axis { fill: %(soft)s; } .head { font-weight: 600; }
.grid { stroke: %(line)s; } .base { stroke: %(soft)s; } .join { fill: none; stroke-width: 1.6; opacity: 0.8; }
.dashed { stroke-dasharray: 5 4; } .bar { stroke-width: 1.2; opacity: 0.7; } .mark { stroke: %(back)s; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _PlotLine:
    """One method on one model: its points from small to large, as (bytes, KL, deviation of KL).

    It is dashed where stock loaders do not load the results.
    """

    series: int
    name: str
    dashed: bool
    points: tuple[tuple[float, float, float], ...]


def draw_svg(originals: Sequence[Original], rows: Sequence[Row]) -> str:
    """Return the plot as an SVG document that needs nothing else."""
    panels = _panels(originals, rows)
    legend = _legend(panels)
    width, left, plot_width, tall, head, foot = 1180.0, 70.0, 780.0, 380.0, 34.0, 58.0
    step = head + tall + foot
    height = max(step * len(panels), 40 + 19.0 * len(legend))
    drawing = Drawing(width, height, f"{CAPTION_Y} against {CAPTION_X}")
    for number, (original, lines) in enumerate(panels):
        _panel(drawing, original, lines, (left, step * number + head, left + plot_width, step * number + head + tall))
    for place, line in enumerate(legend):
        y = 30 + 19.0 * place
        x = left + plot_width + 40
        drawing.line(x - 14, y - 4, x + 14, y - 4, _css(line))
        drawing.mark(x, y - 4, line.series)
        drawing.text(x + 22, y, line.name)
    return _stand_alone(str(drawing.render()))


def draw_png(originals: Sequence[Original], rows: Sequence[Row], path: Path) -> bool:
    """Write the plot as PNG where matplotlib is installed; tell whether it is."""
    if find_spec("matplotlib") is None:
        log.info("matplotlib is not installed: the plot is there as SVG only")
        return False
    from matplotlib.figure import Figure

    markers = {"circle": "o", "square": "s", "diamond": "D", "up": "^", "down": "v"}
    panels = _panels(originals, rows)
    figure = Figure(figsize=(11, 4.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    handles: dict[str, Any] = {}
    for (original, lines), axis in zip(panels, axes, strict=True):
        for line in lines:
            sizes, damage, deviation = zip(*line.points, strict=True)
            handles[line.name] = axis.errorbar(
                sizes, damage, yerr=deviation, label=line.name, color=f"#{_LIGHT[line.series % NUM_SERIES]}",
                marker=markers[marker_of(line.series)], linestyle="--" if line.dashed else "-", markersize=5,
                linewidth=1.2, capsize=2,
            )  # fmt: skip
        axis.set(title=_title(original), xlabel=CAPTION_X, ylabel=CAPTION_Y)
        if lines:
            x, y = _scales(lines, (0, 0, 1, 1))
            across, upward = _size_ticks(x), y.ticks()
            axis.set(yscale="log", xlim=(x.low, x.high), ylim=(y.low, y.high))
            axis.set_xticks(across, [format_bytes(round(size)) for size in across])
            axis.set_yticks(upward, [tick_label(value) for value in upward])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    names = [line.name for line in _legend(panels)]
    if names:
        figure.legend([handles[name] for name in names], names, loc="outside right upper", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return True


def _panels(originals: Sequence[Original], rows: Sequence[Row]) -> list[tuple[Original, list[_PlotLine]]]:
    """Return each model with its lines.

    A recipe is the same series on all models. Series go by damage: lines that lie near each other look different.
    """
    recipes = sorted(dict.fromkeys(row.recipe for row in rows), key=lambda recipe: _damage(rows, recipe))
    panels = []
    for original in originals:
        lines = []
        for method in dict.fromkeys(row.method for row in rows if row.model == original.name):
            own = [row for row in rows if (row.model, row.method) == (original.name, method)]
            points = tuple(
                sorted(
                    (row.num_bytes, row.kl.mean, row.kl.deviation or 0.0)
                    for row in own
                    if row.kl is not None and row.num_bytes is not None and 0 < row.kl.mean < math.inf
                )
            )
            if points:
                series = recipes.index(own[0].recipe)
                measured = next(row for row in own if row.seeds)
                name, dashed = name_of(measured), not measured.stock
                lines.append(_PlotLine(series=series, name=name, dashed=dashed, points=points))
        panels.append((original, lines))
    return panels


def _damage(rows: Sequence[Row], recipe: str) -> float:
    """Return the mean logarithm of a recipe's KL."""
    logs = [math.log(row.kl.mean) for row in rows if row.recipe == recipe and row.kl and 0 < row.kl.mean < math.inf]
    return math.fsum(logs) / len(logs) if logs else math.inf


def _legend(panels: Sequence[tuple[Original, Sequence[_PlotLine]]]) -> list[_PlotLine]:
    """Return one line a method, from the most to the least damage in the first panel that has it."""
    by_name: dict[str, _PlotLine] = {}
    for _, lines in panels:
        for line in sorted(lines, key=lambda line: -math.fsum(math.log(point[1]) for point in line.points)):
            by_name.setdefault(line.name, line)
    return list(by_name.values())


def _panel(
    drawing: Drawing, original: Original, lines: Sequence[_PlotLine], box: tuple[float, float, float, float]
) -> None:
    left, top, right, floor = box
    drawing.text(left, top - 14, _title(original), "head")
    drawing.line(left, floor, right, floor, "base")
    if not lines:
        drawing.text((left + right) / 2, (top + floor) / 2, "nothing was measured", "middle axis")
        return
    x, y = _scales(lines, box)
    for value in _size_ticks(x):
        place = x.place(value)
        drawing.line(place, top, place, floor)
        drawing.text(place, floor + 17, format_bytes(round(value)), "middle")
    for value in y.ticks():
        drawing.line(left, y.place(value), right, y.place(value))
        drawing.text(left - 8, y.place(value) + 4, tick_label(value), "end")
    drawing.text((left + right) / 2, floor + 36, CAPTION_X, "middle axis")
    drawing.text(right, top - 14, CAPTION_Y, "end axis")
    for line in lines:
        placed = [(x.place(size), y.place(value)) for size, value, _ in line.points]
        if len(placed) > 1:
            drawing.path(placed, _css(line), line.name)
        for (across, down), (size, value, deviation) in zip(placed, line.points, strict=True):
            if deviation:
                low = y.place(max(y.low, value - deviation))
                high = y.place(min(y.high, value + deviation))
                drawing.line(across, low, across, high, f"bar l{line.series % NUM_SERIES}")
            drawing.mark(across, down, line.series, f"{line.name}: {value:.4g} nats, {format_bytes(round(size))}")


def _scales(lines: Sequence[_PlotLine], box: tuple[float, float, float, float]) -> tuple[Scale, Scale]:
    """Return the axes of a panel, for bytes and for damage."""
    left, top, right, floor = box
    sizes = [size for line in lines for size, _, _ in line.points]
    damage = [value for line in lines for _, value, _ in line.points]
    pad = (max(sizes) - min(sizes)) * 0.06 or 0.05 * max(sizes)
    return (
        Scale(low=min(sizes) - pad, high=max(sizes) + pad, start=left, end=right),
        Scale(low=min(damage) / 1.25, high=max(damage) * 1.25, start=floor, end=top, log=True),
    )


def _size_ticks(scale: Scale) -> list[float]:
    """Return numbers of bytes that are round in their unit."""
    unit = 1024.0 ** math.floor(math.log2(scale.high) / 10)
    return [value * unit for value in ticks(scale.low / unit, scale.high / unit, 7)]


def _title(original: Original) -> str:
    return f"{original.title}, {format_bytes(original.num_bytes)}"


def _css(line: _PlotLine) -> str:
    return f"join l{line.series % NUM_SERIES}" + (" dashed" if line.dashed else "")


def _stand_alone(svg: str) -> str:
    """Return an SVG element as a document: with its name space and its style."""

    def style(colours: Sequence[str], **named: str) -> str:
        series = "".join(
            f".s{number} {{ fill: #{colour}; }} .l{number} {{ stroke: #{colour}; }}\n"
            for number, colour in enumerate(colours)
        )
        return _STYLE % named + series

    light = style(_LIGHT, back="#fbfbfa", ink="#1c2126", soft="#59636e", line="#e1e4e8")
    dark = style(_DARK, back="#14171a", ink="#e3e6e9", soft="#9aa4ae", line="#2e343a")
    head = f"<style>{light}@media (prefers-color-scheme: dark) {{{dark}}}</style>"
    return re.sub(r"^<svg ([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg" \1>{head}', svg, count=1) + "\n"
