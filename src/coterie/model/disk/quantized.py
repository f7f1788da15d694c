"""Checkpoints stored in few bits, seen as the full-precision checkpoints that they were made from.

What is understood is told apart by ``quantization_config.quant_method`` and the names' suffixes:

- ``fp8``: weights in 8-bit floats, or in pairs of 4-bit ones, with one scale for each block of rows and columns, each
  row or each matrix (`coterie.model.disk.encodings.block_scaled`);
- ``mxfp4``: pairs of 4-bit floats in groups along the input axis (`coterie.model.disk.encodings.mxfp4`);
- ``compressed-tensors``: integers of 4 or 8 bits, or 8-bit floats, as its groups say
  (`coterie.model.disk.quantized_compressed`);
- ``gptq``, ``awq``: integers in words, matrices transposed (`coterie.model.disk.quantized_words`);
- ``coterie``: what Coterie writes, where the config names the encoding of every weight, and what is read of GGUF files
  (`coterie.model.disk.encodings.quantization_config`);
- ``coterie-pack``: records that `coterie pack` wrote (`coterie.model.disk.quantized_records`).

No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from coterie.errors import CorruptCheckpoint, CoterieError, UnsupportedDtype
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings import OWN_METHOD, encoding_from
from coterie.model.disk.encodings.bit_planes import BitPlanes
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.encodings.shared_base import BASE, LEFT, RIGHT, SharedBase, base_name, whole_name
from coterie.model.disk.gguf.tensors import in_format
from coterie.model.disk.patterns import matching
from coterie.model.disk.quantized_compressed import find_compressed
from coterie.model.disk.quantized_floats import find_blocks, find_groups
from coterie.model.disk.quantized_records import PACK_METHOD, find_records
from coterie.model.disk.quantized_source import PackedTensors, QuantizedSource
from coterie.model.disk.quantized_words import find_awq, find_gptq
from coterie.model.disk.tensors import TORCH_NAMES, Packed, TensorInfo

#: Number formats that packed tensors can be given out in.
OUTPUT_DTYPES = ("BF16", "F16", "F32")


def dequantized(checkpoint: Checkpoint, dtype: str = "BF16") -> Checkpoint:
    """Return a view of a checkpoint whose tensors are in full precision; the same object when nothing is quantised.

    The view has the names, shapes and config of the full-precision checkpoint, the path and digest of the quantised
    one. Its reader unpacks a tensor when it is asked for. Tensors that are stored in full precision stay as they are.

    Args:
        checkpoint: what `Checkpoint.open` returned.
        dtype: number format of the tensors that are unpacked, one of `OUTPUT_DTYPES` or torch's name of one.

    Raises:
        UnsupportedDtype: the checkpoint was quantised by a method that is not understood or that its config does not
            name, or `dtype` is no choice.
        CorruptCheckpoint: scales are missing or do not fit their weights.
    """
    chosen = next((name for name in OUTPUT_DTYPES if dtype in (name, TORCH_NAMES[name])), None)
    if chosen is None:
        choices = ", ".join(TORCH_NAMES[name] for name in OUTPUT_DTYPES)
        raise UnsupportedDtype(f"weights cannot be unpacked to {dtype!r}; choose from {choices}")
    if any(info.packed is not None for info in checkpoint.tensors.values()):
        tensors = {name: in_format(info, chosen) for name, info in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=tensors)
    if _quantization_config(checkpoint.config) is None:
        _check_not_packed(checkpoint)
        return checkpoint
    packed, dropped = _find(checkpoint, chosen)
    tensors = {}
    for name in {**checkpoint.tensors, **packed}:
        if name in dropped:
            continue
        plain = packed.get(name) or checkpoint.tensors[name]
        if plain.name in tensors or (plain.name != name and plain.name in checkpoint.tensors):
            raise CorruptCheckpoint(
                f"{checkpoint.path} has tensor {plain.name!r} twice, packed (as {name!r}) and plain"
            )
        tensors[plain.name] = plain
    return replace(checkpoint, config=_plain_config(checkpoint.config, chosen), tensors=tensors)


def _check_not_packed(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedDtype where names say that weights are packed; older tools said how in a file of its own."""
    packed = next((name for name in checkpoint.tensors if name.endswith((".qweight", ".weight_packed"))), None)
    if packed is not None:
        raise UnsupportedDtype(
            f"{checkpoint.path} has packed weights, such as {packed!r}, and config.json has no quantization_config: "
            "copy into it what quantize_config.json says, and the quant_method, or use the full-precision checkpoint"
        )


def _find(checkpoint: Checkpoint, dtype: str) -> PackedTensors:
    """Find what is packed in a quantised checkpoint; raises as `dequantized`."""
    settings = _quantization_config(checkpoint.config) or {}
    method = str(settings.get("quant_method", "")).lower()
    if method not in _METHODS:
        *others, last = _METHODS
        raise UnsupportedDtype(
            f"{checkpoint.path} is quantised with {method[:80] or 'a method that config.json does not name'!r}; "
            f"understood are {', '.join(others)} and {last}. Use the full-precision checkpoint that it was made from"
        )
    source = QuantizedSource(where=str(checkpoint.path), tensors=checkpoint.tensors, settings=settings, dtype=dtype)
    return _METHODS[method](source)


