"""What a result will weigh: every tensor by name, shape and encoding, before any is made; bytes are their sum.

One accounting serves whoever looks (`coterie.model.arch.inspect`), decides and writes. It is made from a description
that both a checkpoint's headers alone and its derived architecture give: which tensors hang on the experts of a layer,
and along which axes. No torch here.

Legend: E experts of the original, M experts of the result, F expert width, D model width. Names are names on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.structure import Block, check_experts
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.plain import Plain
from coterie.model.disk.encodings.ragged import Ragged
from coterie.model.disk.tensors import Encoding, TensorInfo, bytes_of

if TYPE_CHECKING:
    from coterie.model.arch.conversion import WeightConversion
    from coterie.model.arch.layers import Architecture, MoELayer

Shape = tuple[int, ...]

#: Bytes of layers that are remembered while sizes are searched.
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Names on disk of one layer's tensors that have an expert axis."""

    experts: tuple[str, ...]
    router: tuple[str, ...]


def layer_tensors(
    checkpoint: Checkpoint, layers: tuple[MoELayer, ...], conversion: WeightConversion
) -> tuple[LayerTensors, ...]:
    """Return for each layer the names on disk of its experts' and its router's tensors.

    Raises:
        ArchitectureMismatch: a layer has no expert or no router tensor in the checkpoint.
        CorruptCheckpoint: an expert, or a matrix of one, is missing.
    """
    router_of = {name: layer.index for layer in layers for name, _ in layer.router_tensors}
    experts_of = {layer.experts: layer.index for layer in layers}
    experts: list[list[str]] = [[] for _ in layers]
    routers: list[list[str]] = [[] for _ in layers]
    for disk_name in sorted(checkpoint.tensors):
        memory_name = conversion.memory_names[disk_name]
        if memory_name in router_of:
            routers[router_of[memory_name]].append(disk_name)
        elif (prefix := memory_name.rpartition(".")[0]) in experts_of:
            experts[experts_of[prefix]].append(disk_name)
    for layer, names, router_names in zip(layers, experts, routers, strict=True):
        for kind, listed in (("experts", names), ("router", router_names)):
            if not listed:
                raise ArchitectureMismatch(f"{checkpoint.path}: no tensor of the {kind} of {layer.block} was found")
        # Within a layer, the first number that is not the same everywhere is that of the expert.
        split = [name.split(".") for name in names]
        places = range(min(map(len, split)))
        at_place = [{components[place] for components in split} for place in places]
        numbers = (place for place in places if len(at_place[place]) > 1 and all(map(str.isdecimal, at_place[place])))
        place = next(numbers, None)
        if place is not None:
            check_experts(((name, place) for name in names), layer.num_experts)
    return tuple(
        LayerTensors(experts=tuple(names), router=tuple(others)) for names, others in zip(experts, routers, strict=True)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """What one layer gets. None leaves the width as it is.

    Attributes:
        num_experts: experts, M.
        width: hidden neurons of each.
        widths: hidden neurons of each, where each has its own (M entries); the files then hold it cut to that.
        keeps_rows: the router keeps the rows of all E experts.
    """

    num_experts: int
    width: int | None = None
    widths: tuple[int, ...] | None = None
    keeps_rows: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultTensor:
    """One tensor of a result.

    Attributes:
        name: its name.
        shape: its shape, as it is read.
        encoding: how it is stored.
        num_elements: numbers that are stored of it.
    """

    name: str
    shape: Shape
    encoding: Encoding
    num_elements: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is stored of it."""
        return self.encoding.num_bytes(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedTensor:
    """A tensor of the original whose shape hangs on the experts of its layer, or all alike that hold one expert each.

    Attributes:
        name: its name; with a star in place of the expert's number where each expert has one.
        dtype: its number format.
        shape: its shape in the original.
        expert_axis: the axis along which experts run; None where each expert has one.
        width_axis: the axis along which the width runs, once or (gate and up) several times; None where it does not.
        router: it scores experts: what follows the first E entries along its axis stays.
        extents: entries along the width axis by expert, where those of the original differ already; else None.
    """

    name: str
    dtype: str
    shape: Shape
    expert_axis: int | None
    width_axis: int | None = None
    router: bool = False
    extents: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAccount:
    """One MoE layer of the original.

    Attributes:
        block: its name.
        num_experts: E.
        width: F; None where headers alone do not tell along which axes it runs.
        tensors: what hangs on its experts.
    """

    block: str
    num_experts: int
    width: int | None
    tensors: tuple[SizedTensor, ...]

    def pieces(self, tensor: SizedTensor, size: LayerShape) -> Iterator[tuple[int, Shape]]:
        """Yield (how many, their stored shape) of what the result has of a tensor of this layer, in order of experts.

        Of experts that differ in the original already, the widest are taken to stay.

        Raises:
            Infeasible: widths by expert for experts that are stored in one tensor.
            ArchitectureMismatch: not as many widths as experts, a width that headers do not tell how to change, or more
                of experts that differ.
        """
        count, axis = size.num_experts, tensor.expert_axis
        if size.widths is not None and len(size.widths) != count:
            raise ArchitectureMismatch(f"{self.block}: {len(size.widths)} widths for {count} experts")
        if axis is not None:
            if tensor.router:
                yield (
                    1,
                    _with_extent(
                        tensor.shape, axis, tensor.shape[axis] + (0 if size.keeps_rows else count - self.num_experts)
                    ),
                )
                return
            if size.widths is not None:
                raise Infeasible(
                    f"{self.block}: this family stores all experts of a layer in one tensor ({tensor.name}), which "
                    "cannot hold experts of different widths"
                )
            yield 1, _with_extent(self._narrowed(tensor, size.width), axis, count)
        elif size.widths is not None:
            for width in size.widths:
                yield 1, self._narrowed(tensor, width)
        elif size.width is None and tensor.extents is not None:
            assert tensor.width_axis is not None
            if count > self.num_experts:
                raise ArchitectureMismatch(f"{self.block} has {self.num_experts} experts, which differ, not {count}")
            stay = tensor.extents if count == self.num_experts else sorted(tensor.extents, reverse=True)[:count]
            for extent in stay:
                yield 1, _with_extent(tensor.shape, tensor.width_axis, extent)
        else:
            yield count, self._narrowed(tensor, size.width)

    def results(self, tensor: SizedTensor, size: LayerShape) -> Iterator[ResultTensor]:
        """Yield what the result has of a tensor of this layer; see `pieces` for errors."""
        number, plain = 0, Plain(dtype=tensor.dtype)
        for times, shape in self.pieces(tensor, size):
            full_shape, encoding = shape, cast(Encoding, plain)
            if size.widths is not None and tensor.width_axis is not None:
                full_shape, axis = tensor.shape, tensor.width_axis
                encoding = Ragged(axis=axis, width=shape[axis], full=full_shape[axis], inner=plain)
            for _ in range(times):
                name = tensor.name if tensor.expert_axis is not None else tensor.name.replace("*", str(number))
                yield ResultTensor(name=name, shape=full_shape, encoding=encoding, num_elements=math.prod(shape))
                number += 1

    def _narrowed(self, tensor: SizedTensor, width: int | None) -> Shape:
        if width is None:
            return tensor.shape
        if self.width is None:
            raise ArchitectureMismatch(f"{self.block}: headers alone do not tell along which axes the width runs")
        if tensor.width_axis is None:
            return tensor.shape
        return _with_extent(tensor.shape, tensor.width_axis, tensor.shape[tensor.width_axis] // self.width * width)


class Accounting:
    """Lists the tensors of a result, and adds up their bytes.

    Attributes:
        layers: the MoE layers of the original, in order.
    """

    def __init__(
        self, tensors: Mapping[str, TensorInfo], described: Sequence[tuple[LayerAccount, Sequence[str]]]
    ) -> None:
        """Take a description; `of` and `of_blocks` make one.

        Args:
            tensors: all tensors of the original, by name.
            described: its MoE layers, each with the names of the tensors that it describes. All others stay.
        """
        self.layers = tuple(layer for layer, _ in described)
        in_layers = {name for _, names in described for name in names}
        self._others = tuple(
            ResultTensor(name=name, shape=info.shape, encoding=Plain(dtype=info.dtype), num_elements=info.num_elements)
            for name, info in tensors.items()
            if name not in in_layers
        )
        # A search asks for many sizes of layers that are, but for their names, one and the same.
        kinds = [
            replace(layer, block="", tensors=tuple(replace(tensor, name="") for tensor in layer.tensors))
            for layer in self.layers
        ]
        self._alike = [kinds.index(kind) for kind in kinds]
        self._layer_bytes: dict[tuple[int, LayerShape], int] = {}
        self._other_bytes = sum(tensor.num_bytes for tensor in self._others)
        self._other_elements = sum(tensor.num_elements for tensor in self._others)

    @classmethod
    def of(cls, checkpoint: Checkpoint, architecture: Architecture, conversion: WeightConversion) -> Accounting:
        """Describe a checkpoint by what was derived of it.

        Raises:
            ArchitectureMismatch: tensors lie otherwise on disk than they are said to.
        """
        from coterie.model.arch.experts import width_axes

        memory = {name: tuple(tensor.shape) for name, tensor in architecture.model.state_dict().items()}
        described = []
        for layer, names in zip(
            architecture.layers, layer_tensors(checkpoint, architecture.layers, conversion), strict=True
        ):
            axes = width_axes(architecture.model.get_submodule(layer.experts))
            single: dict[str, TensorInfo] = {}
            tensors: list[SizedTensor] = []
            for name in names.experts:
                info, (_, _, leaf) = checkpoint.tensors[name], conversion.memory_names[name].rpartition(".")
                shape = memory.get(conversion.memory_names[name], ())
                if len(info.shape) == len(shape) - 1:
                    single[name] = info
                    continue
                if info.shape != shape:
                    raise _strange(name, info, f"in memory it is {list(shape)}")
                tensors.append(_sized(name, info, expert_axis=0, width_axis=axes.get(leaf)))
            place = expert_place(single, layer.num_experts)
            for pattern, infos in _by_pattern((info, place) for info in single.values()).items():
                leaf = conversion.memory_names[infos[0].name].rpartition(".")[2]
                # In memory the expert axis comes first.
                axis = axes[leaf] - 1 if leaf in axes else None
                if {(info.shape, info.dtype) for info in infos} != {(infos[0].shape, infos[0].dtype)}:
                    raise _strange(pattern, infos[0], "experts of one layer differ in shape or number format")
                tensors.append(_sized(pattern, infos[0], expert_axis=None, width_axis=axis))
            for tensor in tensors:
                if tensor.width_axis is not None and tensor.shape[tensor.width_axis] % layer.width:
                    raise _strange(tensor.name, tensor, f"axis {tensor.width_axis} is no multiple of {layer.width}")
            router_axes = dict(layer.router_tensors)
            for name in names.router:
                info, axis = checkpoint.tensors[name], router_axes[conversion.memory_names[name]]
                if info.shape != memory[conversion.memory_names[name]]:
                    raise _strange(name, info, f"in memory it is {list(memory[conversion.memory_names[name]])}")
                tensors.append(_sized(name, info, expert_axis=axis, router=True))
            account = LayerAccount(
                block=layer.block, num_experts=layer.num_experts, width=layer.width, tensors=tuple(tensors)
            )
            described.append((account, (*names.experts, *names.router)))
        return cls(checkpoint.tensors, described)

    @classmethod
    def of_blocks(
        cls, tensors: Mapping[str, TensorInfo], blocks: Sequence[Block], inner: Sequence[tuple[int, int]]
    ) -> Accounting:
        """Describe a checkpoint by its headers alone.

        Args:
            tensors: all its tensors, by name.
            blocks: its MoE blocks.
            inner: D and F of each.
        """
        described = []
        for block, (hidden_size, width) in zip(blocks, inner, strict=True):
            sized: list[SizedTensor] = []
            names: list[str] = []
            width_known = True
            if block.fused:
                groups = {info.name: [info] for info in block.experts if info.shape[:1] == (block.num_experts,)}
            else:
                groups = _by_pattern((info, block.number_place(info.name)) for info in block.experts)
            for name, infos in groups.items():
                first, skip = infos[0], int(block.fused)
                names += [info.name for info in infos]
                extents = None
                axis, told = _width_axis(first.shape[skip:], hidden_size, width)
                if any(info.shape != first.shape for info in infos):
                    axis, extents, told = *_extents(name, infos), False
                width_known &= told
                sized.append(
                    _sized(
                        name, first, expert_axis=0 if block.fused else None,
                        width_axis=None if axis is None else axis + skip, extents=extents,
                    )
                )  # fmt: skip
            for name, axis in block.router_axes.items():
                names.append(name)
                sized.append(_sized(name, tensors[name], expert_axis=axis, router=True))
            account = LayerAccount(
                block=block.name,
                num_experts=block.num_experts,
                width=width if width_known else None,
                tensors=tuple(sized),
            )
            described.append((account, names))
        return cls(tensors, described)

    def tensors(self, sizes: Sequence[LayerShape]) -> list[ResultTensor]:
        """Return all tensors of the result when every layer gets its size, sorted by name.

        Raises:
            Infeasible: widths by expert for experts that are stored in one tensor.
            ArchitectureMismatch: a size that the description does not tell how to make.
        """
        listed = list(self._others)
        for layer, size in zip(self.layers, sizes, strict=True):
            for tensor in layer.tensors:
                listed += layer.results(tensor, size)
        return sorted(listed, key=lambda tensor: tensor.name)

    def num_bytes(self, sizes: Sequence[LayerShape]) -> int:
        """Return the bytes of all tensors when every layer gets its size, without listing them."""
        return self._other_bytes + sum(
            self.layer_bytes(index, size) for index, size in zip(range(len(self.layers)), sizes, strict=True)
        )

    def num_elements(self, sizes: Sequence[LayerShape]) -> int:
        """Return the numbers that are stored when every layer gets its size."""
        return self._other_elements + sum(
            _total(layer, size, lambda dtype, shape: math.prod(shape))
            for layer, size in zip(self.layers, sizes, strict=True)
        )

    def expert_elements(self, layer: int, size: LayerShape) -> int:
        """Return the numbers that are stored of a layer's experts when it gets a size, routers not counted."""
        experts = replace(
            self.layers[layer], tensors=tuple(each for each in self.layers[layer].tensors if not each.router)
        )
        return _total(experts, size, lambda dtype, shape: math.prod(shape))

    def layer_bytes(self, layer: int, size: LayerShape) -> int:
        """Return the bytes of what hangs on a layer's experts when it gets a size: experts and router."""
        key = self._alike[layer], size
        if key not in self._layer_bytes:
            if len(self._layer_bytes) >= _REMEMBERED:
                self._layer_bytes.clear()
            self._layer_bytes[key] = _total(self.layers[layer], size, bytes_of)
        return self._layer_bytes[key]

    def expert_bytes(self, layer: int, *, width: int | None = None, keeps_rows: bool = False) -> int:
        """Return the bytes that one more expert of a layer takes, with its row of the router where rows go."""
        one, two = (LayerShape(num_experts=count, width=width, keeps_rows=keeps_rows) for count in (1, 2))
        return self.layer_bytes(layer, two) - self.layer_bytes(layer, one)

    def neuron_bytes(self, layer: int) -> int:
        """Return the bytes that one more hidden neuron of one expert of a layer takes."""
        one, two = (LayerShape(num_experts=1, width=width) for width in (1, 2))
        return self.layer_bytes(layer, two) - self.layer_bytes(layer, one)


def expert_place(names: Iterable[str], num_experts: int) -> int | None:
    """Return which component of the names, between dots, counts the experts of a layer; None when none does."""
    split = [name.split(".") for name in names]
    numbers = set(map(str, range(num_experts)))
    places = range(min(map(len, split), default=0))
    # The last one: with one expert, the number of the layer may look like its own.
    return next((place for place in reversed(places) if {components[place] for components in split} == numbers), None)


def _total(layer: LayerAccount, size: LayerShape, measure: Callable[[str, Shape], int]) -> int:
    return sum(
        times * measure(tensor.dtype, shape) for tensor in layer.tensors for times, shape in layer.pieces(tensor, size)
    )


def _sized(
    name: str,
    info: TensorInfo,
    *,
    expert_axis: int | None,
    width_axis: int | None = None,
    router: bool = False,
    extents: tuple[int, ...] | None = None,
) -> SizedTensor:
    return SizedTensor(
        name=name, dtype=info.dtype, shape=info.shape, expert_axis=expert_axis, width_axis=width_axis, router=router,
        extents=extents,
    )  # fmt: skip


def _by_pattern(placed: Iterable[tuple[TensorInfo, int | None]]) -> dict[str, list[TensorInfo]]:
    """Return tensors that hold one expert each by their name with a star for its number, in order of experts.

    Args:
        placed: each with the component of its name, between dots, that counts experts.
    """
    numbered: dict[str, dict[int, TensorInfo]] = {}
    for info, place in placed:
        components = info.name.split(".")
        if place is None:
            raise _strange(info.name, info, "it holds one expert, but its name has no number of an expert")
        number, components[place] = int(components[place]), "*"
        numbered.setdefault(".".join(components), {})[number] = info
    return {pattern: [infos[number] for number in sorted(infos)] for pattern, infos in numbered.items()}


def _width_axis(shape: Shape, hidden_size: int, width: int) -> tuple[int | None, bool]:
    """Return the axis of one expert's tensor along which the width runs, from extents alone; and whether they tell."""
    if len(shape) == 1 and shape[0] == hidden_size:
        return None, bool(hidden_size % width)
    others = [axis for axis, extent in enumerate(shape) if extent != hidden_size]
    if len(others) != 1 or shape[others[0]] % width:
        return None, not shape
    return others[0], True


def _extents(name: str, infos: list[TensorInfo]) -> tuple[int, tuple[int, ...]]:
    """Return the one axis along which tensors of experts differ, and how long each is."""
    shapes = [info.shape for info in infos]
    axes = [axis for axis, extents in enumerate(zip(*shapes, strict=False)) if len(set(extents)) > 1]
    if len(axes) != 1 or len(set(map(len, shapes))) > 1:
        raise _strange(name, infos[0], "experts of one layer differ in more than their width")
    return axes[0], tuple(shape[axes[0]] for shape in shapes)


def _with_extent(shape: Shape, axis: int, extent: int) -> Shape:
    return (*shape[:axis], extent, *shape[axis + 1 :])


def _strange(name: str, info: TensorInfo | SizedTensor, why: str) -> ArchitectureMismatch:
    return ArchitectureMismatch(f"{name} is {info.dtype} {list(info.shape)} on disk, but {why}; please report it")
