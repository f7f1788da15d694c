import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.report import draw, plots, words


def pixels(uri: str) -> np.ndarray:
    prefix, _, data = uri.partition(",")
    assert prefix == "data:image/png;base64"
    image_module = pytest.importorskip("PIL.Image", reason="needs another reader of PNG")
    with image_module.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGBA"))


def test_heat_png_is_a_png_with_the_colours_of_the_values() -> None:
    found = pixels(draw.heat_png(np.array([[0.0, 1.0, 5.0], [-3.0, np.nan, 0.5]]), 0.0, 1.0))

    low, high = draw.colour(draw.VIRIDIS, 0.0), draw.colour(draw.VIRIDIS, 1.0)
    assert found.shape == (2, 3, 4)
    assert tuple(found[0, 0]) == (*low, 255)
    assert tuple(found[1, 0]) == (*low, 255)
    assert tuple(found[0, 1]) == tuple(found[0, 2]) == (*high, 255)
    assert found[1, 1, 3] == 0
    assert np.abs(found[1, 2, :3].astype(int) - draw.colour(draw.VIRIDIS, 0.5)).max() <= 3


def test_the_map_of_shares_tells_little_from_nothing() -> None:
    drawing = plots.share_map([[0.0, 1 / 64, 0.5, 1.0], [1.0, 0.25]], "shares")

    image = next(part for part in ElementTree.fromstring(drawing) if part.tag == "image")
    found = pixels(image.attrib["href"])
    expected = [draw.colour(draw.BLUES, share) for share in (1 / 64, 0.5, 1.0)]
    assert tuple(found[0, 0]) == (*plots.FATE_COLOURS[-1], 255)
    assert [tuple(pixel[:3]) for pixel in found[0, 1:]] == expected
    assert tuple(found[1, 1][:3]) == draw.colour(draw.BLUES, 0.25)
    assert found[1, 2, 3] == found[1, 3, 3] == 0


def test_heat_png_of_one_value_everywhere() -> None:
    assert len({tuple(pixel) for pixel in pixels(draw.heat_png(np.full((4, 4), 2.0), 2.0, 2.0)).reshape(-1, 4)}) == 1


def test_maps_are_matplotlibs() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    for name, stops, start in (
        ("viridis", draw.VIRIDIS, 0.0),
        ("cividis", draw.CIVIDIS, 0.0),
        ("Blues", draw.BLUES, 0.25),
    ):
        for position in np.linspace(0, 1, 33):
            expected = [255 * part for part in matplotlib.colormaps[name](start + (1 - start) * position)[:3]]
            assert np.abs(np.array(draw.colour(stops, position)) - expected).max() < 9


@pytest.mark.parametrize("stops", [draw.VIRIDIS, draw.CIVIDIS])
def test_text_on_every_colour_can_be_read(stops: str) -> None:
    def luminance(rgb: tuple[int, ...]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for position in np.linspace(0, 1, 101):
        back = draw.colour(stops, position)
        ink = luminance((0, 0, 0) if draw.ink_on(back) == "#000" else (255, 255, 255))
        light, dark = max(ink, luminance(back)), min(ink, luminance(back))
        assert (light + 0.05) / (dark + 0.05) > 4.5  # WCAG AA


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_inside_even_and_about_as_many_as_asked(low: float, span: float, count: int) -> None:
    found = draw.ticks(low, low + span, count)

    slack = span * 1e-6 + abs(low) * 1e-9 + 1e-9
    assert all(low - slack <= value <= low + span + slack for value in found)
    assert len(found) <= count + 1
    assert len(found) >= 1 or count < 3


def test_integer_ticks() -> None:
    assert draw.integer_ticks(6, 24) == [0, 1, 2, 3, 4, 5]
    assert draw.integer_ticks(48, 24) == list(range(0, 48, 2))


def test_drawings_escape_text_and_are_well_formed() -> None:
    drawing = draw.Drawing(10, 10, 'a "label" & <more>')
    drawing.text(1, 1, "<script>alert(1)</script>", title="</title><b>")
    for series in range(8):
        drawing.mark(1, 1, series, "<i>")

    text = drawing.render()

    assert "<script>" not in text
    tree = ElementTree.fromstring(text)
    assert tree.attrib["aria-label"] == 'a "label" & <more>'
    assert len(list(tree)) == 9


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.3], [0.001, 5.0], [0.9, 1.2]])
def test_scales_hold_all_their_values(values: list[float]) -> None:
    scale = plots.scale_for(values, 0.0, 100.0, 900.0)

    assert all(100.0 <= scale.place(value) <= 900.0 for value in values)
    assert scale.ticks()


def test_scale_is_logarithmic_only_over_two_orders() -> None:
    assert plots.scale_for([0.001, 5.0], 0.0, 0.0, 1.0).log
    assert not plots.scale_for([0.1, 5.0], 0.0, 0.0, 1.0).log
    assert not plots.scale_for([0.0, 5.0], 0.0, 0.0, 1.0).log


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0.04567, "0.0457"), (1.0, "1.00"), (12.345, "12.3"), (999.9, "1000"), (1234.5, "1,234"),
     (0.000012, "1.20e-05"), (float("inf"), "∞"), (float("nan"), "–"), (-2.5, "-2.50")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert words.number_text(value) == text


def test_ranges_are_joined() -> None:
    assert words.ranges_text([0, 1, 2, 3, 5, 7, 8]) == "0–3, 5, 7, 8"
    assert words.ranges_text([]) == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"), (1200, "1,200"), ([True, False, True], "2 of 3"), ([None, None], "–"), ([], "–"),
        ([5.0, 1.0, None, 2.0, 4.0, 3.0], "1 … 3 … 5"), ({"a": 1, "b": "x"}, "a 1, b x"), ("word", "word"),
        ([1, 2], "1, 2"), (0.5, "0.500"), (1e-5, "1e-05"),
    ],
)  # fmt: skip
def test_notes_become_short_text(value: object, text: str) -> None:
    assert words.note_text(value) == text
