"""What became of one layer's experts, and the size of what is left in words.

A result has fewer experts, narrower ones, ragged ones (each with a width of its own) or parts of experts. What they
have in common are hidden neurons, so shares of what is left are shares of neurons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from coterie.compress.layer_plan import LayerPlan
from coterie.model.disk.manifest import LayerEntry
from coterie.report.words import MISSING, count_text, number_text, percent_text, range_text

#: How a layer got smaller: fewer experts of the old width (or as many), narrower ones, ragged ones, or parts of them.
Kind = Literal["whole", "narrower", "ragged", "cut"]


def layer_kind(layer: LayerEntry) -> Kind:
    """Return how one layer got smaller."""
    if layer.widths_after is not None:
        return "ragged"
    if layer.parts > 1:
        return "cut"
    return "narrower" if layer.width_after < layer.width_before else "whole"


def neurons(layer: LayerEntry) -> tuple[int, int]:
    """Return the hidden neurons of all experts before and after."""
    after = layer.num_experts_after * layer.width_after if layer.widths_after is None else sum(layer.widths_after)
    return layer.num_experts_before * layer.width_before, after


def parts_left(layer: LayerEntry) -> tuple[int, ...]:
    """Return for each original expert how many of its parts are left; only where experts were cut."""
    counted = Counter(layer.centres or ())
    return tuple(counted[expert] for expert in range(layer.num_experts_before))


def experts_left(layer: LayerEntry) -> int:
    """Return the experts of the result or, where they were cut, those of the original that have parts in it."""
    return len(set(layer.centres or ())) if layer.parts > 1 else layer.num_experts_after


def expert_shares(layer: LayerEntry) -> tuple[float, ...]:
    """Return for each original expert the share of the neurons that stand for it now; 0 where none do."""
    if layer.parts > 1:
        return tuple(count / layer.parts for count in parts_left(layer))
    widths = layer.widths_after or (layer.width_after,) * layer.num_experts_after
    return tuple(widths[new] / layer.width_before if new >= 0 else 0.0 for new in layer.expert_map)


def expert_groups(layer: LayerEntry) -> list[tuple[int | None, tuple[int, ...]]]:
    """Return (centre, all members) of every new expert, in the order of the new experts; none where they were cut.

    Parts are no groups: each holds neurons of one expert only.
    """
    if layer.parts > 1:
        return []
    members: dict[int, list[int]] = {}
    for expert, new in enumerate(layer.expert_map):
        if new >= 0:
            members.setdefault(new, []).append(expert)
    return [
        (None if layer.centres is None else layer.centres[new], tuple(experts))
        for new, experts in sorted(members.items())
    ]


def dropped_experts(layer: LayerEntry) -> tuple[int, ...]:
    """Return the original experts for which nothing stands."""
    return tuple(expert for expert, new in enumerate(layer.expert_map) if new < 0)


def kind_of(layers: Sequence[LayerEntry]) -> Kind | None:
    """Return how all of these layers got smaller; None where they differ."""
    kinds = {layer_kind(layer) for layer in layers}
    return kinds.pop() if len(kinds) == 1 else "whole" if not kinds else None


def share_left(layers: Sequence[LayerEntry]) -> float | None:
    """Return the share of the experts' neurons that is left, over all layers; None where there are no experts."""
    before = sum(neurons(layer)[0] for layer in layers)
    return sum(neurons(layer)[1] for layer in layers) / before if before else None


def mean_width(layers: Sequence[LayerEntry]) -> str:
    """Return the mean width of the new experts of all layers."""
    count = sum(layer.num_experts_after for layer in layers)
    return number_text(sum(neurons(layer)[1] for layer in layers) / count) if count else MISSING


def widths_text(layers: Sequence[LayerEntry], *, side: Literal["before", "after"]) -> str:
    """Return the width of the experts before or after: ``96``, or the least and the largest: ``3–96``."""
    if side == "before":
        return range_text([layer.width_before for layer in layers])
    return range_text([width for layer in layers for width in layer.widths_after or (layer.width_after,)])


def counts_text(layers: Sequence[LayerEntry], *, side: Literal["before", "after", "left"]) -> str:
    """Return the number of experts of a layer: of the original, of the result, or those with anything left."""
    if side == "left":
        return range_text([experts_left(layer) for layer in layers])
    return range_text([layer.num_experts_before if side == "before" else layer.num_experts_after for layer in layers])


def chosen_text(layers: Sequence[LayerEntry], *, side: Literal["before", "after"]) -> str:
    """Return how many experts or parts a token chooses."""
    return range_text([layer.top_k_before if side == "before" else layer.top_k_after for layer in layers])


