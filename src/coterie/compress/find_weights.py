"""Find the matrices of a model that can be stored in fewer bits, from headers: experts, and all other linear weights.

Routers, norms, biases and whatever else is no matrix product stay as they are, and so do gates of a single row, and
towers that see or hear, which text does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from coterie.compress.weights import Weight
from coterie.model.arch.accounting import LayerTensors, expert_place
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint


def find_weights(
    checkpoint: Checkpoint,
    architecture: Architecture,
    conversion: WeightConversion,
    layer_names: Sequence[LayerTensors],
) -> tuple[Weight, ...]:
    """Return the matrices of a model that can be stored in blocks, in the order of their names.

    Args:
        checkpoint: the model.
        architecture: what it computes.
        conversion: between its names on disk and in memory.
        layer_names: the names of each MoE layer's experts and router.
    """
    model, tensors = architecture.model, checkpoint.tensors
    weights: list[Weight] = []
    expert_names = {name for names in layer_names for name in (*names.experts, *names.router)}
    memory = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for layer, names in zip(architecture.layers, layer_names, strict=True):
        experts = model.get_submodule(layer.experts)
        transposed = bool(experts.is_transposed)
        matrices = [
            name
            for name in names.experts
            if len(tensors[name].shape) > 1 and not conversion.memory_names[name].endswith("bias")
        ]
        place = expert_place([name for name in matrices if len(tensors[name].shape) == 2], layer.num_experts)
        groups: dict[str, list[str]] = {}
        for name in matrices:
            components = name.split(".")
            if len(tensors[name].shape) == 2 and place is not None:
                components[place] = "*"
            groups.setdefault(".".join(components), []).append(name)
        for pattern, listed in groups.items():
            shape = tensors[listed[0]].shape
            axis = _summed_axis(conversion, listed[0], shape, memory, transposed=transposed)
            if listed[0] in conversion.either_way:  # they are written as they are in memory
                shape, axis = memory[conversion.memory_names[listed[0]]], -2 if transposed else -1
            down = conversion.memory_names[listed[0]].endswith("down_proj")
            width_axis = axis if down else -3 - axis
            alone = "*" in pattern.split(".") and shape[width_axis] == layer.width
            weights.append(
                Weight(
                    pattern=pattern, names=tuple(listed), shape=shape, axis=axis, layer=layer.index, kind="expert",
                    plain_bytes=sum(tensors[name].num_bytes for name in listed),
                    can_wrap=bool(experts.is_concatenated) or not experts.has_gate or down,
                    width_axis=width_axis if alone else None,
                )
            )  # fmt: skip
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    heads = {name for name, module in model.named_modules() if module is output}
    heads = {f"{name}.weight" for name in heads}
    heads |= {other for pair in tied.items() if heads & set(pair) for other in pair}
    routers = tuple(f"{layer.router}." for layer in architecture.layers if layer.router is not None)
    inside = _stack_of(architecture)
    for name in sorted(tensors.keys() - expert_names):
        memory_name = conversion.memory_names[name]
        if memory_name.startswith(routers) or not (memory_name.startswith(inside) or memory_name in heads):
            continue
        if conversion.sources.get(memory_name) != (name,) or memory.get(memory_name) != tensors[name].shape:
            continue
        owner_name, _, leaf = memory_name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf == "weight" and isinstance(owner, nn.Linear | nn.Embedding) and tensors[name].shape[0] > 1:
            kind = "embedding" if isinstance(owner, nn.Embedding) else "linear"
            weights.append(
                Weight(
                    pattern=name, names=(name,), shape=tensors[name].shape, axis=-1, layer=None, kind=kind,
                    plain_bytes=tensors[name].num_bytes, head=memory_name in heads,
                    can_wrap=True,
                )
            )  # fmt: skip
    return tuple(sorted(weights, key=lambda weight: weight.pattern))


def _summed_axis(
    conversion: WeightConversion,
    name: str,
    shape: tuple[int, ...],
    memory: Mapping[str, tuple[int, ...]],
    *,
    transposed: bool,
) -> int:
    """Return the axis on disk, -1 or -2, that is summed over, of a matrix of experts.

    Args:
        conversion: between names on disk and in memory.
        name: of it on disk.
        shape: of it on disk.
        memory: shapes by name in memory.
        transposed: whether the axis is the last but one in memory.
    """
    columns = memory[conversion.memory_names[name]][-2 if transposed else -1]
    possible = [axis for axis in (-1, -2) if shape[axis] == columns]
    if len(possible) == 1:  # some families lie on disk the other way round
        return possible[0]
    return -2 if transposed != (name in conversion.transposed) else -1


def _stack_of(architecture: Architecture) -> str:
    """Return what names of all parts of the model begin with that holds the MoE layers."""
    components = architecture.layers[0].block.split(".")
    number = next((place for place, component in enumerate(components) if component.isdigit()), len(components))
    stack = components[: max(0, number - 1)]
    return ".".join(stack) + "." if stack else ""
