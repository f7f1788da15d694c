"""Pictures of damage against bytes: a panel a model, a curve a method, as an SVG document that needs nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from coterie.amounts import format_bytes
from coterie.report.draw import NUM_SERIES, Drawing, tick_label, ticks
from coterie.report.plots import Scale

#: Colours of the series of a picture that stands alone, and for pages with a dark background.
LIGHT = ("0072b2", "d55e00", "009e73", "cc79a7", "b8860b", "56b4e9", "6b7280")
_DARK = ("4aa3e0", "f08a3c", "2fc79b", "e09cc4", "d9b23c", "8fd0f5", "9ca3af")

_STYLE = """
svg { background: %(back)s; } text { fill: %(ink)s; font: 12.5px system-ui, sans-serif; }
.end { text-anchor: end; } .middle { text-anchor: middle; } .axis { fill: %(soft)s; } .head { font-weight: 600; }
.grid { stroke: %(line)s; } .base { stroke: %(soft)s; } .join { fill: none; stroke-width: 1.6; opacity: 0.8; }
.dashed { stroke-dasharray: 5 4; } .bar { stroke-width: 1.2; opacity: 0.7; } .mark { stroke: %(back)s; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One method on one model.

    Attributes:
        series: number of its colour and marker.
        name: what the legend calls it.
        dashed: whether its line is.
        points: from small to large, (bytes, damage, deviation of the damage).
    """

    series: int
    name: str
    dashed: bool
    points: tuple[tuple[float, float, float], ...]


#: A model's title and its curves.
Panel = tuple[str, Sequence[Curve]]


def draw_curves(panels: Sequence[Panel], *, across: str, upward: str) -> str:
    """Return panels one above the other, with one legend, as an SVG document.

    Args:
        panels: what is drawn.
        across: caption of the axis of bytes.
        upward: caption of the axis of damage, which is logarithmic.
    """
    shown = legend(panels)
    width, left, plot_width, tall, head, foot = 1180.0, 70.0, 780.0, 380.0, 34.0, 58.0
    step = head + tall + foot
    height = max(step * len(panels), 40 + 19.0 * len(shown))
    drawing = Drawing(width, height, f"{upward} against {across}")
    for number, panel in enumerate(panels):
        box = (left, step * number + head, left + plot_width, step * number + head + tall)
        _draw_panel(drawing, panel, box, (across, upward))
    for place, curve in enumerate(shown):
        y = 30 + 19.0 * place
        x = left + plot_width + 40
        drawing.line(x - 14, y - 4, x + 14, y - 4, _css(curve))
        drawing.mark(x, y - 4, curve.series)
        drawing.text(x + 22, y, curve.name)
    return _stand_alone(str(drawing.render()))


def legend(panels: Sequence[Panel]) -> list[Curve]:
    """Return one curve a name, from the most to the least damage in the first panel that has it."""
    by_name: dict[str, Curve] = {}
    for _, curves in panels:
        for curve in sorted(curves, key=lambda curve: -math.fsum(math.log(point[1]) for point in curve.points)):
            by_name.setdefault(curve.name, curve)
    return list(by_name.values())


def scales(curves: Sequence[Curve], box: tuple[float, float, float, float]) -> tuple[Scale, Scale]:
    """Return the axes of a panel, for bytes and for damage."""
    left, top, right, floor = box
    sizes = [size for curve in curves for size, _, _ in curve.points]
    damage = [value for curve in curves for _, value, _ in curve.points]
    pad = (max(sizes) - min(sizes)) * 0.06 or 0.05 * max(sizes)
    return (
        Scale(low=min(sizes) - pad, high=max(sizes) + pad, start=left, end=right),
        Scale(low=min(damage) / 1.25, high=max(damage) * 1.25, start=floor, end=top, log=True),
    )


def size_ticks(scale: Scale) -> list[float]:
    """Return numbers of bytes that are round in their unit."""
    unit = 1024.0 ** math.floor(math.log2(scale.high) / 10)
    return [value * unit for value in ticks(scale.low / unit, scale.high / unit, 7)]


def _draw_panel(
    drawing: Drawing, panel: Panel, box: tuple[float, float, float, float], captions: tuple[str, str]
) -> None:
    title, curves = panel
    left, top, right, floor = box
    drawing.text(left, top - 14, title, "head")
    drawing.line(left, floor, right, floor, "base")
    if not curves:
        drawing.text((left + right) / 2, (top + floor) / 2, "nothing was measured", "middle axis")
        return
    x, y = scales(curves, box)
    for value in size_ticks(x):
        place = x.place(value)
        drawing.line(place, top, place, floor)
        drawing.text(place, floor + 17, format_bytes(round(value)), "middle")
    for value in y.ticks():
        drawing.line(left, y.place(value), right, y.place(value))
        drawing.text(left - 8, y.place(value) + 4, tick_label(value), "end")
    drawing.text((left + right) / 2, floor + 36, captions[0], "middle axis")
    drawing.text(right, top - 14, captions[1], "end axis")
    for curve in curves:
        placed = [(x.place(size), y.place(value)) for size, value, _ in curve.points]
        if len(placed) > 1:
            drawing.path(placed, _css(curve), curve.name)
        for (across, down), (size, value, deviation) in zip(placed, curve.points, strict=True):
            if deviation:
                low = y.place(max(y.low, value - deviation))
                high = y.place(min(y.high, value + deviation))
                drawing.line(across, low, across, high, f"bar l{curve.series % NUM_SERIES}")
            drawing.mark(across, down, curve.series, f"{curve.name}: {value:.4g} nats, {format_bytes(round(size))}")


def _css(curve: Curve) -> str:
    return f"join l{curve.series % NUM_SERIES}" + (" dashed" if curve.dashed else "")


def _stand_alone(svg: str) -> str:
    """Return an SVG element as a document: with its name space and its style."""

    def style(colours: Sequence[str], **named: str) -> str:
        series = "".join(
            f".s{number} {{ fill: #{colour}; }} .l{number} {{ stroke: #{colour}; }}\n"
            for number, colour in enumerate(colours)
        )
        return _STYLE % named + series

    light = style(LIGHT, back="#fbfbfa", ink="#1c2126", soft="#59636e", line="#e1e4e8")
    dark = style(_DARK, back="#14171a", ink="#e3e6e9", soft="#9aa4ae", line="#2e343a")
    head = f"<style>{light}@media (prefers-color-scheme: dark) {{{dark}}}</style>"
    return re.sub(r"^<svg ([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg" \1>{head}', svg, count=1) + "\n"
