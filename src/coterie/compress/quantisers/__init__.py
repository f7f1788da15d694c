"""Quantisers: who chooses the codes of weights that are stored in blocks. One file each, one signature.

A quantiser is a function ``(weight_NRC, inputs, kind, **options) -> (bytes (N, R, K), values (N, R, C))`` on matrices
that share a type; `inputs` (`coterie.compress.moments.Inputs`) is what was measured of what comes into them. A new one
is one file here and one line in the table. What it reads is said beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from coterie.errors import InputError, UnknownName

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.compress.moments import Inputs
    from coterie.model.disk.encodings.ggml.block_type import Layout


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

    def __call__(self, weight_NRC: Tensor, inputs: Inputs, kind: Layout, **options: Any) -> tuple[Tensor, Tensor]:
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


def check_quantiser(step: tuple[str, Mapping[str, Any]] | None) -> None:
    """Check the name and the options of the quantiser of a plan, which may have been edited.

    Raises:
        UnknownName: no such quantiser, or no such option of it.
        InputError: an option that is no number; or no quantiser.
    """
    if step is None:
        raise InputError("types are given to weights, and no quantiser that chooses their codes is named")
    name, options = step
    parameters = inspect.signature(load_quantiser(name)).parameters.values()
    known = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in known:
            raise UnknownName(f"option of the quantiser {name}", option, known)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise InputError(f"option {option} of the quantiser {name} is {value!r}: it should be a number from 0 on")
