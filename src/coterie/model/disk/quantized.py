"""Checkpoints stored in 8 or 4 bits, seen as the full-precision checkpoints that they were made from.

Two ways of storing are understood, told apart by ``quantization_config.quant_method`` and the names' suffixes:

- ``fp8``: weights in 8-bit floats with one scale for each block of rows and columns (arXiv:2412.19437, section 3.3.2),
  each row or each matrix; the scale multiplies, though its name often ends in ``_scale_inv``. Weights in 8-bit integers
  with a scale are pairs of 4-bit floats (E2M1).
- ``mxfp4``: pairs of 4-bit floats in groups of 32 along the input axis, each group with a power of two as its scale
  (OCP Microscaling Formats 1.0). Stored output axis first, while the full-precision layout has the input axis first.

Arithmetic is float32, a band of rows at a time; only the result is in the number format that was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tensors import TORCH_NAMES, TensorInfo

#: Number formats that packed tensors can be given out in.
OUTPUT_DTYPES = ("BF16", "F16", "F32")

_FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_FP4_DTYPES = ("I8", "F4")
_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0", "U8")
#: What follows a weight's name in the name of its scale, and what stands in place of ".weight" there.
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_LEAVES = (".scale", ".qscale_weight")
#: Scales of activations: they serve 8-bit arithmetic only, a full-precision checkpoint has none.
_ACTIVATION_SUFFIXES = ("_activation_scale", "_input_scale")
_ACTIVATION_LEAVES = (".activation_scale", ".input_scale", ".qscale_act")

_BAND = 2**19  # elements that are computed at a time: 2 MiB in float32, a few times; the allocator keeps some


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
    where = _Source(where=str(checkpoint.path), tensors=checkpoint.tensors, settings=settings, dtype=chosen)
    packed, dropped = _METHODS[method](where)
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if name in dropped:
            continue
        seen = packed.get(name, info)
        if seen.name in tensors or (seen.name != name and seen.name in checkpoint.tensors):
            raise CorruptCheckpoint(f"{checkpoint.path} has tensor {seen.name!r} twice, packed (as {name!r}) and plain")
        tensors[seen.name] = seen
    return replace(checkpoint, config=_plain_config(checkpoint.config, chosen), tensors=tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedMatrix:
    """A matrix, or a stack of them, stored as small numbers and scales.

    Attributes:
        weight: the stored numbers.
        scale: the stored scales, one for each block of each matrix.
        num_matrices: matrices in the stack, 1 for a single one.
        rows: rows of one matrix, as stored.
        columns: columns of one matrix, unpacked.
        block: rows and columns that share a scale; blocks at the end may be smaller.
        grid: scales along rows and columns of one matrix.
        halved: the numbers are 4-bit floats, two in a byte, the first in the low half.
        transposed: rows and columns change places in the result.
        dtype: number format of the result.
        shape: shape of the result.
    """

    weight: TensorInfo
    scale: TensorInfo
    num_matrices: int
    rows: int
    columns: int
    block: tuple[int, int]
    grid: tuple[int, int]
    halved: bool
    transposed: bool
    dtype: str
    shape: tuple[int, ...]

    def unpack(self, read: Callable[[TensorInfo], Tensor]) -> Tensor:
        """Return the unpacked tensor; `read` reads one tensor as it is stored.

        Raises:
            UnsupportedDtype: a value is too large for the number format that was chosen.
        """
        # Legend: N matrices, R rows, C columns, c columns as stored, g and h blocks along rows and columns, B a band.
        scale_Ngh = _scale_values(read(self.scale)).view(-1, *self.grid).expand(self.num_matrices, -1, -1)
        stored = read(self.weight)
        value_of = _pairs_of_bytes() if self.halved else _values_of_bytes(stored.dtype)
        packed_NRc = stored.view(torch.uint8).view(self.num_matrices, self.rows, -1)
        out = torch.empty(self.shape, dtype=getattr(torch, TORCH_NAMES[self.dtype]))
        if self.transposed:
            out_NRC = out.view(self.num_matrices, self.columns, self.rows).transpose(1, 2)
        else:
            out_NRC = out.view(self.num_matrices, self.rows, self.columns)
        band = max(1, _BAND // self.columns)
        for number in range(self.num_matrices):
            for start in range(0, self.rows, band):
                stop = min(start + band, self.rows)
                # A table is several times faster than torch's own conversion, and serves 4-bit pairs as well.
                bytes_ = packed_NRc[number, start:stop].reshape(-1).to(torch.int32)
                values_BC = value_of.index_select(0, bytes_).view(torch.float32).view(-1, self.columns)
                scale_Bh = scale_Ngh[number, torch.arange(start, stop) // self.block[0]]
                values_BC *= scale_Bh.repeat_interleave(self.block[1], dim=1)[:, : self.columns]
                if self.dtype == "F16" and bool((values_BC.abs() > torch.finfo(torch.float16).max).any()):
                    raise UnsupportedDtype(
                        f"{self.weight.shard}: {self.weight.name!r} reaches {float(values_BC.abs().max()):.4g}, more "
                        "than F16 can hold; choose BF16 or F32"
                    )
                out_NRC[number, start:stop] = values_BC.to(
                    out.dtype
                )  # before it is transposed, which costs by the byte
        return out

    def slice_rows(self, start: int, stop: int) -> PackedMatrix | None:
        """Return how matrices `start` to before `stop` of a stack are made; None for a single matrix."""
        if len(self.shape) < 3:
            return None
        weight = self.weight.slice_rows(start, stop)
        # Scales that all matrices share are read as they are.
        shared = self.scale.num_elements == math.prod(self.grid)
        scale = self.scale if shared else self.scale.slice_rows(start, stop)
        if weight is None or scale is None:
            return None
        count, shape = self.num_matrices // self.shape[0] * (stop - start), (stop - start, *self.shape[1:])
        return replace(self, weight=weight, scale=scale, num_matrices=count, shape=shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """What is known of a quantised checkpoint while it is looked through."""

    where: str
    tensors: Mapping[str, TensorInfo]
    settings: Mapping[str, Any]
    dtype: str


#: Stored name of a packed weight -> what it becomes; and the stored names that are no tensors of the view.
_Found = tuple[dict[str, TensorInfo], set[str]]


def _find_blocks(source: _Source) -> _Found:
    """Find 8-bit (and 4-bit) weights with their scales beside them."""
    found: dict[str, TensorInfo] = {}
    dropped: set[str] = set()
    for name, weight in source.tensors.items():
        if weight.dtype not in (*_FP8_DTYPES, *_FP4_DTYPES):
            continue
        scales = _companions(source.tensors, name, _SCALE_SUFFIXES, _SCALE_LEAVES)
        if not scales and weight.dtype in _FP4_DTYPES:
            continue  # integers that are no weight
        if len(scales) != 1:
            raise CorruptCheckpoint(
                f"{source.where}: tensor {name!r} is {weight.dtype} and should have one tensor of scales, found "
                f"{', '.join(map(repr, scales)) or f'none (looked for {name + _SCALE_SUFFIXES[0]!r})'}"
            )
        found[name] = _blocked(source, weight, source.tensors[scales[0]])
        dropped.update(scales, _companions(source.tensors, name, _ACTIVATION_SUFFIXES, _ACTIVATION_LEAVES))
    lonely = sorted(name for name in source.tensors if name.endswith("_scale_inv") and name not in dropped)
    if lonely:
        raise CorruptCheckpoint(f"{source.where}: {lonely[0]!r} are scales, but there are no 8-bit weights beside them")
    return found, dropped


def _companions(
    tensors: Mapping[str, TensorInfo], name: str, suffixes: tuple[str, ...], leaves: tuple[str, ...]
) -> list[str]:
    """Return the names that exist of those that a companion of a weight can have."""
    names = [name + suffix for suffix in suffixes]
    if name.endswith(".weight"):
        names += [name.removesuffix(".weight") + leaf for leaf in leaves]
    return [candidate for candidate in names if candidate in tensors]


def _blocked(source: _Source, weight: TensorInfo, scale: TensorInfo) -> TensorInfo:
    """Describe one weight with scales in blocks along its last two axes."""

    def wrong(what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{source.where}: {scale.name!r} ({scale.dtype} {scale.shape}) does not fit {weight.name!r} "
            f"({weight.dtype} {weight.shape}): {what}"
        )

    halved = weight.dtype in _FP4_DTYPES
    shape = (*weight.shape[:-1], weight.shape[-1] * 2) if weight.dtype == "I8" and weight.shape else weight.shape
    if scale.dtype not in _SCALE_DTYPES:
        raise wrong(f"scales must be one of {', '.join(_SCALE_DTYPES)}")
    if len(shape) < 2 or math.prod(shape) == 0:
        raise wrong("weights must have two axes or more, and none without extent")
    rows, columns = shape[-2:]
    num_matrices = math.prod(shape[:-2])
    # Whatever number of axes a writer gives to a single scale, or to one scale a matrix.
    given = scale.shape
    if scale.num_elements == 1:
        given = (1, 1)
    elif len(given) == 1 and len(shape) == 3 and given[0] == num_matrices:
        given = (num_matrices, 1, 1)
    if len(given) < 2 or (given[:-2] and given[:-2] != shape[:-2]):
        raise wrong("expected one scale, one a matrix, or one a block of each matrix")
    configured = _block_size(source)
    block = []
    for extent, count, size in zip((rows, columns), given[-2:], configured, strict=True):
        shared = _shared_extent(extent, count, size)
        if shared is None:
            raise wrong(f"{count} scales along an axis of {extent}, weight_block_size is {list(configured)}")
        block.append(shared)
    packed = PackedMatrix(
        weight=weight, scale=scale, num_matrices=num_matrices, rows=rows, columns=columns, block=(block[0], block[1]),
        grid=(given[-2], given[-1]), halved=halved, transposed=False, dtype=source.dtype, shape=shape,
    )  # fmt: skip
    return TensorInfo(name=weight.name, dtype=source.dtype, shape=shape, shard=weight.shard, packed=packed)


def _block_size(source: _Source) -> tuple[int, int]:
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


def _find_groups(source: _Source) -> _Found:
    """Find stacks of matrices stored as ``*_blocks`` (N, rows, groups, bytes) and ``*_scales`` (N, rows, groups)."""
    found: dict[str, TensorInfo] = {}
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
        packed = PackedMatrix(
            weight=blocks, scale=scales, num_matrices=num_matrices, rows=rows, columns=shape[1], block=(1, size * 2),
            grid=(rows, groups), halved=True, transposed=True, dtype=source.dtype, shape=shape,
        )  # fmt: skip
        found[name] = TensorInfo(name=plain, dtype=source.dtype, shape=shape, shard=blocks.shard, packed=packed)
        dropped.add(scales.name)
    return found, dropped


_METHODS: dict[str, Callable[[_Source], _Found]] = {"fp8": _find_blocks, "mxfp4": _find_groups}


def _values_of_bytes(dtype: torch.dtype) -> Tensor:
    """Return the float32 value of each byte read as an 8-bit float."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)


def _pairs_of_bytes() -> Tensor:
    """Return, for each byte, the float32 values of the two E2M1 numbers in it, low half first, as one 64-bit entry."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    value_of = torch.cat((magnitudes, -magnitudes))
    byte = torch.arange(256)
    return torch.stack((value_of[byte & 15], value_of[byte >> 4]), dim=1).view(torch.int64).view(-1)


def _scale_values(scale: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents with a bias of 127, and 255 is no number (E8M0)."""
    if scale.dtype.itemsize > 1:
        return scale.to(torch.float32)
    value_of = torch.exp2(torch.arange(256, dtype=torch.float64) - 127).to(torch.float32)
    value_of[255] = math.nan
    return value_of[scale.view(torch.uint8).to(torch.int32)]


#: Keys under which configs describe how weights are packed.
_CONFIG_KEYS = ("quantization_config", "compression_config")


def _quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a config, or the config of a model within it, says about packing."""
    for key in _CONFIG_KEYS:
        if isinstance(config.get(key), Mapping):
            found: Mapping[str, Any] = config[key]
            return found
    inner = (_quantization_config(value) for value in config.values() if isinstance(value, Mapping))
    return next((found for found in inner if found is not None), None)


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
