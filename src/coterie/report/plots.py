"""The plots of the report, each a function from numbers to inline SVG.

Legend: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from coterie.report.draw import (
    BLUES,
    NUM_SERIES,
    VIRIDIS,
    Drawing,
    colour,
    heat_png,
    integer_ticks,
    palette_png,
    shorten,
    text_width,
    tick_label,
    ticks,
)
from coterie.report.words import bytes_text, error_text, number_text, percent_text

Array = NDArray[np.float64]

WIDTH = 980.0  # units of a full-width plot; about the pixels of the text column on a desktop

#: What became of an expert, in the order of the palette of `fate_map`.
FATES = ("unchanged", "centre of a merged group", "merged into a centre", "dropped")
FATE_COLOURS = ((86, 150, 190), (16, 62, 110), (178, 205, 222), (230, 140, 40))

_SHADES = 65  # colours of shares in `share_map`


def stack(rows: Sequence[Array]) -> Array:
    """Return rows of different lengths as one array, padded with NaN."""
    width = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows])


def grid_map(uri: Markup, shape: tuple[int, ...], label: str, *, tall: float = 24.0) -> Markup:
    """Return a raster of layers (rows) by experts (columns) with both axes; `shape` is their numbers."""
    num_layers, num_experts = shape
    left, top, bottom = 46.0, 20.0, 40.0
    cell = min(tall, max(5.0, 460.0 / num_layers))
    width, height = WIDTH - left - 10, cell * num_layers
    drawing = Drawing(WIDTH, top + height + bottom, label)
    drawing.image(left, top, width, height, uri)
    for layer in integer_ticks(num_layers, 24):
        drawing.text(left - 8, top + (layer + 0.5) * cell + 4, str(layer), "end")
    for expert in integer_ticks(num_experts, 34):
        drawing.text(left + (expert + 0.5) * width / num_experts, top + height + 16, str(expert), "middle")
    drawing.text(left + width / 2, top + height + 35, "expert", "middle axis")
    drawing.text(left - 8, 12, "layer", "end axis")
    return drawing.render()


def usage_map(shares_LE: Sequence[Array], high: float) -> Markup:
    """Return the share of routed tokens by layer and expert, as a multiple of the even share, from 0 to `high`."""
    values = stack([share_E * len(share_E) for share_E in shares_LE])
    label = "Share of routed tokens by layer and expert"
    return grid_map(heat_png(values, 0.0, high), values.shape, label)


def fate_map(fates_LE: Sequence[Sequence[int]], label: str) -> Markup:
    """Return what became of every expert, by layer and expert; entries index `FATES`, and -1 is no expert."""
    values = stack([np.asarray(row, dtype=np.float64) for row in fates_LE])
    index = np.where(np.isnan(values) | (values < 0), len(FATES), values).astype(np.uint8)
    return grid_map(palette_png(index, [*FATE_COLOURS, None]), values.shape, label, tall=16.0)


def share_map(shares_LE: Sequence[Sequence[float]], label: str) -> Markup:
    """Return the share of its neurons that each expert keeps, by layer and expert; nothing is the colour of dropped."""
    values = stack([np.asarray(row, dtype=np.float64) for row in shares_LE])
    palette = [colour(BLUES, level / (_SHADES - 1)) for level in range(_SHADES)]
    index = np.rint(np.nan_to_num(values) * (_SHADES - 1))
    index = np.where(values == 0, _SHADES, np.where(np.isnan(values), _SHADES + 1, index)).astype(np.uint8)
    return grid_map(palette_png(index, [*palette, FATE_COLOURS[-1], None]), values.shape, label, tall=16.0)


def colour_bar(low: float, high: float, caption: str, *, stops: str = VIRIDIS, over: bool = False) -> Markup:
    """Return a colour bar with its ends and middle named; `over` marks that larger values share the last colour."""
    drawing = Drawing(320, 50, caption)
    drawing.text(0, 13, caption, "axis")
    drawing.image(0, 20, 320, 10, heat_png(np.linspace(low, high, 64)[None, :], low, high, stops))
    for share, anchor in ((0.0, ""), (0.5, "middle"), (1.0, "end")):
        label = ("≥ " if over and share == 1 else "") + tick_label(low + share * (high - low))
        drawing.text(320 * share, 45, label, anchor)
    return drawing.render()


def layer_lines(lines: Sequence[tuple[str, Sequence[float]]], main: Sequence[float], label: str) -> Markup:
    """Return one thin line a domain and one bold line for the text as a whole, over the layers; the top is 1."""
    width, height, left, top, bottom = 450.0, 250.0, 48.0, 10.0, 40.0
    values = [value for _, row in lines for value in row] + list(main)
    low = math.floor((min(values) - 0.02) * 20) / 20
    low = max(0.0, min(low, 0.9))
    drawing = Drawing(width, height, label)
    right, floor = width - 12, height - bottom

    def place(layer: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * ((layer + 0.5) / len(main))
        return x, floor - (floor - top) * (value - low) / (1 - low)

    for value in ticks(low, 1.0, 5):
        y = place(0, value)[1]
        drawing.line(left, y, right, y)
        drawing.text(left - 8, y + 4, tick_label(value), "end")
    for name, row in lines:
        drawing.path([place(layer, value) for layer, value in enumerate(row)], "thin", name)
    drawing.path([place(layer, value) for layer, value in enumerate(main)], "bold", "all domains")
    for layer, value in enumerate(main):
        if len(main) <= 32:
            x, y = place(layer, value)
            drawing.mark(x, y, 0, f"layer {layer}: {value:.3f}", size=3.5)
    if lines:
        name, row = min(lines, key=lambda entry: min(entry[1]))
        layer = int(np.argmin(row))
        x, y = place(layer, row[layer])
        place_name = f"{shorten(name, 24)}"
        wide = text_width(place_name) / 2
        drawing.text(min(max(x, left + wide), right - wide), min(y + 16, floor - 4), place_name, "middle axis")
    _layer_axis(drawing, len(main), left, right, floor)
    return drawing.render()


def layer_bars(values: Sequence[float], chance: Sequence[float], label: str) -> Markup:
    """Return one bar a layer, and a tick where chance alone would reach."""
    width, height, left, top, bottom = 450.0, 250.0, 48.0, 18.0, 40.0
    high = max([*values, *chance, 1e-9]) * 1.05
    drawing = Drawing(width, height, label)
    right, floor = width - 12, height - bottom
    for value in ticks(0.0, high, 5):
        y = floor - (floor - top) * value / high
        drawing.line(left, y, right, y)
        drawing.text(left - 8, y + 4, tick_label(value), "end")
    step = (right - left) / len(values)
    for layer, (value, noise) in enumerate(zip(values, chance, strict=True)):
        x = left + step * (layer + 0.5)
        tall = (floor - top) * value / high
        drawing.rect(x - step * 0.32, floor - tall, step * 0.64, tall, "bar", f"layer {layer}: {value:.4f} bits")
        y = floor - (floor - top) * noise / high
        drawing.line(x - step * 0.4, y, x + step * 0.4, y, "chance")
        if len(values) <= 12:
            drawing.text(x, floor - tall - 5, f"{value:.2f}", "middle")
    _layer_axis(drawing, len(values), left, right, floor)
    return drawing.render()


def _layer_axis(drawing: Drawing, num_layers: int, left: float, right: float, floor: float) -> None:
    drawing.line(left, floor, right, floor, "base")
    for layer in integer_ticks(num_layers, 16):
        drawing.text(left + (right - left) * (layer + 0.5) / num_layers, floor + 16, str(layer), "middle")
    drawing.text((left + right) / 2, floor + 34, "layer", "middle axis")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """A number axis from `low` to `high` on the units `start` to `end`; logarithmic when `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a number lies."""
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def clipped(self, value: float) -> float:
        """Return a number, or the end of the axis that it lies beyond."""
        return min(max(value, self.low), self.high)

    def ticks(self) -> list[float]:
        """Return round numbers on the axis."""
        if not self.log:
            return ticks(self.low, self.high, 6)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        inside = [value for value in every if self.low <= value <= self.high]
        return inside if len(inside) <= 10 else [value for value in inside if f"{value:e}".startswith("1")]


def scale_for(values: Sequence[float], floor: float, start: float, end: float) -> Scale:
    """Return an axis from `floor` that holds all values; logarithmic when they span more than two orders."""
    positive = [value for value in values if value > 0]
    if floor == 0 and positive and len(positive) == len(values) and max(positive) > 100 * min(positive):
        return Scale(low=min(positive) / 1.3, high=max(positive) * 1.3, start=start, end=end, log=True)
    low, high = min([floor, *values]), max([floor, *values])
    span = (high - low) or max(abs(high), 1.0)
    return Scale(low=low - (0.03 * span if low < floor else 0), high=high + 0.05 * span, start=start, end=end)


def domain_dots(
    domains: Sequence[str],
    series: Sequence[Sequence[float | None]],
    caption: str,
    floor: float,
    *,
    errors: Sequence[Sequence[float | None]] | None = None,
) -> Markup:
    """Return one row a domain with one marker a result; `series` is results by domains, None where not measured.

    Args:
        domains: names of the rows.
        series: for each result, its value on every domain.
        caption: what the axis shows.
        floor: the value that means "no damage" (0 for KL, 1 for a ratio); the axis starts there.
        errors: standard errors of the values, in the same order, each drawn as a bar that long to both sides.
    """
    left = min(300.0, max(70.0, 14 + max(text_width(shorten(domain)) for domain in domains)))
    row, top, bottom = 27.0, 8.0, 44.0
    height = top + row * len(domains) + bottom
    drawing = Drawing(WIDTH, height, caption)
    measured = [value for values in series for value in values if value is not None]
    scale = scale_for(measured, floor, left + 8, WIDTH - 16)
    bottom_line = top + row * len(domains)
    for value in scale.ticks():
        drawing.line(scale.place(value), top, scale.place(value), bottom_line)
        drawing.text(scale.place(value), bottom_line + 16, tick_label(value), "middle")
    drawing.text((left + WIDTH) / 2, bottom_line + 36, caption + (" (log scale)" if scale.log else ""), "middle axis")
    for index, domain in enumerate(domains):
        y = top + row * (index + 0.5)
        scores = [values[index] for values in series]
        places = [scale.place(score) for score in scores if score is not None]
        if places:
            drawing.line(min(places), y, max(places), y, "span")
        drawing.text(left - 4, y + 4, shorten(domain), "end", domain if len(domain) > 28 else "")
        for number, score in enumerate(scores):
            if score is None:
                continue
            error = None if errors is None else errors[number][index]
            if error is not None:
                ends = [scale.place(scale.clipped(score + way * error)) for way in (-1, 1)]
                drawing.line(ends[0], y, ends[1], y, f"error l{number % NUM_SERIES}")
            title = f"{domain}: {number_text(score)} {error_text(error)}".rstrip()
            drawing.mark(scale.place(score), y, number, title)
    return drawing.render()


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One point of `trade_off`; `error` is the standard error of `y`, or None."""

    name: str
    x: float
    y: float
    error: float | None = None


def trade_off(series: Sequence[Sequence[Point]], caption_x: str, caption_y: str) -> Markup:
    """Return size against cost: for each series its points, joined by a line, with bars of one standard error."""
    height, left, top, bottom, right = 340.0, 56.0, 30.0, 46.0, WIDTH - 16
    drawing = Drawing(WIDTH, height, f"{caption_y} against {caption_x}")
    xs = [point.x for points in series for point in points]
    ys = [point.y for points in series for point in points]
    pad = (max(xs) - min(xs)) * 0.08 or 0.05
    scale_x = Scale(low=min(xs) - pad, high=max(xs) + pad, start=left, end=right)
    floor = height - bottom
    scale_y = scale_for(ys, 0.0, floor, top)
    for value in scale_x.ticks():
        drawing.line(scale_x.place(value), top, scale_x.place(value), floor)
        drawing.text(scale_x.place(value), floor + 16, percent_text(value), "middle")
    for value in scale_y.ticks():
        drawing.line(left, scale_y.place(value), right, scale_y.place(value))
        drawing.text(left - 8, scale_y.place(value) + 4, tick_label(value), "end")
    drawing.text((left + right) / 2, height - 8, caption_x, "middle axis")
    drawing.text(0, 13, caption_y + (" (log scale)" if scale_y.log else ""), "axis")
    for number, points in enumerate(series):
        placed = [(scale_x.place(point.x), scale_y.place(point.y)) for point in points]
        if len(placed) > 1:
            drawing.path(placed, f"join l{number % NUM_SERIES}")
        for point, (across, down) in zip(points, placed, strict=True):
            if point.error is not None:
                ends = [scale_y.place(scale_y.clipped(point.y + way * point.error)) for way in (-1, 1)]
                drawing.line(across, ends[0], across, ends[1], f"error l{number % NUM_SERIES}")
            title = f"{point.name}: {number_text(point.y)} {error_text(point.error)}".rstrip()
            drawing.mark(across, down, number, title, size=6)
    return drawing.render()


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteRow:
    """One bar of `byte_bars`: bytes of the routed experts (None when not known apart) and of everything."""

    name: str
    total: int
    experts: int | None = None
    title: str = ""


def byte_bars(rows: Sequence[ByteRow]) -> Markup:
    """Return stacked bars of bytes, the first row being the original; what is gone is outlined."""
    left = min(300.0, max(80.0, 14 + max(text_width(shorten(row.name)) for row in rows)))
    right, step, top = WIDTH - 150, 30.0, 4.0
    drawing = Drawing(WIDTH, top + step * len(rows) + 6, "Bytes before and after")
    most = max(row.total for row in rows)
    for index, row in enumerate(rows):
        y = top + step * index + 5
        drawing.text(left - 8, y + 14, shorten(row.name), "end", row.title)
        wide = (right - left) * row.total / most
        fixed = row.total - (row.experts if row.experts is not None else row.total)
        if row.experts is None:
            drawing.rect(left, y, wide, 20, "bar", bytes_text(row.total))
        else:
            part = wide * fixed / row.total
            drawing.rect(left, y, part, 20, "bar rest", f"everything else: {bytes_text(fixed)}")
            drawing.rect(left + part, y, wide - part, 20, "bar", f"routed experts: {bytes_text(row.experts)}")
        if row.total < rows[0].total:
            gone = rows[0].total - row.total
            until = left + (right - left) * rows[0].total / most
            drawing.rect(left + wide, y + 0.5, until - left - wide, 19, "gone", f"gone: {bytes_text(gone)}")
        note = bytes_text(row.total)
        if index:
            note += f" · {percent_text(row.total / rows[0].total)}"
        drawing.text(right + 10, y + 14, note)
    return drawing.render()


def time_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], stages: Sequence[str]) -> Markup:
    """Return stacked bars of seconds by stage, one row a result."""
    left = min(300.0, max(80.0, 14 + max(text_width(shorten(name)) for name, _ in rows)))
    right, step, top = WIDTH - 90, 26.0, 4.0
    drawing = Drawing(WIDTH, top + step * len(rows) + 4, "Seconds by stage")
    most = max((sum(seconds for _, seconds in parts) for _, parts in rows), default=0.0) or 1.0
    for index, (name, parts) in enumerate(rows):
        y, x = top + step * index + 4, left
        drawing.text(left - 8, y + 13, shorten(name), "end", name if len(name) > 28 else "")
        for stage, seconds in parts:
            wide = (right - left) * seconds / most
            series = stages.index(stage) % 7
            drawing.rect(x, y, wide, 18, f"fill s{series}", f"{stage}: {number_text(seconds)} s")
            x += wide
        drawing.text(x + 8, y + 13, f"{number_text(sum(seconds for _, seconds in parts))} s")
    return drawing.render()


def fate_keys() -> list[tuple[str, str]]:
    """Return (colour, name) of every fate, for a legend."""
    return [("#" + bytes(rgb).hex(), name) for rgb, name in zip(FATE_COLOURS, FATES, strict=True)]
