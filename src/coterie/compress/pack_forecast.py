"""What it takes to store weights in fewer bits: memory, stage by stage, and time; from headers alone.

Legend: E experts, D model width, F expert width, C columns (inputs) of a matrix, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from coterie.compress.plan import Plan
from coterie.compress.quantisers import get_quantiser
from coterie.compress.quantisers.gptq import FACTOR_BYTES, HESSIAN_ELEMENTS
from coterie.compress.shared_base import extra_bytes, operations
from coterie.compress.source import Source
from coterie.compress.weights import Weight, typed, weights_among
from coterie.model.disk.encodings.ggml import unwrapped
from coterie.model.disk.encodings.ggml.rounding import ROUNDING_BYTES
from coterie.model.disk.encodings.shared_base import SharedBaseType
from coterie.model.stream.memory import (
    COMPRESS_COPIES,
    Line,
    Stage,
    batch_lines,
    text_lines,
    total_of,
    unit_lines,
)
from coterie.model.stream.stream import Stream
from coterie.model.stream.unit import Unit
from coterie.model.stream.work import speed_of
from coterie.model.threads import workers_on
from coterie.profile.measure import Measure

#: Names of lines.
MOMENTS, FACTORS, CODES = "sums of what comes in", "factors of Hessians", "choosing codes"
NARROWING = "experts at their widths"
SHARING = "base and factors of experts"

#: Seconds that choosing the code of a number takes on one core, by type; entries of a grid take long to find.
SECONDS = {
    "IQ2_XXS": 2e-6,
    "IQ3_XXS": 2.5e-6,
    "IQ2_XS": 3e-6,
    "IQ2_S": 4e-6,
    "IQ3_S": 4e-6,
    "IQ1_M": 1e-5,
    "IQ1_S": 1e-5,
}
_OTHERS = 5e-7


def seconds_of_type(name: str) -> float:
    """Return the seconds that choosing the code of a number takes on one core."""
    return SECONDS.get(unwrapped(name), _OTHERS)


@dataclass(frozen=True, kw_only=True)
class PackForecast:
    """Says what storing weights in fewer bits takes.

    Attributes:
        stream: the model.
        source: the same by its headers.
        plan: which type each matrix gets; of an outline that types are priced for, the one for all.
        measure: the text that goes through.
        narrows: whether experts get widths of their own, or may get them once that is decided.
    """

    stream: Stream
    source: Source
    plan: Plan
    measure: Measure
    narrows: bool = False

    def stages(self) -> tuple[Stage, ...]:
        """Return the memory that each stage takes."""
        measure, layers = self.measure, self.source.architecture.layers
        total, seq_len = sum(measure.token_set.num_tokens.values()), measure.token_set.seq_len
        batch = batch_lines(self.stream, layers, batch_size=measure.batch_size, seq_len=seq_len, tokens=total)
        largest = max(self.stream.units, key=lambda unit: total_of(self.choosing_lines(unit)))
        sums, *choosing = self.choosing_lines(largest) or ((MOMENTS, 0),)
        # Codes are chosen when the text has run through; what came in is summed up before, and there all the time.
        lines = (*unit_lines(self.stream, max(batch, choosing, key=total_of), copies=COMPRESS_COPIES), sums)
        packing = Stage(name="storing a layer in fewer bits", lines=(*lines, *text_lines(total)))
        return (packing,)

    def choosing_lines(self, unit: Unit) -> tuple[Line, ...]:
        """Return what choosing the codes of a unit takes beside the unit, the sums of what comes in first."""
        weights = self._of_unit(unit)
        if not weights:
            return ()
        sums = list(self.moments(unit))
        hessians = [(count, size) for count, size in sums if count > 1]
        copies = 2 if self._compares else 1
        elements = sum(count * size**2 for count, size in sums)
        # Sums of experts are mixed with those of the layer, and put side by side, before codes are chosen.
        elements += 2 * max((count * size**2 for count, size in hessians), default=0)
        widest = max((size for _, size in sums), default=max(weight.columns for weight in weights))
        rows, workers = max(self._together(weights).values()), workers_on(self.stream.device)
        return (
            (MOMENTS, 4 * copies * elements),
            (FACTORS, workers * FACTOR_BYTES * max(HESSIAN_ELEMENTS, widest**2)),
            # The numbers that are left to round, what is wanted of them, and their values in parts and as one.
            (CODES, 4 * (2 + copies) * rows + workers * ROUNDING_BYTES),
            *self._narrowing_lines(rows, hessians, widest),
            *self._sharing_lines(weights, workers),
        )

    def _narrowing_lines(self, rows: int, hessians: Sequence[tuple[int, int]], widest: int) -> tuple[Line, ...]:
        """Return what it takes to narrow experts: those of a layer, their sums, and one of them in float64."""
        if not self.narrows:
            return ()
        sums = max((count * size**2 for count, size in hessians), default=0)
        return ((NARROWING, 4 * rows + 4 * (1 + self._compares) * sums + 6 * 8 * widest**2),)

    def _sharing_lines(self, weights: Sequence[Weight], workers: int) -> tuple[Line, ...]:
        """Return what it takes to factor experts that share a base, see `coterie.compress.shared_base`."""
        sharing = [weight for weight in weights if SharedBaseType.parse(self.plan.types[weight.pattern])]
        return ((SHARING, extra_bytes(sharing, workers)),) if sharing else ()

    def moments(self, unit: Unit) -> Sequence[tuple[int, int]]:
        """Return (how many, columns) of the sums that are made while text runs through a unit."""
        weights, layers = self._of_unit(unit), self.source.architecture.layers
        sums = [(1, weight.columns) for weight in weights if weight.kind == "linear" and not weight.head]
        for index in sorted({weight.layer for weight in weights if weight.layer is not None}):
            layer = layers[index]
            sums += [(1, layer.hidden_size), (layer.num_experts, layer.hidden_size), (layer.num_experts, layer.width)]
        return sums

    def seconds(self) -> Mapping[str, float]:
        """Reckon how long choosing codes takes, and factoring and summing what comes in, by the unit's name."""
        measure, layers = self.measure, self.source.architecture.layers
        speed, tokens = speed_of(self.stream.device.type), sum(measure.token_set.num_tokens.values())
        seconds: dict[str, float] = {}
        for unit in self.stream.units:
            weights = self._of_unit(unit)
            codes = sum(weight.num_elements * seconds_of_type(self.plan.types[weight.pattern]) for weight in weights)
            work = 0.0
            for count, size in self.moments(unit):
                share = 1.0 if count == 1 else max((layer.top_k for layer in layers), default=1) / count
                work += count * (16 * size**3 + 2 * (1 + self._compares) * share * tokens * size**2)
            for weight in weights:
                if (shared := SharedBaseType.parse(self.plan.types[weight.pattern])) is not None:
                    work += operations(weight, shared.rank)
            seconds[unit.name] = codes / workers_on(self.stream.device) + work / speed
        return seconds

    @property
    def _compares(self) -> bool:
        assert self.plan.quantiser is not None
        return get_quantiser(self.plan.quantiser[0]).corrects

    def _of_unit(self, unit: Unit) -> list[Weight]:
        return weights_among(self._typed, unit.disk_names)

    @cached_property
    def _typed(self) -> list[Weight]:
        return typed(self.source.weights, self.plan.types)

    @staticmethod
    def _together(weights: Sequence[Weight]) -> dict[str, int]:
        """Return numbers of matrices whose codes are chosen together: one, or gate and up of a layer's experts."""
        numbers: dict[str, int] = {}
        of_layer: dict[int, list[int]] = {}
        for weight in weights:
            if weight.layer is None:
                numbers[weight.pattern] = weight.num_elements
            else:
                of_layer.setdefault(weight.layer, []).append(weight.num_elements)
        for layer, each in of_layer.items():  # down projections, which are no larger than others, go by themselves
            numbers[f"layer {layer}"] = sum(each) - (min(each) if len(each) > 1 else 0)
        return numbers
