"""Weights that compressed-tensors stored, found in the headers of a checkpoint. No torch here.

``config_groups`` say how the weights of a module are stored, ``targets`` which modules those are: names, patterns after
``re:``, or names of classes; ``ignore`` names modules that are stored in full precision. Which class a module has does
not show on disk: a name of a class stands for whatever is packed (compressed-tensors 0.17, ``quantization/quant_args``
and ``utils/match``).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coterie.errors import UnsupportedDtype
from coterie.model.disk.encodings.block_scaled import FP8_DTYPES
from coterie.model.disk.encodings.integers import SCALE_DTYPES
from coterie.model.disk.encodings.packed_integers import PackedIntegers
from coterie.model.disk.quantized_floats import blocked
from coterie.model.disk.quantized_source import PackedTensors, QuantizedSource, short
from coterie.model.disk.tensors import Packed, TensorInfo

#: Formats that are understood; which one a group has may be said by the group alone.
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_STRATEGIES = ("tensor", "channel", "group", "block")

#: What may stand beside a weight, after the name of its module.
_BESIDE = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
#: Scales of activations: they serve arithmetic in few bits only, a full-precision checkpoint has none.
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Targets:
    """Modules that a config names.

    Attributes:
        names: of modules, or of classes.
        patterns: what names of modules begin with.
    """

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, source: QuantizedSource, where: str, told: object) -> _Targets:
        """Read a list of names and patterns."""
        if not isinstance(told, list) or not all(isinstance(target, str) for target in told):
            raise source.wrong(f"says {where} = {short(told)}, expected a list of names")
        patterns = []
        for target in told:
            if target.startswith("re:"):
                try:
                    with warnings.catch_warnings(action="ignore"):
                        patterns.append(re.compile(target.removeprefix("re:")))
                except (re.error, RecursionError, OverflowError) as error:
                    raise source.wrong(
                        f"has in {where} {short(target)}, which is no pattern ({short(str(error))})"
                    ) from None
        return cls(names=frozenset(told), patterns=tuple(patterns))

    def match(self, module: str) -> bool:
        """Tell whether a pattern matches a module's name."""
        return any(pattern.match(module) for pattern in self.patterns)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scheme:
    """How the weights of some modules are stored.

    Attributes:
        name: of the group.
        targets: the modules.
        floats: numbers are 8-bit floats, not integers.
        bits: of a number.
        symmetric: there are no zeros.
        strategy: one of `_STRATEGIES`.
        group: columns that share a scale; None where the strategy is not "group".
        block: rows and columns that share one; None where the strategy is not "block".
        index: columns are in groups in whatever order, which is stored.
    """

    name: str
    targets: _Targets
    floats: bool
    bits: int
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    index: bool


def find_compressed(source: QuantizedSource) -> PackedTensors:
    """Find the weights that a group of the config says are packed.

    Raises:
        UnsupportedDtype: they are packed in a way that is not understood.
        CorruptCheckpoint: config and tensors contradict each other.
    """
    _check_format(source)
    schemes = list(_schemes(source))
    ignored = _Targets.of(source, "ignore", source.settings.get("ignore") or [])
    weights: dict[str, TensorInfo] = {}
    dropped: set[str] = set()
    for name, info in source.tensors.items():
        module, _, leaf = name.rpartition(".")
        plain = leaf == "weight" and info.dtype in ("I8", *FP8_DTYPES)
        if leaf != "weight_packed" and not plain:
            continue
        if module in ignored.names or ignored.match(module):
            raise source.wrong(f"names {module!r} in ignore, and it is stored as {name!r} ({info.dtype})")
        scheme = _scheme_of(source, module, schemes)
        weights[name] = (_floats if scheme.floats else _integers)(source, scheme, module, info)
        companions = (f"{module}.{leaf}" for leaf in (*_BESIDE, *_ACTIVATIONS))
        dropped.update(companion for companion in companions if companion in source.tensors)
    if isinstance(source.settings.get("kv_cache_scheme"), Mapping):
        dropped.update(name for name in source.tensors if name.endswith(_CACHE))
    source.check_none_alone(_BESIDE, dropped)
    return weights, dropped


def _check_format(source: QuantizedSource) -> None:
    """Raise UnsupportedDtype for a format that is not understood, and for what would have to be undone besides."""
    groups = source.settings.get("config_groups")
    parts = [source.settings, *(groups.values() if isinstance(groups, Mapping) else ())]
    for part in parts:
        told = part.get("format") if isinstance(part, Mapping) else None
        if told is not None and told not in _FORMATS:
            raise source.unknown(f"the format {short(told)}; understood are {', '.join(_FORMATS)}")
    sparse = source.settings.get("sparsity_config")
    if sparse and not (isinstance(sparse, Mapping) and sparse.get("format", "dense") == "dense"):
        raise source.unknown(f"a sparsity_config, {short(sparse)}, which is not understood")
    if source.settings.get("transform_config"):
        raise source.unknown("a transform_config: its weights are rotated")


def _schemes(source: QuantizedSource) -> Iterator[_Scheme]:
    """Yield what the config says of weights, group by group."""
    groups = source.settings.get("config_groups")
    if not isinstance(groups, Mapping):
        raise source.wrong("has no config_groups")
    for name, group in groups.items():
        where = f"config_groups.{short(name)}"
        weights = group.get("weights") if isinstance(group, Mapping) else ""
        if not isinstance(group, Mapping) or not isinstance(weights, Mapping | None):
            raise source.wrong(f"says {where} = {short(group)}, expected targets and weights")
        targets = _Targets.of(source, f"{where}.targets", group.get("targets"))
        if weights is not None:  # else activations alone
            yield _scheme(source, where, targets, weights)


