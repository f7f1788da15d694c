"""Prediction layers: decoder layers in a checkpoint that predict tokens further ahead (MTP), which text does not pass.

transformers has no place for them, other programs run them, and the entries of config.json that size their experts are
those of all layers. So when those change, the prediction layers change with them or go.

Legend: E experts of the original, M experts of the result. All names here are names on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.model.arch.accounting import expert_place, layer_tensors
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.entries import Entry, whole_numbers, with_value
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint

_LAYER = re.compile(r".*?\.\d+(?=\.)")
_MODULE = re.compile(r"(^|\.)(mtp|nextn)")
_COUNT = re.compile(
    r"(mtp|nextn|next_n|multi_token).*(layer|module|head|num|depth)|num.*(mtp|nextn|next_n|multi_token)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The prediction layers of a checkpoint.

    Attributes:
        names: all their tensors.
        base: the last MoE layer that text passes, up to its number; the one that prediction layers are built like.
        twins: prediction layers whose experts and router lie as those of `base` do, up to their number.
        unclear: a tensor of experts of a prediction layer that is no twin; None where there is none.
        counts: entries of config.json that count prediction layers.
    """

    names: frozenset[str]
    base: str
    twins: tuple[str, ...]
    unclear: str | None
    counts: tuple[Entry, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, architecture: Architecture, conversion: WeightConversion) -> Prediction:
        """Find the prediction layers of a checkpoint by its headers."""
        tensors = layer_tensors(checkpoint, architecture.layers, conversion)[-1]
        sized = (*tensors.experts, *tensors.router)
        match = _LAYER.match(sized[0])
        base = match.group() if match else ""
        places = architecture.model.state_dict().keys()
        placed = {_layer_of(name) for name, memory_name in conversion.memory_names.items() if memory_name in places}
        stack = base.rpartition(".")[0]
        names = {
            name
            for name, memory_name in conversion.memory_names.items()
            if memory_name not in places
            and (
                _MODULE.search(name) or (_layer_of(name).rpartition(".")[0] == stack and _layer_of(name) not in placed)
            )
        }
        twins = tuple(
            prefix
            for prefix in sorted(set(map(_layer_of, names)))
            if base and all(_alike(checkpoint, name, prefix + name.removeprefix(base)) for name in sized)
        )
        covered = {prefix + name.removeprefix(base) for prefix in twins for name in sized}
        experts = sorted(name for name in names - covered if "experts" in name and "shared" not in name)
        return cls(
            names=frozenset(names),
            base=base,
            twins=twins,
            unclear=experts[0] if experts else None,
            counts=tuple(path for path, count in whole_numbers(checkpoint.config) if count and _COUNT.search(path[-1])),
        )

    def twin_of(self, name: str) -> str | None:
        """Return the tensor of `base` that a tensor of a twin lies like; None for one that is in no twin."""
        prefix = _layer_of(name)
        return self.base + name.removeprefix(prefix) if prefix in self.twins else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinning:
    """How a layer's tensors on disk lose experts.

    Attributes:
        kept: for each expert of the result the one of the original that it is.
        place: which component of an expert's name is its number; None where one tensor holds all experts.
        experts: names of the tensors of experts.
        router_axes: axis of each router tensor along which it knows the experts, by name.
        num_experts: E.
    """

    kept: Sequence[int]
    place: int | None
    experts: frozenset[str]
    router_axes: Mapping[str, int]
    num_experts: int

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, architecture: Architecture, conversion: WeightConversion, kept: Sequence[int]
    ) -> Thinning:
        """Describe the last MoE layer."""
        layer = architecture.layers[-1]
        tensors = layer_tensors(checkpoint, architecture.layers, conversion)[-1]
        axes = dict(layer.router_tensors)
        fused = any(len(checkpoint.tensors[name].shape) > 2 for name in tensors.experts)
        return cls(
            kept=kept,
            place=None if fused else expert_place(tensors.experts, layer.num_experts),
            experts=frozenset(tensors.experts),
            router_axes={name: axes[conversion.memory_names[name]] for name in tensors.router},
            num_experts=layer.num_experts,
        )

    def source(self, name: str, like: str) -> str | None:
        """Return the tensor that one of a thinned layer is read from; None where it is no longer there.

        Args:
            name: of the tensor.
            like: what it lies like in the layer that was described.
        """
        if like not in self.experts or self.place is None:
            return name
        components = name.split(".")
        # The number stands as far from the end as in the other layer, whose name may be longer.
        place = self.place - len(like.split("."))
        number = int(components[place])
        if number >= len(self.kept):
            return None
        components[place] = str(self.kept[number])
        return ".".join(components)

    def cut(self, tensor: Tensor, like: str) -> Tensor:
        """Return a tensor with the rows of the experts that are kept, and all rows that belong to none."""
        axis = self.router_axes.get(like, 0 if like in self.experts and self.place is None else None)
        if axis is None:
            return tensor
        rows = [*self.kept, *range(self.num_experts, tensor.shape[axis])]
        return tensor.index_select(axis, torch.tensor(rows))


def without_prediction(config: Mapping[str, Any], counts: Iterable[Entry]) -> dict[str, Any]:
    """Return the content of config.json with no prediction layers."""
    changed = dict(config)
    for path in counts:
        changed = with_value(changed, path, 0)
    return changed


def _layer_of(name: str) -> str:
    match = _LAYER.match(name)
    return match.group() if match else ""


def _alike(checkpoint: Checkpoint, one: str, other: str) -> bool:
    tensors = checkpoint.tensors
    return other in tensors and (tensors[one].shape, tensors[one].dtype) == (tensors[other].shape, tensors[other].dtype)
