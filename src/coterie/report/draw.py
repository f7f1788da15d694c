"""Small pictures for a page without network: inline SVG whose colours follow the page's theme, and tiny PNG rasters.

Everything here is text made from numbers in a fixed order, so equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import math
import struct
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

#: Perceptually even, colour-blind-safe maps, as evenly spaced stops: matplotlib's viridis and cividis.
VIRIDIS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)
CIVIDIS = (
    "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 "
    "8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838"
)
#: ColorBrewer's Blues without its two lightest: light is little, dark is much; stands beside the colours of fates.
BLUES = "c6dbef 9ecae1 6baed6 4292c6 2171b5 08519c 08306b"

NUM_SERIES = 7  # classes .s0 to .s6 in page.css; markers below change in step, so colour is never the only sign

_LEVELS = 64  # colours in a raster; keeps a page of many maps light
_MARKERS = ("circle", "square", "diamond", "up", "down")

RGB = tuple[int, int, int]


def colour(stops: str, position: float) -> RGB:
    """Return the colour at `position` (0 to 1, clipped) of a map."""
    table = [tuple(bytes.fromhex(stop)) for stop in stops.split()]
    place = min(max(position, 0.0), 1.0) * (len(table) - 1)
    index = min(int(place), len(table) - 2)
    rest = place - index
    red, green, blue = (round(a + (b - a) * rest) for a, b in zip(table[index], table[index + 1], strict=True))
    return red, green, blue


def hex_colour(rgb: RGB) -> str:
    """Return ``#rrggbb``."""
    return "#" + bytes(rgb).hex()


def ink_on(rgb: RGB) -> str:
    """Return black or white, whichever reads better on a background (WCAG relative luminance)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


def heat_png(values: NDArray[np.float64], low: float, high: float, stops: str = VIRIDIS) -> Markup:
    """Return a data URI of a PNG with one pixel a value (rows, columns); NaN is transparent, outside is clipped."""
    palette = [colour(stops, level / (_LEVELS - 1)) for level in range(_LEVELS)]
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    levels = np.clip(np.nan_to_num(scaled), 0, 1) * (_LEVELS - 1)
    index = np.where(np.isnan(values), _LEVELS, np.rint(levels)).astype(np.uint8)
    return palette_png(index, [*palette, None])


def palette_png(index: NDArray[np.uint8], palette: Sequence[RGB | None]) -> Markup:
    """Return a data URI of a PNG with one pixel an entry of `index` (rows, columns); a colour None is transparent."""
    height, width = index.shape
    raw = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(index))
    colours = b"".join(bytes(entry or (0, 0, 0)) for entry in palette)
    alpha = bytes(0 if entry is None else 255 for entry in palette)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            (b"PLTE", colours),
            (b"tRNS", alpha),
            (b"IDAT", zlib.compress(raw, 9)),
            (b"IEND", b""),
        )
    )
    return Markup("data:image/png;base64," + base64.b64encode(content).decode())


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9)), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def integer_ticks(count: int, most: int) -> list[int]:
    """Return positions among 0 .. count - 1, evenly spaced by a round step, at most about `most` of them."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 10**9) if count / step <= most)
    return list(range(0, count, step))


def tick_label(value: float) -> str:
    """Return a short label for a number on an axis."""
    return f"{value:.4g}".replace("-", "−")


def marker_of(series: int) -> str:
    """Return the marker's name of a series."""
    return _MARKERS[series % len(_MARKERS)]


class Drawing:
    """An SVG picture in the making; `width` and `height` are its own units, the page scales it.

    Every text goes through escaping; coordinates are rounded to a tenth.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width = width
        self.height = height
        self._label = label
        self._parts: list[Markup] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str = "grid") -> None:
        """Draw a line."""
        form = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
        self._parts.append(form.format(css, x1, y1, x2, y2))

    def path(self, points: Sequence[tuple[float, float]], css: str, title: str = "") -> None:
        """Draw a line through points."""
        joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self._parts.append(Markup('<path class="{}" d="M{}">{}</path>').format(css, joined, _title(title)))

    def rect(self, x: float, y: float, width: float, height: float, css: str, title: str = "") -> None:
        """Draw a filled box."""
        form = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>')
        self._parts.append(form.format(css, x, y, max(width, 0.0), max(height, 0.0), _title(title)))

    def text(self, x: float, y: float, text: str, css: str = "", title: str = "") -> None:
        """Write text; `css` may hold the classes "end" and "middle" for the anchor."""
        form = Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}{}</text>')
        self._parts.append(form.format(css, x, y, _title(title), text))

    def mark(self, x: float, y: float, series: int, title: str = "", size: float = 5.0) -> None:
        """Draw the marker of a series."""
        css = f"mark s{series % NUM_SERIES}"
        shape = marker_of(series)
        if shape == "circle":
            form = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">{}</circle>')
            self._parts.append(form.format(css, x, y, size, _title(title)))
            return
        corners = {
            "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
            "diamond": ((0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)),
            "up": ((0.0, -1.2), (1.1, 0.85), (-1.1, 0.85)),
            "down": ((0.0, 1.2), (1.1, -0.85), (-1.1, -0.85)),
        }[shape]
        joined = "L".join(f"{x + a * size:.1f} {y + b * size:.1f}" for a, b in corners)
        self._parts.append(Markup('<path class="{}" d="M{}Z">{}</path>').format(css, joined, _title(title)))

    def image(self, x: float, y: float, width: float, height: float, uri: Markup) -> None:
        """Place a raster, every pixel with hard edges."""
        form = Markup(
            '<image x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" preserveAspectRatio="none" href="{}"/>'
        )
        self._parts.append(form.format(x, y, width, height, uri))

    def render(self) -> Markup:
        """Return the SVG element."""
        form = Markup('<svg viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" {}>{}</svg>')
        # One without a label stands beside what says the same in words.
        about = (
            Markup('role="img" aria-label="{}"').format(self._label) if self._label else Markup('aria-hidden="true"')
        )
        return form.format(self.width, self.height, self.width, about, Markup("").join(self._parts))


def key_mark(series: int) -> Markup:
    """Return a marker alone, for a legend in HTML."""
    drawing = Drawing(14, 14, "")
    drawing.mark(7, 7, series)
    return drawing.render()


def shorten(text: str, limit: int = 28) -> str:
    """Return `text`, its middle left out when it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2 + (limit - 1) % 2
    return text[:head] + "…" + text[len(text) - (limit - 1 - head) :]


def text_width(text: str, size: float = 13.8) -> float:
    """Return about how wide `text` is in units of the drawing; system fonts differ, so this is generous.

    The size is the larger one of page.css, for narrow screens.
    """
    return size * sum(_letter_width(letter) for letter in text)


def _letter_width(letter: str) -> float:
    """Return about how wide a letter is, in units of the font size."""
    if letter in "mwMW@%" or unicodedata.east_asian_width(letter) in "WF":
        return 1.0
    if letter in "iljtfr.,:;'|!()[] -":
        return 0.42
    return 0.72 if letter.isupper() else 0.63


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text) if text else Markup("")
