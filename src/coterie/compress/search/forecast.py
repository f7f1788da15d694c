"""What a search for types takes: memory, stage by stage, disk and time, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coterie.compress.pack_forecast import CODES, seconds_of_type
from coterie.compress.search.divergence import BATCH
from coterie.compress.search.evolve import OFFSPRING, PASSES, SELECTION, sample_sizes
from coterie.compress.source import Source
from coterie.compress.weights import Weight, weights_among
from coterie.model.disk.encodings.ggml.rounding import ROUNDING_BYTES
from coterie.model.stream.likelihood import BATCH_ELEMENTS
from coterie.model.stream.memory import LOGITS, Line, Stage, batch_lines, head_lines, text_lines, total_of, unit_lines
from coterie.model.stream.stream import Stream
from coterie.model.stream.unit import Unit
from coterie.model.stream.work import head_seconds, unit_work
from coterie.model.threads import workers_on
from coterie.profile.calibration import TokenSet
from coterie.progress import StageTime

#: What is waited for.
SEARCHING = "searching types"

#: Name of a line.
ROUNDED = "rounded matrices"

#: Types that each matrix is rounded to, about: its own, and those beside it.
_TYPES = 3

#: Copies of logits of a batch that exist at a time: of both models, one that a head makes, and their logarithms.
_LOGITS_COPIES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchForecast:
    """Says what a search takes.

    Attributes:
        stream: the model.
        source: the same by its headers.
        types: of each matrix, by pattern, before types are chosen: those of an outline.
        token_set: the text.
        generations: how many there are, at most.
    """

    stream: Stream
    source: Source
    types: Mapping[str, str]
    token_set: TokenSet
    generations: int

    @property
    def _weights(self) -> list[Weight]:
        return [weight for weight in self.source.weights if weight.pattern in self.types]

    def time(self) -> StageTime:
        """Reckon how long it takes, should no generation be the last before its time."""
        layers, sequences = self.source.architecture.layers, sum(map(len, self.token_set.sequences.values()))
        looked_at = _most_at_once(sequences)
        # The original once and the first parent; then what each generation looks at.
        tokens = self.token_set.seq_len * (2 * sequences + self.generations * sum(looked_at))
        work = unit_work(self.stream, layers, tokens=tokens, base=True)
        reading = work.reading * PASSES * self.generations
        heads = 2 * head_seconds(self.stream, tokens=tokens)
        numbers = sum(weight.num_elements * seconds_of_type(self.types[weight.pattern]) for weight in self._weights)
        rounding = _TYPES * numbers / workers_on(self.stream.device)
        return StageTime(
            name=SEARCHING, seconds=work.total + reading + heads + rounding, tokens=tokens, reading=reading
        )

    def stages(self) -> tuple[Stage, ...]:
        """Return the memory that each stage takes."""
        layers, seq_len = self.source.architecture.layers, self.token_set.seq_len
        tokens = sum(self.token_set.num_tokens.values())
        batch = batch_lines(self.stream, layers, batch_size=BATCH, seq_len=seq_len, tokens=tokens)
        largest = max(self.stream.units, key=lambda unit: total_of(self._rounding_lines(unit)))
        vocab_size = int(self.stream.model.config.get_text_config().vocab_size)
        elements = min(BATCH * seq_len * vocab_size, max(BATCH_ELEMENTS, 2 * BATCH * vocab_size))
        heads = max((weight.num_elements for weight in self._weights if weight.head), default=0)
        return (
            Stage(
                name="searching the types of a layer",
                lines=(*unit_lines(self.stream, (*batch, *self._rounding_lines(largest))), *text_lines(tokens)),
            ),
            Stage(
                name="comparing predictions in the search",
                lines=(
                    *head_lines(self.stream), (ROUNDED, 2 * 4 * heads), (LOGITS, 4 * _LOGITS_COPIES * elements),
                    *text_lines(tokens),
                ),
            ),
        )  # fmt: skip

    def disk(self) -> dict[str, int]:
        """Return the bytes that are on the disk meanwhile, by what they are."""
        rounded = _TYPES * sum(weight.num_bytes(self.types[weight.pattern]) for weight in self._weights)
        width = self.source.architecture.layers[0].hidden_size
        sequences = sum(map(len, self.token_set.sequences.values()))
        # What a layer receives and puts out of each model, and what the original put out at last.
        states = 4 * width * self.token_set.seq_len * (2 * max(_most_at_once(sequences)) + sequences)
        return {"rounded matrices, while types are searched": rounded + states}

    def _rounding_lines(self, unit: Unit) -> tuple[Line, ...]:
        """Return what rounded matrices of a unit take: by projection, and as the model has them."""
        weights = weights_among(self._weights, unit.disk_names)
        if not weights:
            return ()
        numbers = sum(weight.num_elements for weight in weights)
        one = max(weight.num_elements for weight in weights)
        rounding = 3 * 4 * one + workers_on(self.stream.device) * ROUNDING_BYTES
        return ((ROUNDED, 2 * 4 * numbers), (CODES, rounding))


def _most_at_once(sequences: int) -> list[int]:
    """Return how many sequences go through the model in each step of a generation, of all its models together."""
    models = (OFFSPRING, *(survivors for _, survivors in SELECTION))
    return [count * size for count, size in zip(models, sample_sizes(sequences), strict=True)]
