"""What became of one layer's experts, and the size of what is left in words.

A result has fewer experts, narrower ones, ragged ones (each with a width of its own) or parts of experts. What they
have in common are hidden neurons, so shares of what is left are shares of neurons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coterie.compress.layer_plan import LayerPlan
from coterie.report.words import MISSING, count_text, number_text, percent_text, range_text

#: How a layer got smaller: fewer experts of the old width (or as many), narrower ones, ragged ones, or parts of them.
Kind = Literal["whole", "narrower", "ragged", "cut"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChange:
    """What a manifest says of one layer.

    Attributes:
        index: position among the MoE layers.
        block: name of the block.
        before: experts of the original, E.
        after: experts of the result, M; parts where experts were cut.
        expert_map: for each original expert the new one that stands for it (its first part), -1 when dropped.
        centres: for each new expert the original one that it is centred on, or was cut from, or None.
        notes: what passes noted, by pass.
        width_before, width_after: hidden neurons of each expert; None in manifests of early versions.
        widths: hidden neurons of each new expert where they differ, or None.
        top_k_before, top_k_after: experts that a token chooses; None in manifests of early versions.

    Raises:
        ValueError: the map names experts that there are not; or widths, or the centres of parts, are not one for each
            new expert.
    """

    index: int
    block: str
    before: int
    after: int
    expert_map: tuple[int, ...]
    centres: tuple[int, ...] | None
    notes: Mapping[str, Any]
    width_before: int | None = None
    width_after: int | None = None
    widths: tuple[int, ...] | None = None
    top_k_before: int | None = None
    top_k_after: int | None = None

    def __post_init__(self) -> None:
        if max(self.expert_map, default=-1) >= self.after:
            raise ValueError(f"{self.block}: expert_map names expert {max(self.expert_map)} of {self.after}")
        if self.widths is not None and (len(self.widths) != self.after or not self.width_before):
            raise ValueError(
                f"{self.block}: widths_after must be one for each of {self.after} experts, of width_before"
            )
        if self.kind == "cut" and (len(self.centres or ()) != self.after or max(self.centres or (0,)) >= self.before):
            raise ValueError(
                f"{self.block}: centres must name one of {self.before} experts for each of {self.after} parts"
            )

    @property
    def kind(self) -> Kind:
        """How the layer got smaller."""
        if self.widths is not None:
            return "ragged"
        if not self.width_before or not self.width_after or self.width_after >= self.width_before:
            return "whole"
        parted = "segment" in self.notes or self.top_k_before != self.top_k_after
        return "cut" if parted and self.centres is not None else "narrower"

    @property
    def neurons(self) -> tuple[int, int]:
        """Hidden neurons of all experts before and after; experts alone count where no width is known."""
        before = self.before * (self.width_before or 1)
        if self.widths is not None:
            return before, sum(self.widths)
        return before, self.after * (self.width_after or self.width_before or 1)

    @property
    def cuts(self) -> int:
        """Parts that each expert was cut into; 1 where it was not."""
        return (
            self.width_before // self.width_after
            if self.kind == "cut" and self.width_before and self.width_after
            else 1
        )

    @property
    def parts(self) -> tuple[int, ...]:
        """For each original expert how many of its parts are left; only where experts were cut."""
        counted = Counter(self.centres or ())
        return tuple(counted[expert] for expert in range(self.before))

    @property
    def experts_left(self) -> int:
        """Experts of the result or, where they were cut, experts of the original that have parts in it."""
        return len(set(self.centres or ())) if self.kind == "cut" else self.after

    @property
    def shares(self) -> tuple[float, ...]:
        """For each original expert the share of the neurons that stand for it now; 0 where none do."""
        if self.kind == "cut":
            return tuple(count / self.cuts for count in self.parts)
        full = self.width_before or 1
        widths = self.widths or (self.width_after or full,) * self.after
        return tuple(widths[new] / full if new >= 0 else 0.0 for new in self.expert_map)

    def groups(self) -> list[tuple[int | None, tuple[int, ...]]]:
        """Return (centre, all members) of every new expert, in the order of the new experts; none where they were cut.

        Parts are no groups: each holds neurons of one expert only.
        """
        if self.kind == "cut":
            return []
        members: dict[int, list[int]] = {}
        for expert, new in enumerate(self.expert_map):
            if new >= 0:
                members.setdefault(new, []).append(expert)
        centres = self.centres
        return [
            (centres[new] if centres is not None and new < len(centres) else None, tuple(experts))
            for new, experts in sorted(members.items())
        ]

    @property
    def dropped(self) -> tuple[int, ...]:
        """Original experts for which nothing stands."""
        return tuple(expert for expert, new in enumerate(self.expert_map) if new < 0)


def kind_of(layers: Sequence[LayerChange]) -> Kind | None:
    """Return how all of these layers got smaller; None where they differ."""
    kinds = {layer.kind for layer in layers}
    return kinds.pop() if len(kinds) == 1 else "whole" if not kinds else None


def share_left(layers: Sequence[LayerChange]) -> float | None:
    """Return the share of the experts' neurons that is left, over all layers; None where there are no experts."""
    before = sum(layer.neurons[0] for layer in layers)
    return sum(layer.neurons[1] for layer in layers) / before if before else None


