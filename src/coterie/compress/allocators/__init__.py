"""Allocators: who decides what each layer gets for the bytes that there are. One file each, one signature.

An allocator is a function ``Problem -> Allocation`` (`coterie.compress.allocators.problem`). A new one is one file here
and one line in the table; a recipe names the one that it wants. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measures = Literal["losses", "outputs", "spectra", "factors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocator:
    """One way to share out bytes.

    Attributes:
        function: where it is, as ``"module:attribute"``.
        targets: the targets that it understands, fields of `coterie.compress.target.Target`.
        does: what becomes of the experts, to follow "recipe NAME".
        instead: what other recipes do that understand other targets, to follow "a recipe that".
        meter: what measures the matrices for it before it chooses their types, as ``"module:attribute"``: called with
            the stream, the source and text, its `measure` yields numbers by name. None where nothing is measured.
        measures: what that takes, for the forecast: "losses" a backward pass, and rounding some rows; "outputs" a
            forward pass, and rounding all experts; "spectra" reading all experts; "factors" a forward pass,
            eigenvectors of all projections, and rounding all experts.
    """

    function: str
    targets: tuple[str, ...]
    does: str
    instead: str
    meter: str | None = None
    measures: Measures = "losses"


#: What becomes of experts where matrices get types, and what other recipes do.
_TYPES = "stores weights in fewer bits and leaves experts alone"
_STRUCTURE = "lowers the number of experts (reap) or their width (heapr)"

ALLOCATORS: dict[str, Allocator] = {
    "alphaq": Allocator(
        function="coterie.compress.allocators.alphaq:allocate",
        targets=("bits", "budget"),
        does=_TYPES,
        instead=_STRUCTURE,
        meter="coterie.compress.allocators.alphaq:meter",
        measures="spectra",
    ),
    "bitsmoe-bits": Allocator(
        function="coterie.compress.allocators.bitsmoe:allocate",
        targets=("bits", "budget"),
        does=_TYPES,
        instead=_STRUCTURE,
        meter="coterie.compress.allocators.bitsmoe:meter",
        measures="factors",
    ),
    "edgemoe": Allocator(
        function="coterie.compress.allocators.edgemoe:allocate",
        targets=("bits", "budget"),
        does=_TYPES,
        instead=_STRUCTURE,
        meter="coterie.compress.allocators.edgemoe:meter",
    ),
    "fewer": Allocator(
        function="coterie.compress.allocators.fewer:allocate",
        targets=("keep", "experts", "budget", "params", "active_params"),
        does="lowers the number of experts and leaves their width alone",
        instead="slims experts, such as heapr",
    ),
    "mxmoe": Allocator(
        function="coterie.compress.allocators.mxmoe:allocate",
        targets=("bits", "budget"),
        does=_TYPES,
        instead=_STRUCTURE,
        meter="coterie.compress.allocators.mxmoe:meter",
        measures="outputs",
    ),
    "narrower": Allocator(
        function="coterie.compress.allocators.narrower:allocate",
        targets=("keep", "width", "budget", "params", "active_params"),
        does="slims experts and leaves their number alone",
        instead="lowers the number of experts, such as mergemoe",
    ),
    "mixed-types": Allocator(
        function="coterie.compress.allocators.mixed_types:allocate",
        targets=("bits", "budget"),
        does=_TYPES,
        instead=_STRUCTURE,
        meter="coterie.compress.damages:DamageMeter",
    ),
    "mixed-widths": Allocator(
        function="coterie.compress.allocators.mixed_widths:allocate",
        targets=("bits", "budget"),
        does="stores weights in fewer bits and gives experts widths of their own",
        instead=_STRUCTURE,
        meter="coterie.compress.damages:DamageMeter",
    ),
    "one-type": Allocator(
        function="coterie.compress.allocators.one_type:allocate",
        targets=("bits", "type", "budget"),
        does=_TYPES,
        instead=_STRUCTURE,
    ),
    "parts": Allocator(
        function="coterie.compress.allocators.parts:allocate",
        targets=("keep", "budget", "params", "active_params"),
        does="cuts experts into parts and chooses their number itself",
        instead=_STRUCTURE,
    ),
    "pmq": Allocator(
        function="coterie.compress.allocators.pmq:allocate",
        targets=("bits", "budget"),
        does=_TYPES,
        instead=_STRUCTURE,
        meter="coterie.compress.allocators.pmq:meter",
        measures="outputs",
    ),
    "ragged": Allocator(
        function="coterie.compress.allocators.ragged:allocate",
        targets=("keep", "width", "budget"),
        does="slims experts and leaves their number alone",
        instead="lowers the number of experts, such as mergemoe",
    ),
}
