"""Shapes of experts that other programs do not like. No torch here."""

from __future__ import annotations


def awkward_shapes(num_experts: int, width: int | None = None) -> tuple[str, ...]:
    """Return what other programs will not like about experts, a sentence each.

    Args:
        num_experts: experts of a layer.
        width: hidden neurons of each; None where that need not be told.
    """
    notes = []
    if width is not None and width % 256:
        groups = [size for size in (32, 128) if width % size]
        also = f", nor of {' and '.join(map(str, groups))} as groups of 4-bit weights are" if groups else ""
        notes.append(f"width {width} is no multiple of 256, as K-quants want it{also}")
    undivided = [ways for ways in (2, 4, 8) if num_experts % ways]
    if undivided:
        ways = " or ".join(map(str, undivided))
        notes.append(f"{num_experts} experts cannot be shared out evenly among {ways} devices")
    return tuple(notes)
