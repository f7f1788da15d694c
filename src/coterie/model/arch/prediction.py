"""Prediction layers: decoder layers in a checkpoint that predict tokens further ahead (MTP), which text does not pass.

transformers has no place for them, other programs run them, and the entries of config.json that size their experts are
those of all layers. So when those change, the prediction layers change with them or go.

Legend: E experts of the original, M experts of the result, F expert width, W that of the result, C times that a tensor
holds each neuron, D the rest of a neuron's weights. All names here are names on disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coterie.model.arch.accounting import expert_place, layer_tensors
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.entries import Entry, whole_numbers, with_value
from coterie.model.arch.experts import width_axes
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint

#: Reads a tensor by its name on disk.
Read = Callable[[str], Tensor]

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

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the prediction layers, and of modules for prediction beside them."""
        return tuple(sorted({_layer_of(name) or name.partition(".")[0] for name in self.names}))

    def twin_of(self, name: str) -> str | None:
        """Return the tensor of `base` that a tensor of a twin lies like; None for one that is in no twin."""
        prefix = _layer_of(name)
        return self.base + name.removeprefix(prefix) if prefix in self.twins else None


@dataclass(frozen=True, kw_only=True)
class Follower:
    """What becomes of a prediction layer when its tensors follow those of the last MoE layer.

    Its experts are those of the same numbers, with as many parts of each and of the same width. What text measured in
    the last layer says nothing of its hidden neurons: those stay whose weights are largest, by the product of the norms
    of their rows and columns in all projections. Nothing is fitted: its router keeps its own rows.

    Attributes:
        prediction: the prediction layers.
        kept: for each expert of the result the one of the original that it is, or is a part of; parts of one expert
            follow each other, the one with the largest weights first.
        width: hidden neurons of each expert of the result, W.
        full_width: those of the original, F.
        factor: what the output of each expert is multiplied by, where parts share the routing weight of their expert.
        place: which component of an expert's name is its number; None where one tensor holds all experts.
        roles: what each tensor of the experts of the last layer is in memory, by name on disk.
        width_axes: axis on disk along which the width runs, once or (gate and up) several times, by name on disk.
        interleaved: gate and up of one neuron lie side by side where one tensor holds both.
        router_axes: axis of each router tensor along which it knows the experts, by name on disk.
        num_experts: E.
    """

    prediction: Prediction
    kept: Sequence[int]
    width: int
    full_width: int
    factor: float
    place: int | None
    roles: Mapping[str, str]
    width_axes: Mapping[str, int]
    interleaved: bool
    router_axes: Mapping[str, int]
    num_experts: int
    _orders: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        architecture: Architecture,
        conversion: WeightConversion,
        prediction: Prediction,
        *,
        kept: Sequence[int],
        width: int,
        factor: float,
    ) -> Follower:
        """Describe how the last MoE layer lies on disk; see the class for the arguments."""
        layer = architecture.layers[-1]
        tensors = layer_tensors(checkpoint, architecture.layers, conversion)[-1]
        module = architecture.model.get_submodule(layer.experts)
        axes = dict(layer.router_tensors)
        fused = any(len(checkpoint.tensors[name].shape) > 2 for name in tensors.experts)
        return cls(
            prediction=prediction,
            kept=kept,
            width=width,
            full_width=layer.width,
            factor=factor,
            place=None if fused else expert_place(tensors.experts, layer.num_experts),
            roles={name: conversion.memory_names[name].rpartition(".")[2] for name in tensors.experts},
            # In memory the expert axis comes first.
            width_axes={role: axis - 1 for role, axis in width_axes(module).items()},
            interleaved=not module.is_concatenated,
            router_axes={name: axes[conversion.memory_names[name]] for name in tensors.router},
            num_experts=layer.num_experts,
        )

    def tensors(self, name: str, read: Read) -> dict[str, Tensor]:
        """Return what the result has of one tensor of the original, by name: none, one, or one for each part.

        Args:
            name: of the tensor of the original.
            read: reads tensors of the original.
        """
        prefix, like = _layer_of(name), self.prediction.twin_of(name)
        if like is None:
            return {name: read(name)}
        if like in self.router_axes:
            tensor, axis = read(name), self.router_axes[like]
            # Rows behind the experts' (for shared experts, or for "no expert") stay.
            rows = [*self.kept, *range(self.num_experts, tensor.shape[axis])]
            return {name: tensor.index_select(axis, torch.tensor(rows))}
        if like not in self.roles:
            return {name: read(name)}
        role = self.roles[like]
        if self.place is None:
            stack = read(name)
            cut = [self._cut(stack[source], role, prefix, each, read) for each, source in enumerate(self.kept)]
            return {name: torch.stack(cut)}
        return {
            self._numbered(name, each): self._cut(read(self._numbered(name, self.kept[each])), role, prefix, each, read)
            for each in range(self._number(name), len(self.kept), self.num_experts)
        }

    def _cut(self, tensor: Tensor, role: str, prefix: str, expert: int, read: Read) -> Tensor:
        """Return a tensor of what an expert of the result is made from with its neurons, as much as it is to weigh."""
        axis, source = self.width_axes.get(role), self.kept[expert]
        if axis is not None and self.width < self.full_width:
            part = self.kept[:expert].count(source)
            order_F = self._order(prefix, source, read)
            neurons_W = order_F[part * self.width : (part + 1) * self.width].sort().values
            tensor = self._apart(tensor, axis).index_select(axis + (1 if not self.interleaved else 0), neurons_W)
            tensor = tensor.flatten(axis, axis + 1)
        if role.startswith("down_proj") and self.factor != 1:
            share = 1 if role in self.width_axes else self.kept.count(source)  # a bias is shared out among the parts
            tensor = (tensor.float() * (self.factor / share)).to(tensor.dtype)
        return tensor

    def _apart(self, tensor: Tensor, axis: int) -> Tensor:
        """Return a tensor with gate and up, where it holds both, along an axis of their own beside the width's."""
        copies = tensor.shape[axis] // self.full_width
        sizes = (self.full_width, copies) if self.interleaved else (copies, self.full_width)
        return tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])

    def _order(self, prefix: str, expert: int, read: Read) -> Tensor:
        """Return the neurons of an expert of a prediction layer by falling weight, (F,); of equal ones the first."""
        if (prefix, expert) not in self._orders:
            scores: dict[int, Tensor] = {}
            for like, role in self.roles.items():
                number = None if self.place is None else self._number(like)
                if role not in self.width_axes or number not in (None, expert):
                    continue
                tensor = read(prefix + like.removeprefix(self.prediction.base))
                if tensor.ndim < (3 if number is None else 2):
                    continue  # a bias
                for each in range(self.num_experts) if number is None else (number,):
                    norms_F = self._norms(tensor[each] if number is None else tensor, self.width_axes[role])
                    scores[each] = scores[each] * norms_F if each in scores else norms_F
            self._orders.update(
                ((prefix, each), score_F.argsort(descending=True, stable=True)) for each, score_F in scores.items()
            )
        return self._orders[prefix, expert]

    def _norms(self, tensor: Tensor, axis: int) -> Tensor:
        """Return the norms of the weights of each neuron, (F,); of gate and up in one tensor their product."""
        width_axis, copies_axis = (axis, axis + 1) if self.interleaved else (axis + 1, axis)
        weights_FCD = self._apart(tensor, axis).movedim((width_axis, copies_axis), (0, 1)).flatten(2)
        norms_FC: Tensor = torch.linalg.vector_norm(weights_FCD, dim=2, dtype=torch.float64)
        return norms_FC.prod(1)

    def _number_place(self, name: str) -> int:
        assert self.place is not None
        # The name of another layer may be longer.
        return self.place + _layer_of(name).count(".") - self.prediction.base.count(".")

    def _number(self, name: str) -> int:
        return int(name.split(".")[self._number_place(name)])

    def _numbered(self, name: str, number: int) -> str:
        """Return the name of the tensor like this one of the expert of another number."""
        components = name.split(".")
        components[self._number_place(name)] = str(number)
        return ".".join(components)


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
