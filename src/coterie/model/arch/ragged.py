"""Write ragged checkpoints: which tensors hold one expert alone, and how they are cut to its width.

Reading them is the affair of `coterie.model.disk.filled`. Names here are names on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.accounting import expert_place
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.experts import width_axes
from coterie.model.arch.layers import Architecture
from coterie.model.disk.encodings.plain import Plain
from coterie.model.disk.encodings.ragged import Ragged
from coterie.model.disk.tensors import DTYPE_NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a tensor belongs.

    Attributes:
        layer: number of the MoE layer.
        expert: number of the expert.
        axis: along which the expert's width runs.
        pattern: its name with a star for the number of the expert.
    """

    layer: int
    expert: int
    axis: int
    pattern: str


def places_of(
    conversion: WeightConversion, architecture: Architecture, names: Iterable[Iterable[str]]
) -> dict[str, Place]:
    """Find the tensors that become smaller with the width of one expert, by name.

    Args:
        conversion: between the names on disk and in memory.
        architecture: of the checkpoint.
        names: for each MoE layer the names of its experts' tensors.

    Raises:
        Infeasible: a layer stores all its experts in one tensor.
    """
    places: dict[str, Place] = {}
    for layer, layer_names in zip(architecture.layers, names, strict=True):
        module = architecture.model.get_submodule(layer.experts)
        axes, listed = width_axes(module), sorted(layer_names)
        position = expert_place(listed, layer.num_experts)
        if position is None:
            raise Infeasible(
                f"{layer.experts}: this family stores all experts of a layer in one tensor ({listed[0]}), which cannot "
                "hold experts of different widths; use the uniform form of the recipe"
            )
        for name in listed:
            leaf = conversion.memory_names[name].rpartition(".")[2]
            if leaf in axes:
                components = name.split(".")
                expert, components[position] = int(components[position]), "*"
                # In memory the expert axis comes first.
                places[name] = Place(
                    layer=layer.index, expert=expert, axis=axes[leaf] - 1, pattern=".".join(components)
                )
    return places


def cut(
    tensors: Mapping[str, Tensor], places: Mapping[str, Place], widths_LE: Mapping[int, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return tensors with the zeros cut off that fill experts up to the full width.

    Args:
        tensors: by name.
        places: where they belong; others stay as they are.
        widths_LE: by layer, the width of each expert.

    Raises:
        ArchitectureMismatch: what would be cut off is not zero.
    """
    smaller = dict(tensors)
    for name, tensor in tensors.items():
        if name in places:
            place = places[name]
            width = widths_LE[place.layer][place.expert]
            inner = Plain(dtype=DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")])
            encoding = Ragged(axis=place.axis, width=width, full=tensor.shape[place.axis], inner=inner)
            try:
                smaller |= {name + suffix: stored for suffix, stored in encoding.pack(tensor).items()}
            except ArchitectureMismatch as error:
                raise ArchitectureMismatch(f"{name} {error}") from None
    return smaller
