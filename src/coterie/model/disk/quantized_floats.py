"""Weights in 8- and 4-bit floats with scales beside them, found in the headers of a checkpoint. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping

from coterie.errors import CorruptCheckpoint
from coterie.model.disk.encodings.block_scaled import FP4_DTYPES, FP8_DTYPES, SCALE_DTYPES, BlockScaled
from coterie.model.disk.encodings.mxfp4 import Mxfp4
from coterie.model.disk.quantized_source import PackedTensors, QuantizedSource
from coterie.model.disk.tensors import Packed, TensorInfo

#: What follows a weight's name in the name of its scale, and what stands in place of ".weight" there.
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_LEAVES = (".scale", ".qscale_weight")
#: Scales of activations: they serve 8-bit arithmetic only, a full-precision checkpoint has none.
_ACTIVATION_SUFFIXES = ("_activation_scale", "_input_scale")
_ACTIVATION_LEAVES = (".activation_scale", ".input_scale", ".qscale_act")


def find_blocks(source: QuantizedSource) -> PackedTensors:
    """Find 8-bit (and 4-bit) weights with their scales beside them."""
    weights: dict[str, TensorInfo] = {}
    dropped: set[str] = set()
    for name, weight in source.tensors.items():
        if weight.dtype not in (*FP8_DTYPES, *FP4_DTYPES):
            continue
        scales = _companions(source.tensors, name, _SCALE_SUFFIXES, _SCALE_LEAVES)
        if not scales and weight.dtype in FP4_DTYPES:
            continue  # integers that are no weight
        if len(scales) != 1:
            raise CorruptCheckpoint(
                f"{source.where}: tensor {name!r} is {weight.dtype} and should have one tensor of scales, found "
                f"{', '.join(map(repr, scales)) or f'none (looked for {name + _SCALE_SUFFIXES[0]!r})'}"
            )
        weights[name] = blocked(source, weight, source.tensors[scales[0]])
        dropped.update(scales, _companions(source.tensors, name, _ACTIVATION_SUFFIXES, _ACTIVATION_LEAVES))
    lonely = sorted(name for name in source.tensors if name.endswith("_scale_inv") and name not in dropped)
    if lonely:
        raise CorruptCheckpoint(f"{source.where}: {lonely[0]!r} are scales, but there are no 8-bit weights beside them")
    return weights, dropped


def _companions(
    tensors: Mapping[str, TensorInfo], name: str, suffixes: tuple[str, ...], leaves: tuple[str, ...]
) -> list[str]:
    """Return the names that exist of those that a companion of a weight can have."""
    names = [name + suffix for suffix in suffixes]
    if name.endswith(".weight"):
        names += [name.removesuffix(".weight") + leaf for leaf in leaves]
    return [candidate for candidate in names if candidate in tensors]


def blocked(source: QuantizedSource, weight: TensorInfo, scale: TensorInfo) -> TensorInfo:
    """Describe one weight with scales in blocks along its last two axes."""

    def wrong(what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{source.where}: {scale.name!r} ({scale.dtype} {scale.shape}) does not fit {weight.name!r} "
            f"({weight.dtype} {weight.shape}): {what}"
        )

    shape = (*weight.shape[:-1], weight.shape[-1] * 2) if weight.dtype == "I8" and weight.shape else weight.shape
    if scale.dtype not in SCALE_DTYPES:
        raise wrong(f"scales must be one of {', '.join(SCALE_DTYPES)}")
    if len(shape) < 2 or math.prod(shape) == 0:
        raise wrong("weights must have two axes or more, and none without extent")
    rows, columns = shape[-2:]
    num_matrices = math.prod(shape[:-2])
    # Whatever number of axes a writer gives to a single scale, or to one scale a matrix.
    scale_shape = scale.shape
    if scale.num_elements == 1:
        scale_shape = (1, 1)
    elif len(scale_shape) == 1 and len(shape) == 3 and scale_shape[0] == num_matrices:
        scale_shape = (num_matrices, 1, 1)
    if len(scale_shape) < 2 or (scale_shape[:-2] and scale_shape[:-2] != shape[:-2]):
        raise wrong("expected one scale, one a matrix, or one a block of each matrix")
    configured = _block_size(source)
    block = []
    for extent, count, size in zip((rows, columns), scale_shape[-2:], configured, strict=True):
        shared = _shared_extent(extent, count, size)
        if shared is None:
            raise wrong(f"{count} scales along an axis of {extent}, weight_block_size is {list(configured)}")
        block.append(shared)
    usual = (*shape[:-2], *scale_shape[-2:])
    encoding = BlockScaled(
        numbers=weight.dtype, scales=scale.dtype, block=(block[0], block[1]), dtype=source.dtype,
        scale_shape=None if scale.shape == usual else scale.shape,
    )  # fmt: skip
    packed = Packed(encoding=encoding, stored=dict(zip(encoding.stored(shape), (weight, scale), strict=True)))
    return TensorInfo(name=weight.name, dtype=source.dtype, shape=shape, shard=weight.shard, packed=packed)


def _block_size(source: QuantizedSource) -> tuple[int, int]:
    """Return rows and columns of a block as the config states them, 0 where it states none."""
    size = source.settings.get("weight_block_size")
    if size is None:
        return 0, 0
    if not isinstance(size, list) or len(size) != 2 or not all(type(extent) is int and extent > 0 for extent in size):
        raise CorruptCheckpoint(f"{source.where}: weight_block_size must be two whole numbers above 0, found {size!r}")
    return size[0], size[1]


def _shared_extent(extent: int, count: int, configured: int) -> int | None:
    """Return how many rows (or columns) share a scale when `extent` of them have `count` scales; None if unclear.

    The config's block counts first. Otherwise the grid must divide the axis into blocks of a power of two: that is how
    4-bit experts (1 x 32) lie in a checkpoint whose config speaks of 128 x 128, and it leaves out grids that were put
    together from two halves with a remainder each, where even division would give wrong blocks without a word.
    """
    if count == 1:
        return extent
    if configured and count == -(-extent // configured):
        return configured
    if count > 0 and extent % count == 0 and (extent // count).bit_count() == 1:
        return extent // count
    return None


def find_groups(source: QuantizedSource) -> PackedTensors:
    """Find stacks of matrices stored as ``*_blocks`` (N, rows, groups, bytes) and ``*_scales`` (N, rows, groups)."""
    stacks: dict[str, TensorInfo] = {}
    dropped: set[str] = set()
    for name, blocks in source.tensors.items():
        if not name.endswith("_blocks") or blocks.dtype != "U8":
            continue
        plain = name.removesuffix("_blocks")
        scales = source.tensors.get(plain + "_scales")
        if (
            scales is None or scales.dtype not in ("U8", "F8_E8M0")
            or len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or not blocks.num_elements
        ):  # fmt: skip
            has = "is missing" if scales is None else f"is {scales.dtype} {scales.shape}"
            raise CorruptCheckpoint(
                f"{source.where}: {name!r} is {blocks.dtype} {blocks.shape}, a stack of matrices in groups, and its "
                f"scales {plain + '_scales'!r} should be U8 {blocks.shape[:-1]}; that tensor {has}"
            )
        num_matrices, rows, groups, size = blocks.shape
        shape = (num_matrices, groups * size * 2, rows)
        encoding = Mxfp4(group=size * 2, scales=scales.dtype, dtype=source.dtype)
        packed = Packed(encoding=encoding, stored=dict(zip(encoding.stored(shape), (blocks, scales), strict=True)))
        stacks[name] = TensorInfo(name=plain, dtype=source.dtype, shape=shape, shard=blocks.shard, packed=packed)
        dropped.add(scales.name)
    return stacks, dropped
