"""Several answers to one prompt, and what they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from coterie.amounts import format_bytes
from coterie.errors import InputError
from coterie.run.batch import Outcome, Wanted
from coterie.run.engine import Runtime, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Several answers to one prompt.

    Attributes:
        texts: their texts, without the prompt.
        tokens: tokens of each.
        prompt_tokens: tokens of the prompt.
        first_seconds: time to the first token.
        seconds: time to the last one.
        hits: share of the experts that were asked for that were in memory.
        bytes_read: bytes of experts that were read.
        sharing: how many times an expert was chosen for each time that it was asked for, behind the prompt: of 1, each
            token asked for its own, as with one answer.
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    prompt_tokens: int
    first_seconds: float
    seconds: float
    hits: float
    bytes_read: int
    sharing: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second, "bytes_per_token": self.bytes_per_token}

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers a second after the first of each."""
        return (sum(self.tokens) - len(self.tokens)) / max(self.seconds - self.first_seconds, 1e-9)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that were read for a token of an answer, those for the prompt among them."""
        return self.bytes_read // max(sum(self.tokens), 1)

    def __str__(self) -> str:
        return (
            f"{self.prompt_tokens} tokens read in {self.first_seconds:.1f} s, {sum(self.tokens)} made in "
            f"{len(self.tokens)} answers at {self.tokens_per_second:.1f} a second; {self.hits:.0%} of experts were in "
            f"memory, {format_bytes(self.bytes_read)} were read ({format_bytes(self.bytes_per_token)} a token); an "
            f"expert that was asked for served {self.sharing:.1f} tokens (1.0 with one answer)"
        )


def generate_answers(
    runtime: Runtime,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    answers: int,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    template: bool = True,
    cancelled: Callable[[], bool] | None = None,
) -> Answers:
    """Go on with a prompt in several ways, as many at a time as the runtime has memory for.

    Args:
        runtime: the model; its `batch` says how many.
        prompt: text, or messages with role and content.
        answers: how many.
        max_tokens: tokens of each at most; the context ends it too.
        sampling: how tokens are chosen; a seed is that of the first answer, and the next ones count on from it.
        template: write the prompt as the model's chat template has it, if it has one.
        cancelled: asked before every layer; ends the generation where it says so.

    Raises:
        InputError: a prompt or a setting that cannot be.
        Cancelled, CorruptCheckpoint, ReadError: see `coterie.run.engine.Runtime.generate`.
    """
    if answers < 1:
        raise InputError(f"--answers {answers} must be 1 or more")
    ids_1S, sampling = runtime.ids(prompt, template=template), sampling or Sampling()
    meter = _Meter(runtime)
    outcomes: list[Outcome] = []
    for begin in range(0, answers, runtime.batch):
        meter.begin()
        outcomes += runtime.generate_batch([
            Wanted(
                ids_1S=ids_1S, max_tokens=max_tokens, sampling=sampling.counted_on(number), on_token=meter.note,
                cancelled=cancelled,
            )
            for number in range(begin, min(answers, begin + runtime.batch))
        ])  # fmt: skip
        meter.end()
    for each in outcomes:
        if each.error is not None:
            raise each.error
    texts = (str(runtime.tokenizer.decode(each.ids, skip_special_tokens=True)) for each in outcomes)
    return meter.answers(tuple(texts), tuple(len(each.ids) for each in outcomes), prompt_tokens=ids_1S.shape[1])


class _Meter:
    """Notes what a generation takes, in turns."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._started = time.perf_counter()
        self._before = runtime.residency.counters
        self._first_seconds = 0.0
        self._chosen = self._asked = 0
        self._in_turn: tuple[int, int] | None = None
        self._turn = self._started

    def begin(self) -> None:
        """Begin a turn, with a prompt."""
        self._turn, self._in_turn = time.perf_counter(), None

    def note(self, token: int, scores_V: Tensor) -> bool:
        """Take a token; what is chosen from now on is not for the prompt."""
        if self._in_turn is None:
            self._first_seconds += time.perf_counter() - self._turn
            self._in_turn = self._now()
        return False

    def end(self) -> None:
        """End a turn."""
        if self._in_turn is not None:
            chosen, asked = self._now()
            self._chosen += chosen - self._in_turn[0]
            self._asked += asked - self._in_turn[1]

    def answers(self, texts: tuple[str, ...], tokens: tuple[int, ...], *, prompt_tokens: int) -> Answers:
        """Return answers with what they took."""
        after = self._runtime.residency.counters
        hits, misses = after.hits - self._before.hits, after.misses - self._before.misses
        return Answers(
            texts=texts, tokens=tokens, prompt_tokens=prompt_tokens, first_seconds=self._first_seconds,
            seconds=time.perf_counter() - self._started, hits=hits / max(hits + misses, 1),
            bytes_read=after.num_bytes - self._before.num_bytes, sharing=self._chosen / max(self._asked, 1),
        )  # fmt: skip

    def _now(self) -> tuple[int, int]:
        """Return how many experts were chosen and asked for so far."""
        counters = self._runtime.residency.counters
        return self._runtime.experts.num_chosen, counters.hits + counters.misses
