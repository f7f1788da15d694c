"""What it takes to store weights in fewer bits: memory, stage by stage, and time; from headers alone.

Legend: E experts, D model width, F expert width, C columns (inputs) of a matrix, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from coterie.compress.allocators import Measures
from coterie.compress.damages import MATRICES, PRICED_TOKENS, PRICED_TYPES, ROWS
from coterie.compress.plan import Plan
from coterie.compress.quantisers import get_quantiser
from coterie.compress.quantisers.gptq import FACTOR_BYTES, HESSIAN_ELEMENTS
from coterie.compress.source import Source
from coterie.compress.spectra import WINDOW
from coterie.compress.weights import Weight, typed, weights_among
from coterie.model.disk.encodings.ggml.rounding import ROUNDING_BYTES
from coterie.model.stream.loss import logits_bytes
from coterie.model.stream.memory import (
    COMPRESS_COPIES,
    LOGITS,
    Line,
    Stage,
    batch_lines,
    head_lines,
    text_lines,
    unit_lines,
)
from coterie.model.stream.stream import Stream
from coterie.model.stream.unit import Unit
from coterie.model.stream.work import BYTES_A_SECOND, WITH_GRADIENTS, speed_of, unit_work
from coterie.profile.measure import Measure
from coterie.progress import StageTime

#: Names of lines.
MOMENTS, FACTORS, CODES, ERRORS, HIDDEN = (
    "sums of what comes in", "factors of Hessians", "choosing codes", "what errors weigh", "what comes into the head"
)  # fmt: skip

#: Seconds that choosing the code of a number takes on one core, by type; entries of a grid take long to find.
SECONDS = {"IQ4_NL": 4e-6, "MXFP4": 4e-6, "IQ2_XXS": 1e-5, "IQ3_XXS": 1.5e-5, "IQ2_XS": 2e-5, "IQ2_S": 4e-5,
           "IQ3_S": 4e-5}  # fmt: skip
_OTHERS = 2.5e-6

#: Operations that singular values of a square window take, by its number of elements and its width.
_SVD = 10

#: Types that experts are rounded to, at most, where their outputs are compared.
_LADDER = 4

#: What is waited for while it is measured what types would cost.
PRICING = "pricing types"


@dataclass(frozen=True, kw_only=True)
class PackForecast:
    """Says what storing weights in fewer bits takes.

    Attributes:
        stream: the model.
        source: the same by its headers.
        plan: which type each matrix gets; of an outline that types are priced for, the one for all.
        measure: the text that goes through.
        priced_by: what is measured of matrices first, so that their types can be chosen, see
            `coterie.compress.allocators.Allocator.measures`; None for nothing.
        max_tokens: tokens that they are priced on, at most.
    """

    stream: Stream
    source: Source
    plan: Plan
    measure: Measure
    priced_by: Measures | None
    max_tokens: int

    def stages(self) -> tuple[Stage, ...]:
        """Return the memory that each stage takes."""
        measure, layers = self.measure, self.source.architecture.layers
        total, seq_len = sum(measure.token_set.num_tokens.values()), measure.token_set.seq_len
        batch = batch_lines(self.stream, layers, batch_size=measure.batch_size, seq_len=seq_len, tokens=total)
        largest = max(self.stream.units, key=lambda unit: _total(self.packing_lines(unit)))
        lines = (*unit_lines(self.stream, batch, copies=COMPRESS_COPIES), *self.packing_lines(largest))
        packing = Stage(name="storing a layer in fewer bits", lines=(*lines, *text_lines(total)))
        return (*(self._pricing_stages() if self.priced_by is not None else ()), packing)

    def packing_lines(self, unit: Unit) -> tuple[Line, ...]:
        """Return what storing the matrices of a unit takes beside the unit and the text that runs through it."""
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
        rows = max(self._together(weights).values())
        return (
            (MOMENTS, 4 * copies * elements),
            (FACTORS, FACTOR_BYTES * max(HESSIAN_ELEMENTS, widest**2)),
            # The numbers that are left to round, what is wanted of them, their values, and both projections as one.
            (CODES, 4 * 4 * rows + ROUNDING_BYTES),
        )

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
            codes = sum(
                weight.num_elements * SECONDS.get(self.plan.types[weight.pattern], _OTHERS) for weight in weights
            )
            operations = 0.0
            for count, size in self.moments(unit):
                share = 1.0 if count == 1 else max((layer.top_k for layer in layers), default=1) / count
                operations += count * (16 * size**3 + 2 * (1 + self._compares) * share * tokens * size**2)
            seconds[unit.name] = codes + operations / speed
        return seconds

    def times(self) -> tuple[StageTime, ...]:
        """Reckon how long pricing types takes; none where that is not done."""
        if self.priced_by is None:
            return ()
        tokens, types = self._priced_tokens(), set(PRICED_TYPES)
        layers = self.source.architecture.layers
        if self.priced_by != "losses":
            return (self._measuring_experts(tokens),)
        work = unit_work(self.stream, layers, tokens=tokens, factor=WITH_GRADIENTS, base=True)
        numbers = sum(
            ROWS * weight.columns * (min(MATRICES, len(weight.names)) if weight.kind == "expert" else 1)
            for weight in self.source.weights
        )
        rounding = numbers * sum(SECONDS.get(name, _OTHERS) for name in types)
        return (StageTime(name=PRICING, seconds=work.total + rounding, tokens=tokens, reading=work.reading),)

    def _measuring_experts(self, tokens: int) -> StageTime:
        """Reckon how long it takes to measure all experts, whole: what they put out in each type, or their spectra."""
        experts = [weight for weight in self.source.weights if weight.kind == "expert"]
        layers, speed = self.source.architecture.layers, speed_of(self.stream.device.type)
        if self.priced_by == "spectra":
            operations = sum(_SVD * weight.num_elements * min(WINDOW, *weight.shape[-2:]) for weight in experts)
            reading = sum(weight.plain_bytes for weight in experts) / BYTES_A_SECOND
            return StageTime(name=PRICING, seconds=operations / speed + reading, reading=reading)
        work = unit_work(self.stream, layers, tokens=tokens, base=True)
        # Experts are computed once more for each type, of each projection at most.
        again = sum(2 * 3 * 3 * _LADDER * layer.top_k * layer.hidden_size * layer.width for layer in layers)
        rounding = _LADDER * _OTHERS * sum(weight.num_elements for weight in experts)
        seconds = work.total + tokens * again / speed + rounding
        return StageTime(name=PRICING, seconds=seconds, tokens=tokens, reading=work.reading)

    @property
    def _compares(self) -> bool:
        assert self.plan.quantiser is not None
        return get_quantiser(self.plan.quantiser[0]).corrects

    def _priced_tokens(self) -> int:
        return min(PRICED_TOKENS, self.max_tokens)

    def _of_unit(self, unit: Unit) -> list[Weight]:
        return weights_among(self._typed, unit.disk_names)

    @cached_property
    def _typed(self) -> list[Weight]:
        return typed(self.source.weights, self.plan.types)

    @staticmethod
    def _together(weights: Sequence[Weight]) -> dict[str, int]:
        """Return numbers of matrices whose codes are chosen together: those of a layer's experts, or one."""
        numbers: dict[str, int] = {}
        for weight in weights:
            key = weight.pattern if weight.layer is None else f"layer {weight.layer}"
            numbers[key] = numbers.get(key, 0) + weight.num_elements
        return numbers

    def _pricing_stages(self) -> tuple[Stage, ...]:
        measure, layers = self.measure, self.source.architecture.layers
        tokens, seq_len = self._priced_tokens(), measure.token_set.seq_len
        if self.priced_by == "spectra":
            largest = max((4 * weight.num_elements // len(weight.names) for weight in self.source.weights), default=0)
            return (Stage(name="measuring spectra", lines=((ERRORS, 3 * largest),)),)
        if self.priced_by == "outputs":
            batch = batch_lines(self.stream, layers, batch_size=PRICED_SEQUENCES, seq_len=seq_len, tokens=tokens)
            # What reaches a layer's experts, in two number formats, what they put out, and what that is off.
            hidden = (HIDDEN, 4 * 4 * tokens * layers[0].hidden_size)
            one = 4 * 4 * max((3 * layer.hidden_size * layer.width for layer in layers), default=0)
            lines = (*unit_lines(self.stream, batch), hidden, (CODES, one + ROUNDING_BYTES), *text_lines(tokens))
            return (Stage(name="measuring outputs of experts", lines=lines),)
        batch = batch_lines(
            self.stream, layers, batch_size=PRICED_SEQUENCES, seq_len=seq_len, tokens=tokens, gradients=True
        )
        weigh = max(4 * sum(weight.num_elements for weight in self._priced(unit)) for unit in self.stream.units)
        hidden = (HIDDEN, 4 * tokens * layers[0].hidden_size)
        text = text_lines(tokens)
        vocab_size = int(self.stream.model.config.get_text_config().vocab_size)
        logits = logits_bytes(batch_size=PRICED_SEQUENCES, seq_len=seq_len, vocab_size=vocab_size)
        heads = max((weight.num_elements for weight in self.source.weights if weight.head), default=0)
        return (
            Stage(
                name="pricing the types of a layer",
                lines=(*unit_lines(self.stream, (*batch, (ERRORS, weigh + weigh // 2))), hidden, *text),
            ),
            Stage(name="the loss and its gradient", lines=(*head_lines(self.stream), (LOGITS, logits), hidden, *text)),
            # Its numbers as stored and in float32, what errors in them weigh, and the sum that one slice adds.
            Stage(name="pricing the head", lines=((ERRORS, 4 * 4 * heads), (HIDDEN, 2 * hidden[1]), *text)),
        )

    def _priced(self, unit: Unit) -> list[Weight]:
        inner = (each for each in self.source.weights if each.kind != "embedding" and not each.head)
        return weights_among(inner, unit.disk_names)


#: Sequences of a batch that types are priced on.
PRICED_SEQUENCES = 8


def _total(lines: Sequence[Line]) -> int:
    return sum(size for _, size in lines)
