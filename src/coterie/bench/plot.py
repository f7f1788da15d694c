"""The plot of a bench: damage against bytes, a line a method, a panel a model; as SVG and, with matplotlib, as PNG."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coterie.amounts import format_bytes
from coterie.artifact import atomic_path
from coterie.bench.summary import Original, Row
from coterie.bench.table import name_of
from coterie.report.curves import LIGHT, Curve, draw_curves, legend, scales, size_ticks
from coterie.report.draw import NUM_SERIES, marker_of, tick_label

log = logging.getLogger(__name__)

CAPTION_X = "bytes"
CAPTION_Y = "KL to the original in nats (log scale)"


def draw_svg(originals: Sequence[Original], rows: Sequence[Row]) -> str:
    """Return the plot as an SVG document that needs nothing else."""
    panels = [(_title(original), curves) for original, curves in _panels(originals, rows)]
    return draw_curves(panels, across=CAPTION_X, upward=CAPTION_Y)


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
                sizes, damage, yerr=deviation, label=line.name, color=f"#{LIGHT[line.series % NUM_SERIES]}",
                marker=markers[marker_of(line.series)], linestyle="--" if line.dashed else "-", markersize=5,
                linewidth=1.2, capsize=2,
            )  # fmt: skip
        axis.set(title=_title(original), xlabel=CAPTION_X, ylabel=CAPTION_Y)
        if lines:
            x, y = scales(lines, (0, 0, 1, 1))
            across, upward = size_ticks(x), y.ticks()
            axis.set(yscale="log", xlim=(x.low, x.high), ylim=(y.low, y.high))
            axis.set_xticks(across, [format_bytes(round(size)) for size in across])
            axis.set_yticks(upward, [tick_label(value) for value in upward])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    names = [line.name for line in legend([(_title(original), lines) for original, lines in panels])]
    if names:
        figure.legend([handles[name] for name in names], names, loc="outside right upper", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return True


def _panels(originals: Sequence[Original], rows: Sequence[Row]) -> list[tuple[Original, list[Curve]]]:
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
                lines.append(Curve(series=series, name=name, dashed=dashed, points=points))
        panels.append((original, lines))
    return panels


def _damage(rows: Sequence[Row], recipe: str) -> float:
    """Return the mean logarithm of a recipe's KL."""
    logs = [math.log(row.kl.mean) for row in rows if row.recipe == recipe and row.kl and 0 < row.kl.mean < math.inf]
    return math.fsum(logs) / len(logs) if logs else math.inf


def _title(original: Original) -> str:
    return f"{original.title}, {format_bytes(original.num_bytes)}"
