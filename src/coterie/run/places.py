"""Where the matrices of every expert lie on disk, and which rows of them are its gate, up and down projection.

An expert's bytes are read alone: its own tensors, or its rows of one for all experts of a layer, packed or not. What
projections they hold is found out by transformers' own conversion, run on numbers of rows in place of weights.

Legend: E experts, F expert width, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch
from coterie.model.arch.accounting import expert_place, layer_tensors
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion
from coterie.model.arch.experts import canonical_experts, native_experts
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.arch.meta import meta_model
from coterie.model.arch.resize import resized_config
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tensors import TORCH_NAMES, TensorInfo

#: The projections that are read from disk, as fields of `Experts`.
PROJECTIONS = ("gate_EFD", "up_EFD", "down_EDF")

#: What numbers of rows of different projections, and of different experts, lie apart by.
_PART, _EXPERT = 2**48, 2**32


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """One projection of an expert as rows of a matrix on disk.

    Attributes:
        field: the field of `Experts` that it is.
        axis: the axis of the matrix along which its rows (outputs) lie, 0 or 1.
        start: the first.
        step: from one to the next.
        count: how many.
    """

    field: str
    axis: int
    start: int
    step: int
    count: int

    def of(self, matrix: Tensor) -> Tensor:
        """Return the projection (rows, columns) as a view of the matrix."""
        stop = self.start + (self.count - 1) * self.step + 1
        rows = matrix if self.axis == 0 else matrix.T
        if self.step == 1 and self.count == len(rows):
            return rows
        return rows[self.start : stop : self.step]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTensor:
    """A matrix on disk that holds projections of one expert.

    Attributes:
        info: its place: of the expert alone, a stack of one where the tensor is one of all experts.
        rows: what it holds.
    """

    info: TensorInfo
    rows: tuple[Rows, ...]

    def stored(self) -> tuple[TensorInfo, ...]:
        """Return what the files hold of it, in the order in which `read` wants it."""
        return tuple(_stored(self.info))

    def read(self, stored: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return its projections by field.

        Args:
            stored: the bytes of each that `stored` names.
        """
        matrix = _unpacked(self.info, iter(stored))
        if matrix.ndim == 3:
            matrix = matrix[0]
        return {rows.field: rows.of(matrix) for rows in self.rows}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlaces:
    """Where the experts of a layer lie.

    Attributes:
        layer: which one.
        experts: of each expert the tensors that hold its matrices (E entries).
    """

    layer: MoELayer
    experts: tuple[tuple[ExpertTensor, ...], ...]


def _stored(info: TensorInfo) -> list[TensorInfo]:
    if info.packed is None:
        return [info]
    return [each for name in sorted(info.packed.stored) for each in _stored(info.packed.stored[name])]


