"""Checkpoints stored in few bits, seen as the full-precision checkpoints that they were made from.

Three ways of storing are understood, told apart by ``quantization_config.quant_method`` and the names' suffixes:

- ``fp8``: weights in 8-bit floats, or in pairs of 4-bit ones, with one scale for each block of rows and columns, each
  row or each matrix (`coterie.model.disk.encodings.block_scaled`);
- ``mxfp4``: pairs of 4-bit floats in groups along the input axis (`coterie.model.disk.encodings.mxfp4`);
- ``coterie``: what Coterie writes, where the config names the encoding of every weight (`quantization_config`).

No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coterie.errors import CorruptCheckpoint, CoterieError, UnsupportedDtype
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings import encoding_from
from coterie.model.disk.encodings.block_scaled import FP4_DTYPES, FP8_DTYPES, SCALE_DTYPES, BlockScaled
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.encodings.mxfp4 import Mxfp4
from coterie.model.disk.patterns import matching
from coterie.model.disk.tensors import TORCH_NAMES, Encoding, Packed, TensorInfo

#: Number formats that packed tensors can be given out in.
OUTPUT_DTYPES = ("BF16", "F16", "F32")

#: What follows a weight's name in the name of its scale, and what stands in place of ".weight" there.
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_LEAVES = (".scale", ".qscale_weight")
#: Scales of activations: they serve 8-bit arithmetic only, a full-precision checkpoint has none.
_ACTIVATION_SUFFIXES = ("_activation_scale", "_input_scale")
_ACTIVATION_LEAVES = (".activation_scale", ".input_scale", ".qscale_act")


def dequantized(checkpoint: Checkpoint, dtype: str = "BF16") -> Checkpoint:
    """Return a view of a checkpoint whose tensors are in full precision; the same object when nothing is quantised.

    The view has the names, shapes and config of the full-precision checkpoint, the path and digest of the quantised
    one. Its reader unpacks a tensor when it is asked for. Tensors that are stored in full precision stay as they are.

    Args:
        checkpoint: what `Checkpoint.open` returned.
        dtype: number format of the tensors that are unpacked, one of `OUTPUT_DTYPES` or torch's name of one.

    Raises:
        UnsupportedDtype: the checkpoint was quantised by a method that is not understood, or `dtype` is no choice.
        CorruptCheckpoint: scales are missing or do not fit their weights.
    """
    chosen = next((name for name in OUTPUT_DTYPES if dtype in (name, TORCH_NAMES[name])), None)
    if chosen is None:
        choices = ", ".join(TORCH_NAMES[name] for name in OUTPUT_DTYPES)
        raise UnsupportedDtype(f"weights cannot be unpacked to {dtype!r}; choose from {choices}")
    settings = _quantization_config(checkpoint.config)
    if settings is None:
        return checkpoint
    method = str(settings.get("quant_method", "")).lower()
    if method not in _METHODS:
        raise UnsupportedDtype(
            f"{checkpoint.path} is quantised with {method or 'a method that config.json does not name'!r}; understood "
            f"are {' and '.join(_METHODS)}. Use the full-precision checkpoint that it was made from"
        )
    where = _QuantizedSource(where=str(checkpoint.path), tensors=checkpoint.tensors, settings=settings, dtype=chosen)
    packed, dropped = _METHODS[method](where)
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if name in dropped:
            continue
        plain = packed.get(name, info)
        if plain.name in tensors or (plain.name != name and plain.name in checkpoint.tensors):
            raise CorruptCheckpoint(
                f"{checkpoint.path} has tensor {plain.name!r} twice, packed (as {name!r}) and plain"
            )
        tensors[plain.name] = plain
    return replace(checkpoint, config=_plain_config(checkpoint.config, chosen), tensors=tensors)


def as_read(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose weights in encodings of our own have the shapes that they are read with.

    The same object where there are none: how others pack weights may tell no more than their number.

    Raises:
        CorruptCheckpoint: the config and the tensors contradict each other.
    """
    settings = _quantization_config(checkpoint.config)
    own = settings is not None and str(settings.get("quant_method", "")).lower() == OWN_METHOD
    return dequantized(checkpoint) if own else checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class _QuantizedSource:
    """What is known of a quantised checkpoint while it is looked through."""

    where: str
    tensors: Mapping[str, TensorInfo]
    settings: Mapping[str, Any]
    dtype: str


#: Stored name of a packed weight -> what it becomes; and the stored names that are no tensors of the view.
_PackedTensors = tuple[dict[str, TensorInfo], set[str]]