def mean_width(layers: Sequence[LayerChange]) -> str:
    """Return the mean width of the new experts of all layers."""
    count = sum(layer.after for layer in layers)
    return number_text(sum(layer.neurons[1] for layer in layers) / count) if count else MISSING


def widths_text(layers: Sequence[LayerChange], *, side: Literal["before", "after"]) -> str:
    """Return the width of the experts before or after: ``96``, or the least and the largest: ``3–96``."""
    if side == "before":
        return range_text([layer.width_before for layer in layers if layer.width_before])
    held = [layer.widths or ((layer.width_after,) if layer.width_after else ()) for layer in layers]
    return range_text([width for widths in held for width in widths])


def counts_text(layers: Sequence[LayerChange], *, side: Literal["before", "after", "left"]) -> str:
    """Return the number of experts of a layer: of the original, of the result, or those with anything left."""
    names = {"before": "before", "after": "after", "left": "experts_left"}
    return range_text([getattr(layer, names[side]) for layer in layers])


def chosen_text(layers: Sequence[LayerChange], *, side: Literal["before", "after"]) -> str:
    """Return how many experts or parts a token chooses; empty where the manifest does not say."""
    held = [getattr(layer, f"top_k_{side}") for layer in layers]
    return "" if None in held or not held else range_text(held)


def size_text(layers: Sequence[LayerChange], *, each: str = " a layer") -> str:
    """Return what is left, in full: ``63 parts of width 24 a layer, from 31 of 32 experts, 8 a token``.

    Args:
        layers: the layers of one result.
        each: what follows the number of experts.
    """
    kind, after, old = kind_of(layers), counts_text(layers, side="after"), widths_text(layers, side="before")
    if kind is None:
        return f"{percent_text(share_left(layers))} of the neurons{each}"
    if kind == "cut":
        chosen = chosen_text(layers, side="after")
        return (
            f"{parts_text(layers)}{each}, from {counts_text(layers, side='left')} of "
            f"{counts_text(layers, side='before')} experts" + (f", {chosen} a token" if chosen else "")
        )
    text = f"{_experts_text(after)}{each}"
    if kind == "whole":
        return text
    text += f", width {widths_text(layers, side='after')} of {old}"
    return text + f", {mean_width(layers)} on average" if kind == "ragged" else text


def short_size(layers: Sequence[LayerChange]) -> str:
    """Return what is left, in a few words: ``63 parts of width 24``, ``32 experts, width 48``."""
    kind = kind_of(layers)
    if kind is None:
        return f"{percent_text(share_left(layers))} of the neurons"
    if kind == "cut":
        return parts_text(layers)
    mark = "" if kind == "whole" else f", {size_mark(layers)}"
    return _experts_text(counts_text(layers, side="after")) + mark


def size_mark(layers: Sequence[LayerChange]) -> str:
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


def parts_text(layers: Sequence[LayerChange]) -> str:
    """Return how many parts a layer has, and how wide they are: ``63 parts of width 24``."""
    return f"{_parts_noun(counts_text(layers, side='after'))} of width {widths_text(layers, side='after')}"


def before_after(layers: Sequence[LayerChange]) -> tuple[str, list[str]]:
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
        also.append(f"{before or MISSING} → {after or MISSING} a token")
    return f"{counts} parts" if kind == "cut" else counts, also


def kept_text(layers: Sequence[LayerChange]) -> tuple[str, str]:
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
        full = range_text([layer.before * layer.cuts for layer in layers])
        chosen = [chosen_text(layers, side=side) for side in ("after", "before")]
        times = f"; {chosen[0]} a token, {chosen[1]} experts before" if all(chosen) else ""
        note = f"parts of width {new}, from {counts_text(layers, side='left')} of {before} experts {where}{times}"
        return f"{after} of {full}", note
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