def size_text(layers: Sequence[LayerEntry], *, each: str = " a layer") -> str:
    """Return what is left, in full: ``63 parts of width 24 a layer, from 31 of 32 experts, 8 a token``.

    Args:
        layers: the layers of one result.
        each: what follows the number of experts.
    """
    kind, after, old = kind_of(layers), counts_text(layers, side="after"), widths_text(layers, side="before")
    if kind is None:
        return f"{percent_text(share_left(layers))} of the neurons{each}"
    if kind == "cut":
        return (
            f"{parts_text(layers)}{each}, from {counts_text(layers, side='left')} of "
            f"{counts_text(layers, side='before')} experts, {chosen_text(layers, side='after')} a token"
        )
    text = f"{_experts_text(after)}{each}"
    if kind == "whole":
        return text
    text += f", width {widths_text(layers, side='after')} of {old}"
    return text + f", {mean_width(layers)} on average" if kind == "ragged" else text


def short_size(layers: Sequence[LayerEntry]) -> str:
    """Return what is left, in a few words: ``63 parts of width 24``, ``32 experts, width 48``."""
    kind = kind_of(layers)
    if kind is None:
        return f"{percent_text(share_left(layers))} of the neurons"
    if kind == "cut":
        return parts_text(layers)
    mark = "" if kind == "whole" else f", {size_mark(layers)}"
    return _experts_text(counts_text(layers, side="after")) + mark


def size_mark(layers: Sequence[LayerEntry]) -> str:
    """Return what tells one size of a recipe from another: ``16``, ``width 48``, ``mean width 48.0``, ``63 parts``."""
    kind, after = kind_of(layers), counts_text(layers, side="after")
    if kind is None:
        return percent_text(share_left(layers))
    marks = {
        "whole": after,
        "narrower": f"width {widths_text(layers, side='after')}",
        "ragged": f"mean width {mean_width(layers)}",
        "cut": _parts_noun(after),
    }
    return marks[kind]


def parts_text(layers: Sequence[LayerEntry]) -> str:
    """Return how many parts a layer has, and how wide they are: ``63 parts of width 24``."""
    return f"{_parts_noun(counts_text(layers, side='after'))} of width {widths_text(layers, side='after')}"


def before_after(layers: Sequence[LayerEntry]) -> tuple[str, list[str]]:
    """Return how many experts a layer has, before and after (``32 → 16``), and what else changed about them.

    ``32 → 63 parts`` with ``width 96 → 24`` and ``4 → 8 a token``, for example.
    """
    kind = kind_of(layers)
    counts = f"{counts_text(layers, side='before')} → {counts_text(layers, side='after')}"
    if kind == "whole":
        return counts, []
    also = [f"width {widths_text(layers, side='before')} → {widths_text(layers, side='after')}"]
    if kind == "ragged":
        also.append(f"mean {mean_width(layers)}")
    before, after = (chosen_text(layers, side=side) for side in ("before", "after"))
    if before != after:
        also.append(f"{before} → {after} a token")
    return f"{counts} parts" if kind == "cut" else counts, also


def kept_text(layers: Sequence[LayerEntry]) -> tuple[str, str]:
    """Return what is left of each layer's experts as a short value, and what it counts."""
    before, after = (counts_text(layers, side=side) for side in ("before", "after"))
    count = count_text(len(layers), "layer")
    where = f"in each of {count}"
    old, new = (widths_text(layers, side=side) for side in ("before", "after"))
    kind = kind_of(layers)
    if kind == "whole":
        return f"{after} of {before}", f"experts {where}"
    if kind == "narrower":
        experts = before if after == before else f"{after} of {before}"
        return f"{new} of {old}", f"neurons of each of {experts} experts {where}"
    if kind == "cut":
        full = range_text([layer.num_experts_before * layer.parts for layer in layers])
        chosen, chosen_before = (chosen_text(layers, side=side) for side in ("after", "before"))
        return f"{after} of {full}", (
            f"parts of width {new}, from {counts_text(layers, side='left')} of {before} experts {where}; "
            f"{chosen} a token, {chosen_before} experts before"
        )
    ragged = f": {new} of {old} in each of {after} experts" if kind == "ragged" else ""
    return percent_text(share_left(layers)), f"of the experts' neurons{ragged}, in {count}"


def plan_text(layers: Sequence[LayerPlan]) -> str:
    """Return what a plan gives each layer: ``16``, ``32, width 48``, ``63 parts of width 24, 8 a token``."""
    count = range_text([layer.num_experts for layer in layers])
    widths = [width for layer in layers for width in layer.widths or ((layer.width,) if layer.width else ())]
    chosen = [layer.top_k for layer in layers if layer.top_k is not None]
    if chosen:
        return f"{_parts_noun(count)} of width {range_text(widths)}, {range_text(chosen)} a token"
    if not widths:
        return count
    ragged = any(layer.widths is not None for layer in layers)
    mean = f", mean {number_text(sum(widths) / len(widths))}" if ragged else ""
    return f"{count}, width {range_text(widths)}{mean}"


def _experts_text(count: str) -> str:
    return count_text(1, "expert") if count == "1" else f"{count} experts"


def _parts_noun(count: str) -> str:
    return count_text(1, "part") if count == "1" else f"{count} parts"
