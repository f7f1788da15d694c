"""What a packed folder will hold: which matrices become records, in how many bits, and in which files. Headers alone.

Legend: E experts, F expert width, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import PreTrainedModel

from coterie.errors import InputError
from coterie.model.arch.seam import intercepted
from coterie.model.disk.encodings.block_types import SIZES
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.encodings.kernel_matrix import COLUMNS, GROUPS, ROWS
from coterie.model.disk.encodings.packed_integers import PackedIntegers
from coterie.model.disk.quantized_records import PLAIN_BITS, Matrix, Part, Records, RecordTensor
from coterie.model.disk.tensors import TensorInfo, bytes_of
from coterie.run.places import PROJECTIONS, ExpertTensor, LayerPlaces
from coterie.run.prepare import Opened

#: Columns that share a scale with 4 bits, where the model does not say otherwise.
GROUP = 64

#: Bytes of files of what every token passes, unless a single tensor has more.
_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFile:
    """A weight file.

    Attributes:
        name: its name.
        layer: the layer whose experts are in it; None where it is of what every token passes.
        tensors: number format and shape of everything in it, by name, in this order; records are among them.
    """

    name: str
    layer: int | None
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it, without the header."""
        return sum(bytes_of(dtype, shape) for dtype, shape in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """What is about to be written.

    Attributes:
        experts: the records of every layer.
        dense: the record of every linear layer that is packed, by name on disk.
        files: all weight files.
    """

    experts: Sequence[Records]
    dense: Mapping[str, Records]
    files: Sequence[PlannedFile]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(file.num_bytes for file in self.files)

    @property
    def matrices(self) -> Iterator[tuple[Matrix, int]]:
        """All matrices in records, alike ones together: each with how many there are."""
        for records in (*self.experts, *self.dense.values()):
            yield from ((matrix, records.count) for matrix in records.matrices)

    @property
    def has_four_bits(self) -> bool:
        """Whether it is for one kind of processor."""
        return any(matrix.bits == 4 for matrix, _ in self.matrices)


def plan_pack(opened: Opened, *, bits: int, dense: int | None, group: int | None) -> PackPlan:
    """Say what a packed folder of a model will hold.

    Args:
        opened: the model.
        bits: of the experts' numbers, 8 or 4.
        dense: of those of linear layers that every token passes; None to leave them as they are.
        group: columns that share a scale with 4 bits; None for that which the model has, or `GROUP`.

    Raises:
        InputError: other bits, or another group.
    """
    if bits not in (4, 8) or dense not in (None, 4, 8):
        raise InputError(f"--bits {bits} and --dense {dense}: kernels compute with 8 bits, and with 4")
    if group is not None and group not in GROUPS:
        raise InputError(f"--group {group} is none that kernels compute with: {', '.join(map(str, GROUPS))}")
    experts = [_records_of(each, bits, group) for each in opened.places]
    linear = {} if dense is None else linear_weights(opened)
    records = {
        name: Records(
            name=name, count=1, matrices=(matrix,),
            tensors=(RecordTensor(name=name, shape=shape, parts=(Part(matrix=0, axis=0, start=0, step=1),)),),
        )
        for name, shape in linear.items()
        for matrix in (kernel_form(shape, dense or PLAIN_BITS, group or _group_of(opened.checkpoint.tensors[name])),)
        if matrix.bits != PLAIN_BITS
    }  # fmt: skip
    return PackPlan(experts=experts, dense=records, files=_files(opened, experts, records))


def kernel_form(shape: tuple[int, int], bits: int, group: int) -> Matrix:
    """Return how a matrix of a shape is stored: in so many bits, or plain where no kernel takes it.

    Args:
        shape: rows and columns.
        bits: 8 or 4.
        group: columns that share a scale with 4 bits, at most.
    """
    rows, columns = shape
    groups = [each for each in GROUPS if each <= group and not columns % each]
    if bits == 4 and groups and not rows % ROWS:
        return Matrix(bits=4, group=groups[-1], rows=rows, columns=columns)
    if bits == 8 and not columns % COLUMNS:
        return Matrix(bits=8, group=None, rows=rows, columns=columns)
    return Matrix(bits=PLAIN_BITS, group=None, rows=rows, columns=columns)


def _group_of(info: TensorInfo) -> int:
    """Return columns that share a scale in what a tensor is stored as, so that they can go on to do so."""
    encoding = None if info.packed is None else info.packed.encoding
    group = GROUP
    if isinstance(encoding, PackedIntegers):
        group = encoding.group or GROUP
    elif isinstance(encoding, GgmlBlocks):
        group = SIZES[encoding.type][0]
    return max(GROUPS[0], min(group, GROUPS[-1]))


def _records_of(places: LayerPlaces, bits: int, group: int | None) -> Records:
    """Return the records of a layer's experts."""
    matrices: dict[str, Matrix] = {}
    for tensor in places.experts[0]:
        for rows in tensor.rows:
            shape = rows.count, matrix_shape(tensor)[1 - rows.axis]
            matrices[rows.field] = kernel_form(shape, bits, group or _group_of(tensor.info))
    fields = [field for field in PROJECTIONS if field in matrices]
    tensors = []
    for tensors_of_first, name in zip(places.experts[0], _patterns(places), strict=True):
        parts = tuple(
            Part(matrix=fields.index(rows.field), axis=rows.axis, start=rows.start, step=rows.step)
            for rows in tensors_of_first.rows
        )
        tensors.append(RecordTensor(name=name, shape=matrix_shape(tensors_of_first), parts=parts))
    return Records(
        name=f"{places.layer.experts}.*.record", count=len(places.experts),
        matrices=tuple(matrices[field] for field in fields), tensors=tuple(tensors),
    )  # fmt: skip


def matrix_shape(tensor: ExpertTensor) -> tuple[int, int]:
    """Return the shape of the matrix of one expert that a tensor holds."""
    rows, columns = tensor.info.shape[-2:]
    return rows, columns


def _patterns(places: LayerPlaces) -> list[str]:
    """Return the names of the tensors of a layer's experts, with a star where experts have their own."""
    patterns = []
    for position, tensor in enumerate(places.experts[0]):
        last = places.experts[-1][position].info.name
        components, others = tensor.info.name.split("."), last.split(".")
        differ = [number for number, pair in enumerate(zip(components, others, strict=True)) if pair[0] != pair[1]]
        for number in differ:
            components[number] = "*"
        patterns.append(".".join(components))
    return patterns


def _files(opened: Opened, experts: Sequence[Records], dense: Mapping[str, Records]) -> list[PlannedFile]:
    files = [
        PlannedFile(name="", layer=number, tensors=dict.fromkeys(records.names(), ("U8", (records.num_bytes,))))
        for number, records in enumerate(experts)
    ]
    apart, size = opened.apart, 0
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, info in sorted(opened.checkpoint.tensors.items()):
        if name in apart:
            continue
        entry = ("U8", (dense[name].num_bytes,)) if name in dense else (plain_format(info), info.shape)
        if tensors and size + bytes_of(*entry) > _FILE_BYTES:
            files.append(PlannedFile(name="", layer=None, tensors=tensors))
            tensors, size = {}, 0
        tensors[name] = entry
        size += bytes_of(*entry)
    files.append(PlannedFile(name="", layer=None, tensors=tensors))
    return [
        replace(file, name=f"model-{number:05d}-of-{len(files):05d}.safetensors")
        for number, file in enumerate(files, start=1)
    ]


def plain_format(info: TensorInfo) -> str:
    """Return the number format that a tensor has which is not packed: its own, bfloat16 where it is unpacked for it."""
    return "BF16" if info.packed is not None else info.dtype


def linear_weights(opened: Opened) -> dict[str, tuple[int, int]]:
    """Return the weights of linear layers that every token passes and that may be packed, by name on disk: shapes.

    Left out are routers, weights that other layers share, and those that a family reads in another way than by calling
    the layer.
    """
    model, conversion = opened.architecture.model, opened.conversion
    routers = {name for layer in opened.architecture.layers for name, _ in layer.router_tensors}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    elsewhere = {*routers, *tied, *tied.values(), *_read_otherwise(model)}
    uses: dict[str, int] = {}
    for names in conversion.sources.values():
        for name in names:
            uses[name] = uses.get(name, 0) + 1
    turned = conversion.transposed | conversion.either_way
    weights: dict[str, tuple[int, int]] = {}
    for module_name, module in model.named_modules():
        memory_name = f"{module_name}.weight"
        [name, *others] = conversion.sources.get(memory_name, ("",))
        if type(module) is not nn.Linear or memory_name in elsewhere or not name or others:
            continue
        shape = (module.out_features, module.in_features)
        if uses[name] == 1 and name not in turned and opened.checkpoint.tensors[name].shape == shape:
            weights[name] = shape
    return weights


class _Watched(nn.Linear):
    """A linear layer that notes whether it was called, and whether anybody else reads its weight."""

    watchers: tuple[set[nn.Module], set[nn.Module]] = (set(), set())

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The weight; who reads it is noted."""
        self.watchers[1].add(self)
        return self._parameters["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        self.watchers[0].add(self)
        weight = self._parameters["weight"]
        assert weight is not None
        return nn.functional.linear(x, weight, self.bias)


def _read_otherwise(model: PreTrainedModel) -> set[str]:
    """Return the weights of linear layers that are not called, or read by others; seen in runs of the meta model."""

    def nothing(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return torch.zeros_like(hidden_TD)

    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    called, read = _Watched.watchers = set(), set()
    for module in linear.values():
        module.__class__ = _Watched
    try:
        with torch.no_grad(), intercepted(model, nothing), FakeTensorMode(allow_non_fake_inputs=True):
            for tokens in (1, 2):
                # Where a family looks at numbers, which are none here, what it calls after that stays as it is.
                with suppress(DynamicOutputShapeException, DataDependentOutputException):
                    model(input_ids=torch.zeros(1, tokens, dtype=torch.int64, device="meta"), use_cache=True)
    finally:
        for module in linear.values():
            module.__class__ = nn.Linear
    return {f"{name}.weight" for name, module in linear.items() if module not in called or module in read}
