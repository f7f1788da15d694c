"""A packed result in memory as the blocks that it is on disk, on the way to be trained, and what training it takes.

Legend: E experts, K bytes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.amounts import parse_bytes
from coterie.compress.pack import packed_names
from coterie.compress.plan import Plan
from coterie.compress.projections import DOWN, FIELDS, Projections, projections_of
from coterie.compress.result_model import ResultModel
from coterie.compress.shards import Shard
from coterie.compress.source import Source
from coterie.compress.target import Target
from coterie.compress.weights import PRICED_TYPES, Weight, at_widths, by_type
from coterie.model.arch.conversion import TORCH_DTYPES, put
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import SIZES, numbers_of, rows_together, unwrapped
from coterie.model.disk.header import read_header
from coterie.model.stream.stream import Stream
from coterie.train.blocks import Blocks, Stack, experts_in_blocks, train_rounded, train_scales
from coterie.train.memory import BlockSizes


@dataclass(kw_only=True)
class BlockModel:
    """The result whose weight files are in a folder, with all that is trained of it.

    Trained are multipliers of the scales of all matrices in blocks, and of what stays plain numbers the routers, norms
    and biases. Matrices that a plan leaves plain stay as they are.

    Attributes:
        folder: where the weight files are.
        shards: which there are.
        source: the original by its headers.
        stream: the same, whose conversion between names is used.
        plan: which type each matrix has.
        result: the meta model of the result.
        model: the result itself, float32.
        weights: what is trained, by name: multipliers by that of the matrix or of the projection, plain numbers by that
            in memory.
    """

    folder: Path
    shards: Sequence[Shard]
    source: Source
    stream: Stream
    plan: Plan
    result: ResultModel
    model: PreTrainedModel = field(init=False)
    weights: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._blocks: dict[str, Blocks] = {}
        self._stacks: dict[str, dict[str, list[Stack]]] = {}
        self._own: dict[str, Weight] = {}
        self._plain: set[str] = set()
        self._conversions: dict[str, list[Any]] = {}
        self._packed = packed_names(self.source, self.plan)
        self.model = self.result.empty_model(torch.float32)
        self._sources = self.stream.conversion.all_sources(self.model)
        device = self.stream.device
        for shard in self.shards:
            self._load(shard)
        self.stream.move_buffers(self.model, device)
        self.model.requires_grad_(False)
        self.model.eval()  # type: ignore[no-untyped-call]

    def computing(self) -> AbstractContextManager[None]:
        """Return a context within which the model computes, its experts from blocks."""
        return experts_in_blocks(self.model, self._stacks)

    def changed(self, shard: Shard, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a weight file by name on disk, with these weights in it."""
        stored = self._stored(shard)
        inside = [name for name, sources in self.stream.conversion.sources.items() if not set(sources) - set(stored)]
        plain = {name: weights[name].detach().cpu() for name in inside if name in self._plain}
        stored |= self.stream.conversion.write(self.result.model, plain, self._conversions[shard.file])
        for weight, _ in self._outer(shard):
            [name] = weight.names
            stored[name] = self._bytes(name, weights)
        names = set(shard.names)
        for name, weight in self._own.items():
            if names.issuperset(weight.names):
                byte_NRK = self._bytes(name, weights)
                stored |= {
                    each: byte_RK.transpose(weight.axis, -1)
                    for each, byte_RK in zip(weight.names, byte_NRK, strict=True)
                }
        for layer, _ in () if self._have_own else self._layers(shard):
            rows = {
                part: self._bytes(name, weights)
                for part in FIELDS
                if (name := _stack_name(layer, part)) in self._blocks
            }
            stored |= self._projections(layer, shard).bytes_on_disk(rows, self._packed)
        return stored

    def _bytes(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        blocks = self._blocks[name]
        return blocks.bytes(weights.get(name, blocks.ones())).cpu()

    def _load(self, shard: Shard) -> None:
        """Put the tensors of a weight file into the model."""
        stored, device = self._stored(shard), self.stream.device
        memory, self._conversions[shard.file] = self.result.opened(self.folder, shard)
        by_source = {self._sources[name]: tensor for name, tensor in memory.items()}
        for name, sources in self._sources.items():
            tensor = memory.get(name, by_source.get(sources))  # a tied weight bears one of its names only
            if tensor is not None and not self._packed.issuperset(sources):
                put(self.model, name, tensor.to(device))
        del memory, by_source
        for weight, kind in self._outer(shard):
            blocks = Blocks(kind, stored[weight.names[0]].to(device), weight.columns)
            names = tuple(name for name, sources in self._sources.items() if sources == weight.names)
            self._add(weight.names[0], blocks, train_scales(self.model, names, blocks))
        for layer, weights in self._layers(shard):
            if self._have_own:
                self._load_own(layer, weights, stored, shard)
            else:
                self._load_experts(layer, weights, stored, shard)
        self._round(shard)

    def _load_experts(
        self, layer: MoELayer, weights: Sequence[tuple[Weight, str]], stored: Mapping[str, Tensor], shard: Shard
    ) -> None:
        """Load the experts of a layer as one stack for each projection."""
        projections = self._projections(layer, shard)
        axes = {name: weight.axis for weight, _ in weights for name in weight.names}
        kind_of = {name: kind for weight, kind in weights for name in weight.names}
        kinds = {part: kind for name, kind in kind_of.items() for part in projections.held[name]}
        columns = {part: matrix.shape[-1] for part, matrix in projections_of(projections.experts).items()}
        disk = {name: stored[name] for name in axes}
        rows = projections.from_disk(
            disk, axes,
            together={part: rows_together(kind, columns[part]) for part, kind in kinds.items()},
        )  # fmt: skip
        for part, byte_ERK in rows.items():
            blocks = Blocks(kinds[part], byte_ERK.to(self.stream.device), columns[part])
            multiplier_Gn = blocks.ones()
            self._add(_stack_name(layer, part), blocks, multiplier_Gn)
            stack = Stack(blocks=blocks, multiplier_Gn=multiplier_Gn)
            self._stacks.setdefault(layer.experts, {})[FIELDS[part]] = [stack]

    def _load_own(
        self, layer: MoELayer, weights: Sequence[tuple[Weight, str]], stored: Mapping[str, Tensor], shard: Shard
    ) -> None:
        """Load experts that have types or widths, and tensors, of their own: those that are alike are one stack."""
        parts_in = self._projections(layer, shard).held
        for weight, kind in weights:
            [part] = parts_in[weight.names[0]]
            for each in weight.by_width():
                if 0 in each.shape:  # of experts without neurons
                    continue
                byte_NRK = torch.stack([stored[name].transpose(each.axis, -1) for name in each.names])
                blocks = Blocks(kind, byte_NRK.to(self.stream.device), each.columns)
                width = each.columns if part == DOWN else each.rows
                multiplier_Gn, name = blocks.ones(), f"{_stack_name(layer, part)}.{width}.{kind}"
                self._add(name, blocks, multiplier_Gn)
                self._own[name] = each
                stack = Stack(blocks=blocks, multiplier_Gn=multiplier_Gn, experts=each.experts)
                self._stacks.setdefault(layer.experts, {}).setdefault(FIELDS[part], []).append(stack)

    def _add(self, name: str, blocks: Blocks, multiplier_Gn: Tensor) -> None:
        self._blocks[name] = blocks
        if multiplier_Gn.numel():  # MXFP4 has powers of two in place of scales
            self.weights[name] = multiplier_Gn

    def _round(self, shard: Shard) -> None:
        """Train the plain numbers of a weight file that are no matrices, rounded as they are stored."""
        names = set(shard.names)
        for name in trained_plain(self.model, self.source, self._sources):
            sources = self._sources[name]
            dtype = TORCH_DTYPES.get(self.source.checkpoint.tensors[sources[0]].dtype)
            if names.issuperset(sources) and dtype is not None:
                self.weights[name] = train_rounded(self.model, name, dtype)
                self._plain.add(name)

    def _stored(self, shard: Shard) -> dict[str, Tensor]:
        """Return the tensors of a weight file as they are stored, by name on disk."""
        file = Checkpoint(path=self.folder, config={}, tensors=read_header(self.folder / shard.file), digest="")
        with file.reader() as reader:
            return {name: reader.read(name) for name in file.tensors}

    @cached_property
    def _typed(self) -> list[tuple[Weight, str]]:
        """The matrices in blocks, as narrow as they are stored, those alike together; and their types."""
        return by_type(at_widths(self.source.weights, self.plan.layers), self.plan.types)

    @cached_property
    def _have_own(self) -> bool:
        """Whether experts of a layer differ in width or in type."""
        return self.plan.ragged or len(self._typed) > len({weight.pattern for weight, _ in self._typed})

    def _in_shard(self, shard: Shard) -> list[tuple[Weight, str]]:
        names = set(shard.names)
        return [(weight, kind) for weight, kind in self._typed if names.issuperset(weight.names)]

    def _outer(self, shard: Shard) -> list[tuple[Weight, str]]:
        """Return the matrices in blocks of a weight file that are no experts', and their types."""
        return [(weight, kind) for weight, kind in self._in_shard(shard) if weight.layer is None]

    def _layers(self, shard: Shard) -> Iterator[tuple[MoELayer, list[tuple[Weight, str]]]]:
        """Yield the MoE layers of a weight file with their matrices in blocks, and their types."""
        typed = self._in_shard(shard)
        for layer in self.source.architecture.layers:
            if own := [(weight, kind) for weight, kind in typed if weight.layer == layer.index]:
                yield layer, own

    def _projections(self, layer: MoELayer, shard: Shard) -> Projections:
        conversions = self._conversions[shard.file]
        return Projections(self.result.model, layer, self.stream.conversion, conversions)


def _stack_name(layer: MoELayer, part: int) -> str:
    return f"{layer.experts}.{FIELDS[part]}"


def trained_plain(model: PreTrainedModel, source: Source, sources: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the parameters of a result that are trained as plain numbers: routers, norms and biases, by name.

    Args:
        model: the result; a meta model will do.
        source: the original.
        sources: name in memory -> names on disk.
    """
    layers = source.architecture.layers
    matrices = {name for weight in source.weights for name in weight.names}
    routers = {name for layer in layers for name, _ in layer.router_tensors}
    owners = tuple(f"{name}." for layer in layers for name in (layer.router, layer.experts) if name is not None)
    return [
        name
        for name, parameter in model.named_parameters()
        if name in sources
        and matrices.isdisjoint(sources[name])
        and (parameter.ndim < 2 or name in routers or name.startswith(owners))
    ]


def block_sizes(
    source: Source,
    stream: Stream,
    plan: Plan,
    shards: Sequence[Shard],
    *,
    target: Target | None = None,
    differ: bool = False,
) -> BlockSizes:
    """Say how large what is trained is, from headers.

    Args:
        source: the original.
        stream: the same.
        plan: which type each matrix has.
        shards: the weight files of the result.
        target: where types are yet to be chosen among those that are priced, how large the result may get; then sizes
            are what they are at most.
        differ: whether experts of a layer differ in width or in type, or may once that is decided.
    """
    whole = by_type(source.weights, plan.types)
    typed = [weight for weight, _ in whole]
    numbers = sum(weight.num_elements for weight in typed)
    narrow = by_type(at_widths(source.weights, plan.layers), plan.types)
    in_blocks = sum(weight.num_bytes(kind) for weight, kind in narrow)
    if target is not None:
        in_blocks = _most_bytes(target, plan.predicted_bytes - in_blocks, numbers)
        # Each type has so many numbers of its own a byte, and a matrix so many at most.
        by_bytes = max(numbers_of(kind) / SIZES[kind][1] for kind in PRICED_TYPES) * in_blocks
        by_weight = sum(
            max(_scales(weight, kind) for wanted in PRICED_TYPES for kind in weight.fittings(wanted))
            for weight in typed
        )
        scales = int(min(by_bytes, by_weight))
    else:
        scales = sum(_scales(weight, kind) for weight, kind in whole)
    layers: dict[int | None, int] = {}
    differ = differ or len(typed) > len({weight.pattern for weight in typed})
    for weight in typed:  # experts that differ are filled up, and put in order
        times = 2 if differ and weight.width_axis is not None else 1
        layers[weight.layer] = layers.get(weight.layer, 0) + times * weight.num_elements
    outer = [weight.num_elements for weight in typed if weight.layer is None]
    elements = {name: info.num_elements for name, info in source.checkpoint.tensors.items()}
    parameters = dict(stream.model.named_parameters())
    trained = trained_plain(stream.model, source, stream.conversion.sources)
    return BlockSizes(
        stored_bytes=in_blocks,
        plain=sum(parameter.numel() for parameter in parameters.values()) - numbers,
        trained_plain=sum(parameters[name].numel() for name in trained),
        scales=scales,
        outer=sum(outer),
        largest_outer=max(outer, default=0),
        largest_layer=max((size for layer, size in layers.items() if layer is not None), default=0),
        largest_file=max(sum(elements[name] for name in shard.names) for shard in shards),
    )  # fmt: skip


def _most_bytes(target: Target, rest: int, numbers: int) -> int:
    """Return the bytes that matrices of so many numbers may take at most; `rest` is what all else takes."""
    if target.budget is not None:
        return parse_bytes(target.budget) - rest
    assert target.bits is not None
    return int(numbers * target.bits / 8)


def _scales(weight: Weight, kind: str) -> int:
    return weight.num_elements // SIZES[unwrapped(kind)][0] * numbers_of(kind)