def shapes_of_packed(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shapes that packed weights are read with, by the names of what is stored of them.

    Scales and all else that is stored beside a packed weight has the shape (0,). Nothing where nothing is packed, or
    where what is packed cannot be read.
    """
    if _quantization_config(checkpoint.config) is None:
        return {}
    try:
        packed, dropped = _find(checkpoint, OUTPUT_DTYPES[0])
    except (CorruptCheckpoint, UnsupportedDtype):
        return {}
    return dict.fromkeys(dropped, (0,)) | {name: info.shape for name, info in packed.items()}


def is_read_by_us_alone(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint is packed in a way that transformers reads with other packages only, or wrongly.

    So are GGUF files, where rows lie in another order than on disk.
    """
    if any(info.packed is not None for info in checkpoint.tensors.values()):
        return True
    settings = _quantization_config(checkpoint.config)
    method = "" if settings is None else str(settings.get("quant_method", "")).lower()
    return method in _METHODS and method not in _STOCK_METHODS


def as_read(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose weights in encodings of our own have the shapes that they are read with.

    The same object where there are none: how others pack weights may tell no more than their number.

    Raises:
        CorruptCheckpoint: the config and the tensors contradict each other.
    """
    settings = _quantization_config(checkpoint.config)
    own = settings is not None and str(settings.get("quant_method", "")).lower() in (OWN_METHOD, PACK_METHOD)
    return dequantized(checkpoint) if own else checkpoint


def _find_own(source: QuantizedSource) -> PackedTensors:
    """Find the weights whose encodings the config names."""

    def wrong(what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{source.where}: quantization_config {what}; fetch config.json again")

    groups = source.settings.get("groups")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise wrong("names no groups of tensors")
    encodings: dict[str, GgmlBlocks | BitPlanes] = {}
    based: dict[str, SharedBase] = {}
    for group in groups:
        patterns = group.get("tensors")
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise wrong("has a group without a list of tensors")
        content = {key: value for key, value in group.items() if key != "tensors"}
        try:
            encoding = encoding_from({"dtype": source.dtype} | content)  # what is read of GGUF files says none
        except (CoterieError, ValueError, TypeError) as error:
            raise wrong(f"names an encoding that cannot be ({error})") from None
        if not isinstance(encoding, GgmlBlocks | BitPlanes | SharedBase):
            raise wrong(f"names the encoding {content.get('encoding')!r}, which is no block format")
        if twice := sorted((encodings.keys() | based.keys()) & set(patterns)):
            raise wrong(f"names {twice[0]!r} twice")
        if isinstance(encoding, SharedBase):
            based |= dict.fromkeys(patterns, encoding)
        else:
            encodings |= dict.fromkeys(patterns, encoding)
    weights, dropped = _find_based(source, based)
    matched = {matching(info.name, based) for info in weights.values()}
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
    if lost := sorted((encodings.keys() | based.keys()) - matched):
        raise wrong(f"names {lost[0]!r}, and no such tensor is there")
    return weights, dropped


def _find_based(source: QuantizedSource, based: Mapping[str, SharedBase]) -> PackedTensors:
    """Find the experts that are a base and factors, by pattern; raises CorruptCheckpoint where those do not fit."""
    weights: dict[str, TensorInfo] = {}
    dropped: set[str] = set()
    for factor in source.tensors:
        name = whole_name(factor)
        pattern = matching(name, based)
        if pattern is None or name == factor:
            continue
        names = {BASE: base_name(pattern), LEFT: name + LEFT, RIGHT: name + RIGHT}
        if missing := [each for each in names.values() if each not in source.tensors]:
            raise CorruptCheckpoint(
                f"{source.where}: {name!r} is a base and factors, and {missing[0]!r} is missing; fetch all files again"
            )
        stored = {suffix: source.tensors[each] for suffix, each in names.items()}
        encoding, left = based[pattern], stored[LEFT]
        try:
            shape = encoding.shape_of({suffix: (info.dtype, info.shape) for suffix, info in stored.items()})
        except UnsupportedDtype as error:
            raise source.misfit(left, str(error)) from None
        packed = Packed(encoding=encoding, stored=stored)
        weights[left.name] = TensorInfo(name=name, dtype=encoding.dtype, shape=shape, shard=left.shard, packed=packed)
        dropped |= {names[BASE], names[RIGHT]}
    return weights, dropped


_METHODS: dict[str, Callable[[QuantizedSource], PackedTensors]] = {
    "fp8": find_blocks, "mxfp4": find_groups, "compressed-tensors": find_compressed, "gptq": find_gptq,
    "awq": find_awq, OWN_METHOD: _find_own, PACK_METHOD: find_records,
}  # fmt: skip


#: Those that transformers unpacks by itself.
_STOCK_METHODS = ("fp8", "mxfp4")


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
