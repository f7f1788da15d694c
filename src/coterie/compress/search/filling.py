"""Put rounded matrices of a bank in the places of those of a unit that is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from coterie.compress.projections import FIELDS, Projections, projections_of
from coterie.compress.search.bank import Bank
from coterie.compress.search.importance import Importance
from coterie.compress.source import Source
from coterie.compress.weights import Weight
from coterie.model.arch.conversion import put
from coterie.model.arch.experts import canonical_experts, native_experts
from coterie.model.arch.layers import MoELayer
from coterie.model.stream.stream import Stream


@dataclass(kw_only=True)
class Filling:
    """Weights of a unit that is in memory, or of some that are together, in one choice of types after another.

    Attributes:
        stream: the model.
        source: the same by its headers.
        importance: how much columns weigh where matrices are rounded.
        bank: where they are then.
        names: the names in memory of all weights of the unit.
        weights: its matrices that have types.
        conversions: what was used to read the unit.
        parts: by pattern, which projections matrices of experts hold; filled as they come by.
    """

    stream: Stream
    source: Source
    importance: Importance
    bank: Bank
    names: Sequence[str]
    weights: Sequence[Weight]
    conversions: list[Any]
    parts: dict[str, tuple[int, ...]]
    _own: dict[str, Tensor] = field(default_factory=dict, init=False)
    _now: tuple[tuple[str, ...], dict[str, Tensor]] = field(default=((), {}), init=False)

    def round(self, choices: Iterable[tuple[str, ...]], *, keep: bool = False) -> None:
        """Round what no choice of before had, while the weights of the original are there.

        Args:
            choices: a type for each of the matrices.
            keep: whether the original's are kept for `put_back`.
        """
        wanted = [dict.fromkeys(kinds[place] for kinds in choices) for place in range(len(self.weights))]
        state = self.stream.model.state_dict()
        self._own = {name: state[name].detach() for name in self.names} if keep else {}
        for weight, kinds in zip(self.weights, wanted, strict=True):
            if weight.layer is None:
                names = self._memory_names(weight)
                for kind in kinds:
                    if names and (weight.pattern, kind) not in self.bank:
                        matrix_RC = state[names[0]].detach()
                        weights_1C = self.importance.of_linear(names[0], matrix_RC)
                        self.bank.add(weight.pattern, kind, matrix_RC[None], weights_1C)
                continue
            layer = self.source.architecture.layers[weight.layer]
            matrices = projections_of(canonical_experts(self.stream.model.get_submodule(layer.experts)))
            for part in self._parts_of(weight, layer):
                for kind in kinds:
                    if (name := _name(weight, part), kind) not in self.bank:
                        self.bank.add(name, kind, matrices[part], self.importance.of_experts(layer.index, part))

    def put(self, kinds: tuple[str, ...]) -> None:
        """Put matrices in their types where those of the original were; what has no type stays.

        Args:
            kinds: a type for each of the matrices, one of those that were rounded.
        """
        if self._now[0] != kinds:
            self._now = kinds, {}  # what was there is let go of first
            self._now = kinds, dict(self._filled(kinds))
        for name, tensor in self._now[1].items():
            put(self.stream.model, name, tensor)

    def put_back(self) -> None:
        """Put the original's weights back, where they were kept."""
        for name, tensor in self._own.items():
            put(self.stream.model, name, tensor)

    def _filled(self, kinds: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        state, by_layer = self.stream.model.state_dict(), dict[int, dict[int, Tensor]]()

        def like(name: str, tensor: Tensor) -> Tensor:
            return tensor.to(self.stream.device, state[name].dtype)

        for weight, kind in zip(self.weights, kinds, strict=True):
            if weight.layer is not None:
                for part in self.parts[weight.pattern]:
                    by_layer.setdefault(weight.layer, {})[part] = self.bank.values(_name(weight, part), kind)
                continue
            for name in self._memory_names(weight):
                yield name, like(name, self.bank.values(weight.pattern, kind)[0])
        for index, parts in by_layer.items():
            layer = self.source.architecture.layers[index]
            module = self.stream.model.get_submodule(layer.experts)
            experts = canonical_experts(module)
            changed: dict[str, Any] = {FIELDS[part]: value_ERC.to(experts.up_EFD) for part, value_ERC in parts.items()}
            for name, tensor in native_experts(module, replace(experts, **changed)).items():
                yield f"{layer.experts}.{name}", tensor

    def _parts_of(self, weight: Weight, layer: MoELayer) -> tuple[int, ...]:
        """Return the projections that a matrix of experts holds; finding that out takes the whole layer, so once."""
        if weight.pattern not in self.parts:
            projections = Projections(self.stream.model, layer, self.stream.conversion, self.conversions)
            by_name = {name: tuple(sorted(parts)) for name, parts in projections.held.items()}
            self.parts |= {each.pattern: by_name[each.names[0]] for each in self.weights if each.layer == layer.index}
        return self.parts[weight.pattern]

    def _memory_names(self, weight: Weight) -> list[str]:
        """Return the names in memory of a matrix among those of the unit; of a tied one it may be another's."""
        return self._by_disk_names.get(weight.names, [])

    @cached_property
    def _by_disk_names(self) -> dict[tuple[str, ...], list[str]]:
        sources, by_disk_names = (
            self.stream.conversion.all_sources(self.stream.model),
            dict[tuple[str, ...], list[str]](),
        )
        for name in self.names:
            by_disk_names.setdefault(sources.get(name, ()), []).append(name)
        return by_disk_names


def _name(weight: Weight, part: int) -> str:
    return f"{weight.pattern} {part}"