def _scheme(source: QuantizedSource, where: str, targets: _Targets, weights: Mapping[str, Any]) -> _Scheme:
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("strategy")
    group, order = weights.get("group_size"), weights.get("actorder")
    if group is not None and (type(group) is not int or group < -1 or group == 0):
        raise source.wrong(f"says group_size = {short(group)} in {where}, expected a whole number above 0, or -1")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if kind not in ("int", "float") or type(bits) is not int or bits not in ((4, 8) if kind == "int" else (8,)):
        raise source.unknown(
            f"{short(bits)} bits of type {short(kind)} in {where}; understood are int of 4 or 8 and float of 8",
        )
    if strategy not in _STRATEGIES or (strategy == "block" and kind == "int"):
        raise source.unknown(f"scales by {short(strategy)} of {kind} in {where}, which is not understood")
    if strategy == "group" and (group is None or group < 1):
        raise source.wrong(f"says group_size = {group} in {where}, and that scales are of groups")
    if order not in (None, True, False, "group", "weight", "dynamic", "static"):
        raise source.unknown(f"actorder = {short(order)} in {where}")
    block = weights.get("block_structure")
    if strategy == "block" and not (
        isinstance(block, list) and len(block) == 2 and all(type(extent) is int and extent > 0 for extent in block)
    ):
        raise source.wrong(f"says block_structure = {short(block)} in {where}, expected two whole numbers above 0")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool) or (kind == "float" and not symmetric):
        raise source.unknown(f"symmetric = {short(symmetric)} of {kind} in {where}")
    return _Scheme(
        name=where, targets=targets, floats=kind == "float", bits=bits, symmetric=symmetric, strategy=strategy,
        group=group if strategy == "group" else None,
        block=(block[0], block[1]) if strategy == "block" and block else None,
        index=strategy == "group" and order in (True, "group", "dynamic"),
    )  # fmt: skip


def _scheme_of(source: QuantizedSource, module: str, schemes: list[_Scheme]) -> _Scheme:
    """Return how a module is stored: as its name says, or a pattern, or a class that any module may have."""
    candidates = [scheme for scheme in schemes if module in scheme.targets.names]
    candidates += [scheme for scheme in schemes if scheme.targets.match(module)]
    candidates += [scheme for scheme in schemes if "Linear" in scheme.targets.names]
    candidates += [scheme for scheme in schemes if any(name.isidentifier() for name in scheme.targets.names)]
    if not candidates:
        raise source.wrong(f"has no group for {module!r}, which is packed")
    return candidates[0]


def _floats(source: QuantizedSource, scheme: _Scheme, module: str, weight: TensorInfo) -> TensorInfo:
    """Describe a weight in 8-bit floats."""
    if weight.dtype not in FP8_DTYPES or f"{module}.weight_zero_point" in source.tensors:
        raise source.misfit(weight, "8-bit floats without zeros were expected")
    block = scheme.block or ((1, scheme.group) if scheme.group else None)
    settings = {} if block is None else {"weight_block_size": list(block)}
    return blocked(replace(source, settings=settings), weight, source.beside(module, "weight_scale"))


def _integers(source: QuantizedSource, scheme: _Scheme, module: str, numbers: TensorInfo) -> TensorInfo:
    """Describe a weight in integers."""
    words = numbers.name.endswith("_packed")
    scale = source.beside(module, "weight_scale")
    zero, index = (source.tensors.get(module + suffix) for suffix in (".weight_zero_point", ".weight_g_idx"))
    if scale.dtype not in SCALE_DTYPES:
        raise source.misfit(scale, f"scales must be one of {', '.join(SCALE_DTYPES)}")
    if len(numbers.shape) != 2 or numbers.num_elements == 0:
        raise source.misfit(numbers, "a matrix was expected")
    if not words and scheme.bits != 8:
        raise source.misfit(numbers, f"numbers of {scheme.bits} bits were expected in words")
    if zero is None and not scheme.symmetric:
        raise source.misfit(numbers, f"it is not symmetric, and {module + '.weight_zero_point'!r} is missing")
    if index is None and scheme.index:
        raise source.misfit(numbers, f"it has an actorder, and {module + '.weight_g_idx'!r} is missing")
    rows = numbers.shape[0]
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.num_elements > 1 else 1
    usual = scale.shape == (rows, groups)
    if not usual and scale.num_elements != 1 and scale.shape != (rows,):
        raise source.misfit(scale, f"scales of {rows} rows were expected")
    shape_there = source.beside(module, "weight_shape") if words else None
    in_32_bits = shape_there is not None and shape_there.dtype == "I32"
    encoding = PackedIntegers(
        bits=scheme.bits, words=words, group=scheme.group, index=index is not None, scales=scale.dtype,
        shapes="I32" if in_32_bits else "I64", scale_shape=None if usual else scale.shape, dtype=source.dtype,
        zeros="none" if zero is None else "plain" if zero.dtype == "I8" else "words",
    )  # fmt: skip
    try:
        shape = encoding.shape_of(numbers.shape, groups)
    except UnsupportedDtype as error:
        raise source.misfit(scale, str(error)) from None
    beside = {"_scale": scale, "_zero_point": zero, "_g_idx": index, "_shape": shape_there}
    stored = {"": numbers} | {suffix: info for suffix, info in beside.items() if info is not None}
    for suffix, (dtype, extents) in encoding.stored(shape).items():
        if (stored[suffix].dtype, stored[suffix].shape) != (dtype, extents):
            raise source.misfit(stored[suffix], f"{dtype} {list(extents)} was expected")
    return TensorInfo(
        name=f"{module}.weight", dtype=source.dtype, shape=shape, shard=numbers.shard,
        packed=Packed(encoding=encoding, stored=stored),
    )  # fmt: skip
