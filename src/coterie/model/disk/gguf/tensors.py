"""The tensors of GGUF files under their names on disk, by the table of `families`, read from right to left.

Nothing is read here but headers: a tensor is a place in a file, a row of experts is a part of a stack, and what lies
there in blocks stays in blocks, wherever its rows go. Only parts of different types, or transposed ones, become numbers
as they are read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from coterie.errors import CorruptCheckpoint, InputError
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.encodings.rearranged import Rearranged
from coterie.model.disk.gguf.families import Family, Row
from coterie.model.disk.gguf.header import PLAIN, StoredTensor
from coterie.model.disk.gguf.names import CUTS, Heads, is_stack, layer_of, pattern_of
from coterie.model.disk.tensors import Encoding, Packed, TensorInfo

log = logging.getLogger(__name__)

#: Number format of blocks that have to become numbers before their rows are put together: nothing is lost in it.
EXACT = "F32"

_Part = tuple[Row, StoredTensor]


def tensors_on_disk(
    family: Family, heads: Heads, num_layers: int, num_behind: int, stored: Mapping[str, StoredTensor], where: str
) -> tuple[dict[str, TensorInfo], dict[str, Encoding]]:
    """Return the tensors that a checkpoint of the family has on disk, and the encodings of those in blocks.

    Args:
        family: the family.
        heads: the model's.
        num_layers: layers that are run.
        num_behind: prediction layers behind them, which are left out.
        stored: what the files hold.
        where: the file, for messages.

    Raises:
        InputError: a tensor that is none of the family's.
        CorruptCheckpoint: a part is missing, or parts do not fit each other.
    """
    groups: dict[str, list[_Part]] = {}
    behind = []
    for tensor in stored.values():
        layer = layer_of(tensor.name)
        if layer is not None and layer >= num_layers + num_behind:
            raise CorruptCheckpoint(
                f"{where}: {tensor.name!r} is in layer {layer}, and there should be {num_layers} and {num_behind} "
                "prediction layers behind them; fetch this file again"
            )
        if layer is not None and layer >= num_layers:
            behind.append(tensor.name)
            continue
        places = list(_places(family, tensor.name))
        if not places:
            raise InputError(
                f"{where}: what the tensor {tensor.name!r} {list(tensor.shape)} is in a {family.model_class} is not "
                "known here; take the checkpoint that the file was made from"
            )
        for disk, row in places:
            groups.setdefault(disk, []).append((row, tensor))
    if behind:
        log.info("%s: %d tensors of prediction layers are left out, such as %s", where, len(behind), behind[0])
    tensors: dict[str, TensorInfo] = {}
    encodings: dict[str, Encoding] = {}
    for disk, parts in groups.items():
        _check_whole(family, disk, parts, where)
        if "{expert}" in disk and len(parts[0][1].shape) != 3:
            shape = list(parts[0][1].shape)
            raise CorruptCheckpoint(
                f"{where}: {parts[0][1].name!r} has the shape {shape}, which is no stack of matrices"
            )
        info, encoding = _put_together(disk, parts, heads, where)
        for single in _experts(info) if "{expert}" in disk else (info,):
            tensors[single.name] = single
        if encoding is not None:
            encodings[disk.replace("{expert}", "*")] = encoding
    return tensors, encodings


def _places(family: Family, name: str) -> Iterator[tuple[str, Row]]:
    """Yield the names on disk of what a tensor of a file is, or is a part of; {expert} stays in them."""
    for row in family.rows:
        if match := pattern_of(row.gguf).fullmatch(name):
            yield row.disk.format(**match.groupdict(), expert="{expert}"), row


def _check_whole(family: Family, disk: str, parts: list[_Part], where: str) -> None:
    """Check that no part of a tensor on disk is missing."""
    template = parts[0][0].disk
    missing = {row.gguf for row in family.rows if row.disk == template} - {row.gguf for row, _ in parts}
    if missing:
        raise CorruptCheckpoint(
            f"{where}: {parts[0][1].name!r} is a part of {disk}, and the other one, {min(missing)}, is missing; fetch "
            "this file again"
        )


def _put_together(disk: str, parts: list[_Part], heads: Heads, where: str) -> tuple[TensorInfo, Encoding | None]:
    """Return a tensor on disk, stored as it is where that can be, and its encoding where it is stored in blocks."""
    cuts = [CUTS[row.cut] for row, _ in parts]
    tensors = [tensor for _, tensor in parts]
    if len(parts) == 1 and cuts[0] == CUTS["whole"]:
        info, kind = _as_stored(tensors[0]), tensors[0].type
        if disk.endswith("_expert_gate.weight") and len(info.shape) == 1:
            info = replace(info, shape=(1, *info.shape))  # a vector there, and a matrix of one row here
        return replace(info, name=disk), None if kind in PLAIN else GgmlBlocks(type=kind)
    stack = (tensors[0].shape or (1,))[0] if is_stack(parts[0][0]) else None
    shape = _shape_on_disk(disk, parts, stack, where)
    takes = tuple(cut.take(shape, heads) for cut in cuts)
    for take, tensor in zip(takes, tensors, strict=True):
        expected = take.shape(*(*shape, 1)[:2]) if len(shape) > 1 else (math.prod(take.shape(shape[0], 1)),)
        if tensor.shape != (*(() if stack is None else (stack,)), *expected):
            raise CorruptCheckpoint(
                f"{where}: {tensor.name!r} has the shape {list(tensor.shape)}, and {disk} {list(shape)} would need "
                f"{list(expected)}; fetch this file again"
            )
    axis = -2 if takes[0].input_first else -1
    kinds = {tensor.type for tensor in tensors}
    [kind, *others] = sorted(kinds)
    in_blocks = not others and kind not in PLAIN and all(take.keeps_blocks(axis) for take in takes)
    encoding = GgmlBlocks(type=kind, axis=axis) if in_blocks else None
    infos = [_as_stored(tensor) if in_blocks or tensor.type in PLAIN else _as_numbers(tensor) for tensor in tensors]
    dtypes = {info.dtype for info in infos}
    dtype = infos[0].dtype if len(dtypes) == 1 else EXACT
    if encoding is not None:
        shape = encoding.stored(shape)[""][1]
    packed = Packed(
        encoding=Rearranged(takes=takes, shape=shape, stack=stack, dtype=dtype),
        stored={str(index): info for index, info in enumerate(infos)},
    )
    whole = shape if stack is None else (stack, *shape)
    return TensorInfo(name=disk, dtype=dtype, shape=whole, shard=tensors[0].shard, packed=packed), encoding


def _shape_on_disk(disk: str, parts: list[_Part], stack: int | None, where: str) -> tuple[int, ...]:
    """Return the shape of a matrix or vector on disk, without the axis of a stack, from its parts' shapes."""
    rows, widths, cut = 0, set(), CUTS["whole"]
    for row, tensor in parts:
        cut = CUTS[row.cut]
        extents = tensor.shape if stack is None else tensor.shape[1:]
        axes = (3,) if cut.stacked else (1, 2)
        if len(extents) not in axes:
            raise CorruptCheckpoint(
                f"{where}: {tensor.name!r} has the shape {list(tensor.shape)}, and a part of {disk} should have "
                f"another number of axes; fetch this file again"
            )
        count, columns = (*extents[-2:], 0)[:2] if len(extents) > 1 else (extents[0], 0)
        if cut.turned:
            count, columns = columns, count
        rows += count * (extents[0] if cut.stacked else 1)
        widths.add(columns)
    if len(widths) > 1:
        raise CorruptCheckpoint(f"{where}: the parts of {disk} have {sorted(widths)} columns; fetch this file again")
    [columns] = widths
    if not columns:
        return (rows,)
    return (columns, rows) if cut.input_first else (rows, columns)


