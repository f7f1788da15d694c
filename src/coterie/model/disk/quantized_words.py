"""Weights that GPTQ's and AWQ's tools stored in 32-bit words, found in the headers of a checkpoint. No torch here.

Both write ``qweight``, ``qzeros`` and ``scales`` in place of ``weight``, GPTQ ``g_idx`` as well; which of them it was,
and the bits, only config.json says (AutoGPTQ, ``quantization/config``; AutoAWQ, ``models/_config``).
"""

from __future__ import annotations

from collections.abc import Callable

from coterie.errors import UnsupportedDtype
from coterie.model.disk.encodings.awq import Awq
from coterie.model.disk.encodings.gptq import BITS, Gptq
from coterie.model.disk.encodings.integers import SCALE_DTYPES, WORD
from coterie.model.disk.quantized_source import PackedTensors, QuantizedSource, short
from coterie.model.disk.tensors import Packed, TensorInfo

#: Formats of GPTQ, and what was subtracted from their zeros.
_OFFSETS = {"gptq": 1, "gptq_v2": 0}

_BESIDE = ("qzeros", "scales", "g_idx")


def find_gptq(source: QuantizedSource) -> PackedTensors:
    """Find the weights of GPTQ's tools.

    Raises:
        UnsupportedDtype: they are packed in a way that is not understood.
        CorruptCheckpoint: config and tensors contradict each other.
    """
    told = source.settings.get("checkpoint_format", source.settings.get("format")) or "gptq"
    if not isinstance(told, str) or told.lower() not in _OFFSETS or source.settings.get("is_marlin_format"):
        told = "marlin" if source.settings.get("is_marlin_format") else told
        raise source.unknown(f"the format {short(told)}; understood are {' and '.join(_OFFSETS)}")
    offset = _OFFSETS[told.lower()]
    bits = source.settings.get("bits")
    if type(bits) is not int or bits not in BITS:
        raise source.unknown(f"{short(bits)} bits; understood are {', '.join(map(str, BITS))}")
    group, ordered = _group_size(source, "group_size"), source.settings.get("desc_act")
    if not isinstance(ordered, bool | None):
        raise source.wrong(f"says desc_act = {short(ordered)}, expected true or false")
    own = bool(source.settings.get("dynamic"))  # modules may have bits and groups of their own

    def describe(numbers: TensorInfo, scales: TensorInfo, module: str) -> tuple[Gptq, dict[str, TensorInfo]]:
        groups, rows = scales.shape
        zeros, index = source.beside(module, "qzeros"), source.tensors.get(f"{module}.g_idx")
        bits_here, group_here = bits, group
        if own and rows:
            bits_here = next((each for each in BITS if zeros.shape == (groups, rows * each // WORD)), bits)
            columns = numbers.shape[0] * WORD // bits_here
            if groups and -(-columns // (group or columns)) != groups and columns % groups == 0:
                group_here = columns // groups
        if index is None and ordered:
            raise source.misfit(numbers, f"it has desc_act, and {module + '.g_idx'!r} is missing")
        encoding = Gptq(
            bits=bits_here, group=group_here, offset=offset, index=index is not None, ordered=not ordered,
            scales=scales.dtype, dtype=source.dtype,
        )  # fmt: skip
        return encoding, {"_zeros": zeros} | ({} if index is None else {"_g_idx": index})

    return _find(source, describe)


def find_awq(source: QuantizedSource) -> PackedTensors:
    """Find the weights of AWQ's tools.

    Raises:
        UnsupportedDtype: they are packed in a way that is not understood.
        CorruptCheckpoint: config and tensors contradict each other.
    """
    told = source.settings.get("version", source.settings.get("checkpoint_format")) or "gemm"
    if not isinstance(told, str) or told.lower() != "gemm":
        raise source.unknown(f"the version {short(told)}; understood is gemm")
    if source.settings.get("backend", "autoawq") not in (None, "autoawq"):
        raise source.unknown(f"the backend {short(source.settings['backend'])}; understood is autoawq")
    bits = source.settings.get("bits", source.settings.get("w_bit", 4))
    if type(bits) is not int or bits != 4:
        raise source.unknown(f"{short(bits)} bits; understood are 4")
    if source.settings.get("zero_point", True) is not True:
        raise source.unknown(f"zero_point = {short(source.settings['zero_point'])}; understood is true")
    group = _group_size(source, "group_size" if "group_size" in source.settings else "q_group_size")

    def describe(numbers: TensorInfo, scales: TensorInfo, module: str) -> tuple[Awq, dict[str, TensorInfo]]:
        encoding = Awq(group=group, scales=scales.dtype, dtype=source.dtype)
        return encoding, {"_zeros": source.beside(module, "qzeros")}

    return _find(source, describe)


def _group_size(source: QuantizedSource, key: str) -> int | None:
    """Return how many columns share a scale; None for all."""
    size = source.settings.get(key)
    if type(size) is not int or size < -1 or size == 0:
        raise source.wrong(f"says {key} = {short(size)}, expected a whole number above 0, or -1")
    return None if size == -1 else size


def _find(
    source: QuantizedSource, describe: Callable[[TensorInfo, TensorInfo, str], tuple[Gptq | Awq, dict[str, TensorInfo]]]
) -> PackedTensors:
    """Find the weights in words.

    Args:
        source: what is looked through.
        describe: tells the encoding of a weight from its numbers, its scales and the name of its module, and what is
            stored beside those.
    """
    weights: dict[str, TensorInfo] = {}
    dropped: set[str] = set()
    for name, numbers in source.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "qweight":
            continue
        scales = source.beside(module, "scales")
        for info in (numbers, scales):
            if len(info.shape) != 2 or info.num_elements == 0:
                raise source.misfit(info, "a matrix was expected")
        if scales.dtype not in SCALE_DTYPES:
            raise source.misfit(scales, f"scales must be one of {', '.join(SCALE_DTYPES)}")
        encoding, others = describe(numbers, scales, module)
        shape = encoding.shape_of(numbers.shape)
        try:
            expected = encoding.stored(shape)
        except UnsupportedDtype as error:
            raise source.misfit(numbers, str(error)) from None
        stored = {"": numbers, "_scales": scales} | others
        for suffix, (dtype, extents) in expected.items():
            if (stored[suffix].dtype, stored[suffix].shape) != (dtype, extents):
                raise source.misfit(stored[suffix], f"{dtype} {list(extents)} was expected beside {name!r}")
        weights[name] = TensorInfo(
            name=f"{module}.weight", dtype=source.dtype, shape=shape, shard=numbers.shard,
            packed=Packed(encoding=encoding, stored=stored),
        )  # fmt: skip
        dropped.update(f"{module}.{beside}" for beside in _BESIDE)
    source.check_none_alone(_BESIDE, dropped)
    return weights, dropped