def _find_blocks(source: _QuantizedSource) -> _PackedTensors:
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
        weights[name] = _blocked(source, weight, source.tensors[scales[0]])
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


def _blocked(source: _QuantizedSource, weight: TensorInfo, scale: TensorInfo) -> TensorInfo:
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


def _block_size(source: _QuantizedSource) -> tuple[int, int]:
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


def _find_groups(source: _QuantizedSource) -> _PackedTensors:
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


def quantization_config(encodings: Mapping[str, Encoding]) -> dict[str, Any]:
    """Return what config.json says of weights in encodings of their own; stock loaders refuse it by its method.

    Args:
        encodings: by name on disk, or by pattern with a star for one number in it.
    """
    by_content: dict[str, list[str]] = {}
    for pattern, encoding in encodings.items():
        by_content.setdefault(json.dumps(encoding.config(), sort_keys=True), []).append(pattern)
    groups = [{**json.loads(content), "tensors": sorted(patterns)} for content, patterns in by_content.items()]
    return {"quant_method": OWN_METHOD, "groups": groups}


def _find_own(source: _QuantizedSource) -> _PackedTensors:
    """Find the weights whose encodings the config names."""

    def wrong(what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{source.where}: quantization_config {what}; fetch config.json again")

    groups = source.settings.get("groups")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise wrong("names no groups of tensors")
    encodings: dict[str, GgmlBlocks] = {}
    for group in groups:
        patterns = group.get("tensors")
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise wrong("has a group without a list of tensors")
        content = {key: value for key, value in group.items() if key != "tensors"}
        try:
            encoding = encoding_from(content)
        except (CoterieError, ValueError, TypeError) as error:
            raise wrong(f"names an encoding that cannot be ({error})") from None
        if not isinstance(encoding, GgmlBlocks):
            raise wrong(f"names the encoding {content.get('encoding')!r}, which is no block format")
        if twice := sorted(encodings.keys() & set(patterns)):
            raise wrong(f"names {twice[0]!r} twice")
        encodings |= dict.fromkeys(patterns, encoding)
    weights: dict[str, TensorInfo] = {}
    matched: set[str] = set()
    for name, info in source.tensors.items():
        pattern = matching(name, encodings)
        if pattern is None:
            continue
        matched.add(pattern)
        try:
            shape = encodings[pattern].shape_of(info.shape if info.dtype == "U8" else ())
        except UnsupportedDtype as error:
            raise CorruptCheckpoint(f"{source.where}: {name} is {info.dtype}: {error}") from None
        packed = Packed(encoding=encodings[pattern], stored={"": info})
        weights[name] = TensorInfo(
            name=name, dtype=encodings[pattern].dtype, shape=shape, shard=info.shard, packed=packed
        )
    if lost := sorted(encodings.keys() - matched):
        raise wrong(f"names {lost[0]!r}, and no such tensor is there")
    return weights, set()


#: ``quant_method`` of what Coterie writes.
OWN_METHOD = "coterie"

_METHODS: dict[str, Callable[[_QuantizedSource], _PackedTensors]] = {
    "fp8": _find_blocks, "mxfp4": _find_groups, OWN_METHOD: _find_own,
}  # fmt: skip


#: Keys under which configs describe how weights are packed.
_CONFIG_KEYS = ("quantization_config", "compression_config")


def _quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a config, or the config of a model within it, says about packing."""
    for key in _CONFIG_KEYS:
        if isinstance(config.get(key), Mapping):
            section: Mapping[str, Any] = config[key]
            return section
    inner = (_quantization_config(value) for value in config.values() if isinstance(value, Mapping))
    return next((section for section in inner if section is not None), None)


def _plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config of the full-precision model: nothing about packing, and the number format that was chosen."""
    old = next((config[key] for key in ("dtype", "torch_dtype") if config.get(key)), None)
    plain = _replaced(config, old, TORCH_NAMES[dtype])
    key = "torch_dtype" if "torch_dtype" in plain and "dtype" not in plain else "dtype"
    return plain | {key: TORCH_NAMES[dtype]}


def _replaced(config: Mapping[str, Any], old: str | None, new: str) -> dict[str, Any]:
    """Return a config with the old number format replaced, also in the configs of models within it."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in _CONFIG_KEYS:
            continue
        if isinstance(value, Mapping):
            plain[key] = _replaced(value, old, new)
        else:
            plain[key] = new if key in ("dtype", "torch_dtype") and value is not None and value == old else value
    return plain