def _as_stored(tensor: StoredTensor) -> TensorInfo:
    """Return a tensor as it lies in the file: plain numbers, or bytes of blocks."""
    dtype, shape = tensor.type, tensor.shape
    if dtype not in PLAIN:
        [(dtype, shape)] = GgmlBlocks(type=tensor.type).stored(shape).values()
    return TensorInfo(
        name=tensor.name, dtype=dtype, shape=shape, shard=tensor.shard, begin=tensor.begin, end=tensor.end
    )


def _as_numbers(tensor: StoredTensor) -> TensorInfo:
    """Return a tensor in blocks as numbers."""
    packed = Packed(encoding=GgmlBlocks(type=tensor.type, dtype=EXACT), stored={"": _as_stored(tensor)})
    return TensorInfo(name=tensor.name, dtype=EXACT, shape=tensor.shape, shard=tensor.shard, packed=packed)


def _experts(info: TensorInfo) -> Iterator[TensorInfo]:
    """Yield the matrices of a stack as tensors of their own."""
    for expert in range(info.shape[0]):
        single = info.slice_rows(expert, expert + 1)
        assert single is not None
        yield replace(single, name=info.name.format(expert=expert), shape=info.shape[1:])


def in_format(info: TensorInfo, dtype: str) -> TensorInfo:
    """Return a tensor whose parts become numbers as they are read, in another number format; others as they are.

    Args:
        info: the tensor.
        dtype: a key of `coterie.model.disk.tensors.DTYPE_BITS`.
    """
    packed = info.packed
    if packed is None or not isinstance(packed.encoding, Rearranged):
        return info
    if not any(stored.packed is not None for stored in packed.stored.values()):
        return info
    return replace(info, dtype=dtype, packed=replace(packed, encoding=replace(packed.encoding, dtype=dtype)))
