"""What it takes to measure what types cost: memory, stage by stage, and time.

Legend: V vocabulary, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from coterie.compress.allocators import Measures
from coterie.compress.allocators.expert_types import SMALL
from coterie.compress.damages import MATRICES, rows_for
from coterie.compress.pack_forecast import CODES, seconds_of_type
from coterie.compress.source import Source
from coterie.compress.spectra import WINDOW
from coterie.compress.weights import PRICED_TYPES, Weight, weights_among
from coterie.model.disk.encodings.ggml.rounding import ROUNDING_BYTES
from coterie.model.stream.loss import logits_bytes
from coterie.model.stream.memory import LOGITS, Stage, batch_lines, head_lines, text_lines, unit_lines
from coterie.model.stream.stream import Stream
from coterie.model.stream.unit import Unit
from coterie.model.stream.work import BYTES_A_SECOND, WITH_GRADIENTS, speed_of, unit_work
from coterie.model.threads import workers_on
from coterie.profile.calibration import TokenSet
from coterie.progress import StageTime

#: What is waited for.
PRICING = "pricing types"

#: Sequences of a batch.
BATCH = 8

#: Names of lines.
ERRORS, HIDDEN, BASES = "what errors weigh", "what comes into the head", "directions that experts share"

#: Operations that singular values of a square window take, by its number of elements and its width.
_SVD = 10

#: Operations that eigenvectors of a square matrix take, by its width to the third power.
_EIGENVECTORS = 10

#: Types that experts are rounded to, at most, where their outputs or their factors are compared, but those for less.
_LADDER = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class PricingForecast:
    """Says what measuring takes.

    Attributes:
        stream: the model.
        source: the same by its headers.
        token_set: the text.
        measures: what is measured, see `coterie.compress.allocators.Allocator.measures`.
        small: whether experts are rounded to the types for less as well.
    """

    stream: Stream
    source: Source
    token_set: TokenSet
    measures: Measures
    small: bool = False

    @property
    def _tokens(self) -> int:
        return sum(self.token_set.num_tokens.values())

    def time(self) -> StageTime:
        """Reckon how long it takes."""
        if self.measures != "losses":
            return self._measuring_experts()
        layers, tokens = self.source.architecture.layers, self._tokens
        work = unit_work(self.stream, layers, tokens=tokens, factor=WITH_GRADIENTS, base=True)
        columns = sum(
            weight.columns * (min(MATRICES, len(weight.names)) if weight.kind == "expert" else 1)
            for weight in self.source.weights
        )
        seconds = columns * sum(rows_for(kind) * seconds_of_type(kind) for kind in PRICED_TYPES)
        rounding = seconds / workers_on(self.stream.device)
        return StageTime(name=PRICING, seconds=work.total + rounding, tokens=tokens, reading=work.reading)

    def _measuring_experts(self) -> StageTime:
        """Reckon how long it takes to measure all experts, whole: what they put out in each type, or their spectra."""
        experts = [weight for weight in self.source.weights if weight.kind == "expert"]
        layers, speed, tokens = self.source.architecture.layers, speed_of(self.stream.device.type), self._tokens
        if self.measures == "spectra":
            operations = sum(_SVD * weight.num_elements * min(WINDOW, *weight.shape[-2:]) for weight in experts)
            reading = sum(weight.plain_bytes for weight in experts) / BYTES_A_SECOND
            return StageTime(name=PRICING, seconds=operations / speed + reading, reading=reading)
        work = unit_work(self.stream, layers, tokens=tokens, base=True)
        kinds = (*["Q4_K"] * _LADDER, *(SMALL if self.small else ()))
        # Experts are computed once more for each type, of each projection at most.
        again = sum(2 * 3 * 3 * len(kinds) * layer.top_k * layer.hidden_size * layer.width for layer in layers)
        rounding = sum(map(seconds_of_type, kinds)) * sum(weight.num_elements for weight in experts)
        seconds = work.total + tokens * again / speed + rounding
        if self.measures == "factors":
            # Of each projection what eigenvectors are of, they themselves, and all experts in their directions.
            products = sum(4 * weight.num_elements for weight in experts) * layers[0].hidden_size
            seconds += (products + sum(3 * _EIGENVECTORS * layer.hidden_size**3 for layer in layers)) / speed
        return StageTime(name=PRICING, seconds=seconds, tokens=tokens, reading=work.reading)

    def stages(self) -> tuple[Stage, ...]:
        """Return the memory that each stage takes."""
        layers, tokens, seq_len = self.source.architecture.layers, self._tokens, self.token_set.seq_len
        if self.measures == "spectra":
            largest = max((4 * weight.num_elements // len(weight.names) for weight in self.source.weights), default=0)
            return (Stage(name="measuring spectra", lines=((ERRORS, 3 * largest),)),)
        if self.measures in ("outputs", "factors"):
            batch = batch_lines(self.stream, layers, batch_size=BATCH, seq_len=seq_len, tokens=tokens)
            # What reaches a layer's experts, in two number formats, what they put out, and what that is off.
            hidden = (HIDDEN, 4 * 4 * tokens * layers[0].hidden_size)
            one = 4 * 4 * max((3 * layer.hidden_size * layer.width for layer in layers), default=0)
            lines = (
                *unit_lines(self.stream, batch),
                hidden,
                (CODES, one + workers_on(self.stream.device) * ROUNDING_BYTES),
                *text_lines(tokens),
            )
            if self.measures == "factors":  # what eigenvectors are of, they themselves, and what finding them takes
                lines = (*lines, (BASES, 4 * 4 * layers[0].hidden_size ** 2))
                return (Stage(name="measuring factors of experts", lines=lines),)
            return (Stage(name="measuring outputs of experts", lines=lines),)
        batch = batch_lines(self.stream, layers, batch_size=BATCH, seq_len=seq_len, tokens=tokens, gradients=True)
        weigh = max(4 * sum(weight.num_elements for weight in self._inner(unit)) for unit in self.stream.units)
        hidden = (HIDDEN, 4 * tokens * layers[0].hidden_size)
        text = text_lines(tokens)
        vocab_size = int(self.stream.model.config.get_text_config().vocab_size)
        logits = logits_bytes(batch_size=BATCH, seq_len=seq_len, vocab_size=vocab_size)
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

    def _inner(self, unit: Unit) -> list[Weight]:
        inner = (each for each in self.source.weights if each.kind != "embedding" and not each.head)
        return weights_among(inner, unit.disk_names)
