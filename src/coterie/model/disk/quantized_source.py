"""What is known of a quantised checkpoint while it is looked through, and what is found. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from coterie.errors import CorruptCheckpoint, UnsupportedDtype
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

    def wrong(self, what: str) -> CorruptCheckpoint:
        """Return the error that the config says what cannot be."""
        return CorruptCheckpoint(f"{self.where}: quantization_config {what}; fetch config.json again")

    def unknown(self, what: str) -> UnsupportedDtype:
        """Return the error that weights are packed in a way that is not understood."""
        return UnsupportedDtype(
            f"{self.where} is quantised by {self.settings.get('quant_method')} with {what}. Use the full-precision "
            "checkpoint that it was made from"
        )

    def misfit(self, info: TensorInfo, what: str) -> CorruptCheckpoint:
        """Return the error that a tensor is not what config and other tensors want it to be."""
        return CorruptCheckpoint(
            f"{self.where}: {info.name!r} ({info.dtype} {list(info.shape)}) does not fit: {what}; fetch config.json "
            "and all files again"
        )

    def beside(self, module: str, leaf: str) -> TensorInfo:
        """Return the tensor of a packed module that has this name within it.

        Raises:
            CorruptCheckpoint: there is none.
        """
        name = f"{module}.{leaf}"
        if name not in self.tensors:
            raise CorruptCheckpoint(
                f"{self.where}: {module!r} is packed, and {name!r} is missing; fetch all files again"
            )
        return self.tensors[name]

    def check_none_alone(self, leaves: tuple[str, ...], known: Collection[str]) -> None:
        """Raise CorruptCheckpoint for a tensor that belongs to a packed weight and is beside none.

        Args:
            leaves: what such tensors are called within their modules.
            known: those that are beside one.
        """
        for name in sorted(self.tensors):
            if name.rpartition(".")[2] in leaves and name not in known:
                raise CorruptCheckpoint(
                    f"{self.where}: {name!r} belongs to a packed weight, and there is none beside it; fetch all files "
                    "again"
                )


def short(value: object) -> str:
    """Return the beginning of what a config says, in a line."""
    return repr(value)[:80]


#: Stored name of a packed weight -> what it becomes; and the stored names that are no tensors of the view.
PackedTensors = tuple[dict[str, TensorInfo], set[str]]
