"""What is known of a quantised checkpoint while it is looked through, and what is found. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coterie.model.disk.tensors import TensorInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedSource:
    """A quantised checkpoint as its headers and its config describe it.

    Attributes:
        where: the folder, for messages.
        tensors: what is stored, by name on disk.
        settings: ``quantization_config`` of its config.json.
        dtype: number format of what is unpacked, a key of `coterie.model.disk.tensors.DTYPE_BITS`.
    """

    where: str
    tensors: Mapping[str, TensorInfo]
    settings: Mapping[str, Any]
    dtype: str


#: Stored name of a packed weight -> what it becomes; and the stored names that are no tensors of the view.
PackedTensors = tuple[dict[str, TensorInfo], set[str]]
