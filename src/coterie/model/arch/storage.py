"""How many weights stored tensors stand for, packed ones too. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coterie.model.arch.structure import integer_entries
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings import OWN_METHOD
from coterie.model.disk.quantized import shapes_of_packed
from coterie.model.disk.quantized_records import PACK_METHOD
from coterie.model.disk.tensors import DTYPE_BITS, TensorInfo

_COMPANION = re.compile(r"scale|zero|g_idx|absmax|quant_map|quant_state|weight_shape")


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """How much of something there is.

    Attributes:
        parameters: weights, as the model computes with them: quantised storage is unpacked, its scales do not count.
        bytes: bytes on disk, scales included.
    """

    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(parameters=self.parameters + other.parameters, bytes=self.bytes + other.bytes)


class Storage:
    """Counts weights in tensors, unpacking what a quantised checkpoint packs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        entries = [value for key, value in config.items() if key in ("quantization_config", "compression_config")]
        self.quantised = bool(entries) and isinstance(entries[0], Mapping)
        self.bits = _quantised_bits(entries[0]) if self.quantised else 16
        #: Shapes of what packed tensors are read as, where that is known.
        self.shapes = shapes_of_packed(checkpoint)
        method = str(entries[0].get("quant_method", "")).lower() if self.quantised else ""
        self.companions = self.quantised and method not in (OWN_METHOD, PACK_METHOD)

    def parameters(self, info: TensorInfo) -> int:
        """Return the weights that a tensor stands for; 0 for the scales and zeros of a quantised one."""
        if info.name in self.shapes:
            return math.prod(self.shapes[info.name])
        if not self.quantised:
            return info.num_elements
        if self.is_companion(info):
            return 0
        packed = info.dtype in ("U8", "I32", "U32") and self.bits < DTYPE_BITS[info.dtype]
        return info.num_elements * DTYPE_BITS[info.dtype] // self.bits if packed else info.num_elements

    def is_companion(self, info: TensorInfo) -> bool:
        """Tell whether a tensor only says how to read another one."""
        if info.name in self.shapes:
            return self.shapes[info.name] == (0,)
        return self.companions and bool(_COMPANION.search(info.name.rpartition(".")[2]) or "quant_state" in info.name)

    def amount(self, infos: Iterable[TensorInfo]) -> Amount:
        """Add up tensors."""
        parameters = size = 0
        for info in infos:
            parameters += self.parameters(info)
            size += info.num_bytes
        return Amount(parameters=parameters, bytes=size)


def _quantised_bits(config: Mapping[str, Any]) -> int:
    """Return the bits of a quantised weight, from the many ways in which quantisers write it."""
    bit_entries = [
        (path, value)
        for path, value in integer_entries(config)
        if path[-1] in ("bits", "num_bits", "w_bit", "wbits")
        and not any("activation" in component for component in path)
    ]
    bit_entries.sort(key=lambda entry: "weights" not in entry[0])
    if bit_entries:
        return bit_entries[0][1]
    told = " ".join(f"{key} {value}" for key, value in config.items() if value).lower()
    return 4 if re.search(r"fp4|4bit true|int4|awq|gptq", told) else 8
