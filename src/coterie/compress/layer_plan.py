"""What one layer becomes: the part of a plan that passes read. No torch here.

Legend: E experts of the original, F expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from coterie.fields import Fields


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertPlan:
    """What one expert of the result is made from, and how it is stored.

    Attributes:
        sources: numbers of the experts of the original that it is made from, ascending; one where experts are dropped,
            slimmed or cut into parts.
        width: its hidden neurons, where experts of one layer differ in width; None where the layer's width holds.
        part: which part of its source, from 0 for the one with the highest scores, where experts are cut into parts.
        rank: rank of its projections; None for full rank, which is all that can be written today.
        encodings: number formats of gate, up and down projection; None for those of the original, which is all that
            can be written today.
    """

    sources: tuple[int, ...]
    width: int | None = None
    part: int | None = None
    rank: int | None = None
    encodings: tuple[str, str, str] | None = None

    def content(self) -> dict[str, Any]:
        """Return it as JSON content, without what is not said."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in entries.items()
            if value is not None
        }

    @classmethod
    def from_fields(cls, entry: Fields) -> ExpertPlan:
        """Read what `content` wrote; raises CorruptArtifact with the path of the field."""
        with entry.all_read():
            return cls(
                sources=entry.wholes("sources"),
                width=_whole(entry, "width"),
                part=_whole(entry, "part"),
                rank=_whole(entry, "rank"),
                encodings=_encodings(entry) if entry.said("encodings") else None,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """What one layer becomes. None leaves that property as it is.

    Attributes:
        num_experts: experts of the layer, or parts of experts.
        width: hidden neurons of each.
        top_k: experts that a token chooses; set where the experts are cut into parts.
        experts: what each of them is made from; None where that hangs on more than statistics (on weights, on the token
            sample), so that the passes decide when they have the layer.
        protected: experts of the original that no pass may drop.
    """

    num_experts: int
    width: int | None = None
    top_k: int | None = None
    experts: tuple[ExpertPlan, ...] | None = None
    protected: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Hidden neurons of each expert, where they differ (a ragged result); else None."""
        if self.experts is None or all(expert.width is None for expert in self.experts):
            return None
        return tuple(expert.width or 0 for expert in self.experts)

    def content(self) -> dict[str, Any]:
        """Return it as JSON content, without what is not said."""
        entries: dict[str, Any] = {"num_experts": self.num_experts, "width": self.width, "top_k": self.top_k}
        if self.experts is not None:
            entries["experts"] = [expert.content() for expert in self.experts]
        if self.protected:
            entries["protected"] = list(self.protected)
        return {name: value for name, value in entries.items() if value is not None}

    @classmethod
    def from_fields(cls, entry: Fields) -> LayerPlan:
        """Read what `content` wrote; raises CorruptArtifact with the path of the field."""
        with entry.all_read():
            experts = entry.each("experts") if entry.said("experts") else None
            return cls(
                num_experts=entry.whole("num_experts"),
                width=_whole(entry, "width"),
                top_k=_whole(entry, "top_k"),
                experts=None if experts is None else tuple(map(ExpertPlan.from_fields, experts)),
                protected=entry.wholes("protected") if entry.said("protected") else (),
            )


def ragged_plan(widths: Sequence[int], protected: tuple[int, ...] = ()) -> LayerPlan:
    """Return the plan of a layer that keeps all experts, each with a width of its own."""
    experts = tuple(ExpertPlan(sources=(expert,), width=width) for expert, width in enumerate(widths))
    return LayerPlan(num_experts=len(widths), experts=experts, protected=protected)


def _whole(entry: Fields, name: str) -> int | None:
    return entry.whole(name) if entry.said(name) else None


def _encodings(entry: Fields) -> tuple[str, str, str]:
    names = entry.texts("encodings")
    if len(names) != 3:
        raise entry.wrong("encodings", list(names), "should be three names, of gate, up and down projection")
    return names[0], names[1], names[2]
