"""What is measured of matrices in a run for an allocator that has a meter of its own, and what that takes.

What storing matrices costs the loss, which `coterie-bits` goes by, is kept for other runs: `coterie.compress.prices`.
"""

from __future__ import annotations

from dataclasses import dataclass

from coterie.compress.allocators import ALLOCATORS
from coterie.compress.allocators.problem import load_meter
from coterie.compress.damages import Damages
from coterie.compress.pack_forecast import CODES, seconds_of_type
from coterie.compress.prices import BATCH, ERRORS, HIDDEN, PRICING, Pricing
from coterie.compress.source import Source
from coterie.compress.spectra import WINDOW
from coterie.journal import Run
from coterie.model.disk.encodings.ggml.rounding import ROUNDING_BYTES
from coterie.model.stream.memory import Stage, batch_lines, text_lines, unit_lines
from coterie.model.stream.stream import Stream
from coterie.model.stream.work import BYTES_A_SECOND, speed_of, unit_work
from coterie.profile.calibration import TokenSet
from coterie.progress import StageTime, track

#: Operations that singular values of a window take, by its number of elements and its width.
_SVD = 10

#: Types that experts are rounded to, at most, where their outputs are compared; and one that takes as long as each.
_LADDER, _TYPE = 4, "Q4_K"

#: The step of a run.
_STEP = "measured matrices"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring:
    """A measurement of matrices that can begin.

    Attributes:
        stream: the model.
        source: the same by its headers.
        token_set: the text.
        allocator: whom it is for.
    """

    stream: Stream
    source: Source
    token_set: TokenSet
    allocator: str

    def in_run(self, run: Run) -> Damages:
        """Measure once in a run, whose stream is open; return numbers by name and by what they are."""
        if _STEP not in run.finished:
            meter = load_meter(self.allocator)(
                stream=self.stream, source=self.source, batches=[ids_BS for _, ids_BS in self.token_set.batches(BATCH)],
                counts=list(self.token_set.batch_counts(BATCH)),
            )  # fmt: skip
            measured: dict[str, dict[str, float]] = {}
            for _, some in track(meter.measure(), PRICING, len(self.stream.units)):
                measured |= some
            run.finish(_STEP, files=[], content={"measured": measured})
        content: Damages = run.finished[_STEP].content["measured"]
        return content

    def time(self) -> StageTime:
        """Reckon how long it takes."""
        if self._measures == "losses":
            return self._pricing.time()
        experts = [weight for weight in self.source.weights if weight.kind == "expert"]
        layers, speed = self.source.architecture.layers, speed_of(self.stream.device.type)
        if self._measures == "spectra":
            operations = sum(_SVD * weight.num_elements * min(WINDOW, *weight.shape[-2:]) for weight in experts)
            reading = sum(weight.plain_bytes for weight in experts) / BYTES_A_SECOND
            return StageTime(name=PRICING, seconds=operations / speed + reading, reading=reading)
        tokens = sum(self.token_set.num_tokens.values())
        work = unit_work(self.stream, layers, tokens=tokens, base=True)
        # Experts are computed once more for each type, and each of their projections at most.
        again = sum(2 * 3 * 3 * _LADDER * layer.top_k * layer.hidden_size * layer.width for layer in layers)
        rounding = _LADDER * seconds_of_type(_TYPE) * sum(weight.num_elements for weight in experts)
        seconds = work.total + tokens * again / speed + rounding
        return StageTime(name=PRICING, seconds=seconds, tokens=tokens, reading=work.reading)

    def stages(self) -> tuple[Stage, ...]:
        """Return the memory that each stage takes."""
        if self._measures == "losses":
            return self._pricing.stages()
        layers = self.source.architecture.layers
        if self._measures == "spectra":
            largest = max((4 * weight.num_elements // len(weight.names) for weight in self.source.weights), default=0)
            return (Stage(name="measuring spectra", lines=((ERRORS, 3 * largest),)),)
        tokens, seq_len = sum(self.token_set.num_tokens.values()), self.token_set.seq_len
        batch = batch_lines(self.stream, layers, batch_size=BATCH, seq_len=seq_len, tokens=tokens)
        # What reaches a layer's experts, batch by batch and together, what they put out, and what that is off.
        hidden = (HIDDEN, 4 * 4 * tokens * layers[0].hidden_size)
        one = 4 * 4 * max(3 * layer.hidden_size * layer.width for layer in layers)
        lines = (*unit_lines(self.stream, batch), hidden, (CODES, one + ROUNDING_BYTES), *text_lines(tokens))
        return (Stage(name="measuring outputs of experts", lines=lines),)

    @property
    def _measures(self) -> str:
        return ALLOCATORS[self.allocator].measures

    @property
    def _pricing(self) -> Pricing:
        return Pricing(stream=self.stream, source=self.source, token_set=self.token_set, seed=0)
