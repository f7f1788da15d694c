"""The picture of a frontier: what mixtures of types, and single ones, are expected to cost at which size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from coterie.amounts import format_bytes
from coterie.artifact import atomic_path
from coterie.compress.frontier import Frontier, Point
from coterie.outputs import check_output, claim_output
from coterie.report.curves import Curve, draw_curves

CAPTION_X = "bytes"
CAPTION_Y = "expected KL to the original in nats a token (log scale)"


def check_picture(path: Path, reads: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Raise OutputExists or InputError where a picture cannot go; see `coterie.outputs.check_output` for `reads`."""
    check_output(path, kind="picture", reads=reads, accepts=_is_picture, makes_parents=True)


def write_picture(frontier: Frontier, path: Path, *, title: str) -> None:
    """Write the picture as SVG; one that is there is replaced, anything else refused.

    Args:
        frontier: what is drawn.
        path: the file.
        title: name of the model.

    Raises:
        OutputExists: the place is taken by something else.
    """
    target = claim_output(path, kind="picture", accepts=_is_picture)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        temporary.write_text(draw(frontier, title=title), encoding="utf-8")


def draw(frontier: Frontier, *, title: str) -> str:
    """Return the picture as an SVG document that needs nothing else."""
    single = Curve(series=0, name="one type for all", dashed=True, points=_placed(frontier.single))
    mixed = Curve(series=1, name="types mixed", dashed=False, points=_placed(frontier.mixed))
    curves = [curve for curve in (single, mixed) if curve.points]
    panel = (f"{title}, {format_bytes(frontier.original_bytes)}", curves)
    return draw_curves([panel], across=CAPTION_X, upward=CAPTION_Y)


def _is_picture(path: Path) -> bool:
    """Tell whether a file is the picture of a frontier."""
    if not path.is_file():
        return False
    text = path.read_bytes()[: 2**20]
    return text.startswith(b"<svg ") and escape(CAPTION_Y).encode() in text


def _placed(points: tuple[Point, ...]) -> tuple[tuple[float, float, float], ...]:
    """Return points from small to large; what costs nothing has no place on a logarithmic axis."""
    return tuple(sorted((float(point.num_bytes), point.expected_kl, 0.0) for point in points if point.damage > 0))
