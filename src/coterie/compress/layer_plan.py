"""What one layer becomes: the part of a plan that passes read. No torch here.

Legend: E experts of the original, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from coterie.errors import CorruptArtifact


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
    def from_content(cls, content: Any, where: str) -> ExpertPlan:
        """Read what `content` wrote; raises CorruptArtifact, with `where` it stood."""
        entry = _object(content, where, cls)
        encodings = entry.get("encodings")
        if encodings is not None:
            if not isinstance(encodings, list) or len(encodings) != 3 or not all(isinstance(e, str) for e in encodings):
                raise CorruptArtifact(
                    f"{where}.encodings must be three names of number formats, found {encodings!r:.80}"
                )
            encodings = (encodings[0], encodings[1], encodings[2])
        return cls(
            sources=_numbers(entry.get("sources"), f"{where}.sources"),
            width=_number(entry.get("width"), f"{where}.width", optional=True),
            part=_number(entry.get("part"), f"{where}.part", optional=True),
            rank=_number(entry.get("rank"), f"{where}.rank", optional=True),
            encodings=encodings,
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
    def from_content(cls, content: Any, where: str) -> LayerPlan:
        """Read what `content` wrote; raises CorruptArtifact, with `where` it stood."""
        entry = _object(content, where, cls)
        experts = entry.get("experts")
        if experts is not None and not isinstance(experts, list):
            raise CorruptArtifact(f"{where}.experts must be a list, found {experts!r:.80}")
        num_experts = _number(entry.get("num_experts"), f"{where}.num_experts")
        assert num_experts is not None
        return cls(
            num_experts=num_experts,
            width=_number(entry.get("width"), f"{where}.width", optional=True),
            top_k=_number(entry.get("top_k"), f"{where}.top_k", optional=True),
            experts=None
            if experts is None
            else tuple(
                ExpertPlan.from_content(each, f"{where}.experts[{number}]") for number, each in enumerate(experts)
            ),
            protected=_numbers(entry.get("protected", []), f"{where}.protected"),
        )


def ragged_plan(widths: Sequence[int], protected: tuple[int, ...] = ()) -> LayerPlan:
    """Return the plan of a layer that keeps all experts, each with a width of its own."""
    experts = tuple(ExpertPlan(sources=(expert,), width=width) for expert, width in enumerate(widths))
    return LayerPlan(num_experts=len(widths), experts=experts, protected=protected)


def _object(content: Any, where: str, kind: type[ExpertPlan] | type[LayerPlan]) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise CorruptArtifact(f"{where} must be an object, found {content!r:.80}")
    field_names = {field.name for field in fields(kind)}
    if unknown := sorted(content.keys() - field_names):
        raise CorruptArtifact(f"{where} has {unknown[0]!r}, which is none of {', '.join(sorted(field_names))}")
    return content


def _number(value: Any, where: str, *, optional: bool = False) -> int | None:
    if value is None and optional:
        return None
    if type(value) is not int or not 0 <= value < 2**31:
        raise CorruptArtifact(f"{where} must be a whole number from 0 on, found {value!r:.80}")
    return value


def _numbers(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise CorruptArtifact(f"{where} must be a list of whole numbers, found {value!r:.80}")
    numbers = tuple(_number(each, f"{where}[{number}]") for number, each in enumerate(value))
    return tuple(each for each in numbers if each is not None)