def _unpacked(info: TensorInfo, stored: Iterator[Tensor]) -> Tensor:
    if info.packed is None:
        byte_N: Tensor = next(stored)
        shape = (*info.shape[:-1], info.shape[-1] // 2) if info.dtype == "F4" else info.shape
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        if byte_N.data_ptr() % dtype.itemsize:  # numbers that lie at odd places are no tensor
            byte_N = byte_N.clone()
        return byte_N.view(dtype).view(shape)
    inside = {name: _unpacked(info.packed.stored[name], stored) for name in sorted(info.packed.stored)}
    return info.packed.encoding.unpack(inside)


def find_places(
    checkpoint: Checkpoint, architecture: Architecture, conversion: WeightConversion
) -> tuple[LayerPlaces, ...]:
    """Find the experts of every layer, from headers alone.

    Args:
        checkpoint: the model, as a view in full precision.
        architecture: what it computes.
        conversion: between its names on disk and in memory.

    Raises:
        ArchitectureMismatch: an expert's bytes do not lie by themselves, or not in rows that are evenly apart.
    """
    names = layer_tensors(checkpoint, architecture.layers, conversion)
    # The conversion is that of the family, on as few experts as can be routed.
    count = architecture.feasible_counts()[0]
    small = meta_model(resized_config(architecture, count), where=str(checkpoint.path))
    places = []
    for layer, of_layer in zip(architecture.layers, names, strict=True):
        matrices = [name for name in of_layer.experts if not _is_small(checkpoint.tensors[name])]
        place = expert_place(matrices, layer.num_experts)
        rows_in = _rows_of(checkpoint, small, count, layer, matrices, place)
        tensors: list[list[ExpertTensor]] = [[] for _ in range(layer.num_experts)]
        for name in matrices:
            info = checkpoint.tensors[name]
            rows = rows_in.get(_without_expert(name, place))
            if rows is None:
                raise ArchitectureMismatch(f"{checkpoint.path}: it is not known which projections {name} holds")
            if len(info.shape) == 3:
                for expert in range(layer.num_experts):
                    one = info.slice_rows(expert, expert + 1)
                    if one is None:
                        raise ArchitectureMismatch(
                            f"{checkpoint.path}: the experts in {name} cannot be read one by one, as it is packed"
                        )
                    tensors[expert].append(ExpertTensor(info=one, rows=rows))
            else:
                assert place is not None, f"{name} is not one of {layer.num_experts} experts"
                tensors[int(name.split(".")[place])].append(ExpertTensor(info=info, rows=rows))
        wanted = {field for field in PROJECTIONS if field != "gate_EFD" or _has_gate(architecture, layer)}
        for expert, own in enumerate(tensors):
            if {rows.field for tensor in own for rows in tensor.rows} != wanted:
                raise ArchitectureMismatch(
                    f"{checkpoint.path}: expert {expert} of {layer.block} lies in tensors that hold only "
                    f"{sorted({rows.field for tensor in own for rows in tensor.rows})}"
                )
        places.append(LayerPlaces(layer=layer, experts=tuple(map(tuple, tensors))))
    return tuple(places)


def _has_gate(architecture: Architecture, layer: MoELayer) -> bool:
    return bool(architecture.model.get_submodule(layer.experts).has_gate)


def _is_small(info: TensorInfo) -> bool:
    """Tell whether it is a bias, of one expert or of all, which stays in memory."""
    return len(info.shape) < 2 or (len(info.shape) == 2 and info.name.endswith("bias"))


def _without_expert(name: str, place: int | None) -> str:
    """Return a name with a star for the expert's number, if it has one, at a place between its dots."""
    if place is None:
        return name
    components = name.split(".")
    components[place] = "*"
    return ".".join(components)


def _rows_of(
    checkpoint: Checkpoint,
    small: PreTrainedModel,
    count: int,
    layer: MoELayer,
    names: Sequence[str],
    place: int | None,
) -> dict[str, tuple[Rows, ...]]:
    """Return by name, a star for the expert's number, what a tensor on disk holds of each expert.

    Args:
        checkpoint: the model.
        small: its meta model with fewer experts.
        count: how many.
        layer: the layer.
        names: names on disk of the matrices of its experts.
        place: where between the dots of a name the expert's number is, if it has one.
    """
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        info = checkpoint.tensors[name]
        if len(info.shape) == 3:
            tensors[name] = replace(info, shape=(count, *info.shape[1:]), packed=None)
        elif place is None or int(name.split(".")[place]) < count:
            tensors[name] = replace(info, packed=None)
    conversion = WeightConversion(replace(checkpoint, tensors=tensors), small)
    raw = {name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype]) for name, info in tensors.items()}
    memory, conversions = conversion.convert(raw, lambda name: TORCH_DTYPES["F32"])
    shapes = {name: tuple(tensor.shape) for name, tensor in memory.items()}
    del memory
    module = small.get_submodule(layer.experts)
    experts = canonical_experts(module)
    marks: dict[str, Tensor | None] = dict.fromkeys(("gate_bias_EF", "up_bias_EF", "down_bias_ED"))
    for part, field in enumerate(PROJECTIONS):
        matrix = getattr(experts, field)
        if matrix is not None:
            number_ER = torch.arange(count)[:, None] * _EXPERT + torch.arange(matrix.shape[1])
            marks[field] = (number_ER + part * _PART)[..., None]
    native = native_experts(module, replace(experts, **marks))  # type: ignore[arg-type]
    prefix = f"{layer.experts}."
    wanted = {f"{prefix}{leaf}": tensor for leaf, tensor in native.items() if f"{prefix}{leaf}" in shapes}
    rows: dict[str, tuple[Rows, ...]] = {}
    for name, mark in conversion.write(small, wanted, conversions, as_they_are=True).items():
        of_one = mark[0] if mark.ndim == 3 else mark
        axis = 0 if of_one.shape[-1] == 1 else 1
        shape, lies = tensors[name].shape[-2:], shapes[conversion.memory_names[name]][-2:]
        if name in conversion.either_way and shape != lies:
            axis = 1 - axis
        rows[_without_expert(name, place)] = _evenly_apart(name, of_one.flatten().tolist(), axis)
    return rows


def _evenly_apart(name: str, numbers: Sequence[int], axis: int) -> tuple[Rows, ...]:
    """Return what rows of a matrix hold, from the numbers of the rows that went there.

    Raises:
        ArchitectureMismatch: a projection's rows are in another order, or not evenly apart.
    """
    by_part: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        by_part.setdefault(number // _PART, []).append(place)
    rows = []
    for part, places in sorted(by_part.items()):
        step = places[1] - places[0] if len(places) > 1 else 1
        ordered = [numbers[place] % _EXPERT for place in places] == list(range(len(places)))
        if not ordered or places != list(range(places[0], places[0] + step * len(places), step)):
            raise ArchitectureMismatch(f"rows of {PROJECTIONS[part]} are not evenly apart in {name}")
        rows.append(Rows(field=PROJECTIONS[part], axis=axis, start=places[0], step=step, count=len(places)))
    return tuple(rows)
