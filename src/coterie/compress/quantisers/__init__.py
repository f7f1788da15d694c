"""Quantisers: who chooses the codes of weights that are stored in blocks. One file each, one signature.

A quantiser is a function ``(weight_NRC, inputs, kind, **options) -> (bytes (N, R, K), values (N, R, C))`` on matrices
that share a type; `inputs` (`coterie.compress.moments.Inputs`) is what was measured of what comes into them. A new one
is one file here and one line in the table. What it reads is said beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from coterie.errors import UnknownName

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.compress.moments import Inputs
    from coterie.model.disk.encodings.ggml.block_type import BlockType


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiser:
    """One way to choose codes.

    Attributes:
        function: where it is, as ``"module:attribute"``.
        corrects: whether it makes good what the layers before it changed, so that it wants to see the original's too.
    """

    function: str
    corrects: bool = False


QUANTISERS: dict[str, Quantiser] = {
    "nearest": Quantiser(function="coterie.compress.quantisers.nearest:nearest"),
    "gptq": Quantiser(function="coterie.compress.quantisers.gptq:gptq"),
    "corrected-gptq": Quantiser(function="coterie.compress.quantisers.corrected:corrected", corrects=True),
}


class Quantise(Protocol):
    """What a quantiser does."""

    def __call__(self, weight_NRC: Tensor, inputs: Inputs, kind: BlockType, **options: Any) -> tuple[Tensor, Tensor]:
        """Return bytes (N, R, K), uint8, and values (N, R, C), float32."""


def get_quantiser(name: str) -> Quantiser:
    """Return what the table says of a quantiser; raises UnknownName."""
    if name not in QUANTISERS:
        raise UnknownName("quantiser", name, QUANTISERS)
    return QUANTISERS[name]


def load_quantiser(name: str) -> Quantise:
    """Return a quantiser by name; raises UnknownName."""
    module, _, attribute = get_quantiser(name).function.partition(":")
    function: Quantise = getattr(import_module(module), attribute)
    return function
