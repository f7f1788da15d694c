"""Search for better types than a knapsack chose, generation by generation, each a step of the run."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from coterie.compress.allocators.mixed_types import options_of
from coterie.compress.damages import UNDERRATED
from coterie.compress.decide import problem_of, weighed
from coterie.compress.plan import Plan
from coterie.compress.prices import Prices
from coterie.compress.request import Request
from coterie.compress.search.bank import Bank
from coterie.compress.search.divergence import Divergences
from coterie.compress.search.evolve import PATIENCE, Parent, next_generation
from coterie.compress.search.forecast import SEARCHING, SearchForecast
from coterie.compress.search.levels import Ladder, bytes_of, ladder_of
from coterie.compress.source import Source
from coterie.compress.weights import Weight
from coterie.journal import Run
from coterie.model.disk.encodings.ggml import WRAPPED
from coterie.model.stream.stream import Stream
from coterie.profile.calibration import TokenSet
from coterie.profile.text import CalibrationText
from coterie.progress import track

log = logging.getLogger(__name__)

#: Tokens that the last step of the selection looks at; the first of those that are measured.
SEARCH_TOKENS = 16_384

_STEP, _WHOLE = "generation ", "all generations"

#: Types that nothing is brought down to: nearest rounding, which the search goes by, says too little of their damage.
_AVOIDED = frozenset(name + end for name in UNDERRATED for end in ("", WRAPPED))


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A search that can begin.

    Attributes:
        stream: the model.
        source: the same by its headers.
        request: what is asked for.
        token_set: the text.
        forecast: what it takes.
    """

    stream: Stream
    source: Source
    request: Request
    token_set: TokenSet
    forecast: SearchForecast

    def in_run(self, run: Run, plan: Plan, prices: Prices) -> Plan:
        """Return a plan with the best types that are found; the plan itself where none are better.

        Args:
            run: keeps each generation, and goes on after the last; the stream is open.
            plan: what the knapsack chose.
            prices: what it went by.
        """
        if _WHOLE not in run.finished:
            self._search(run, plan, prices)
        types = self._best(run, plan).types
        if types == plan.types:
            return plan
        damage = math.fsum(prices.damages[pattern][kind] for pattern, kind in types.items())
        searched = weighed(self.source, replace(plan, types=types, damage=damage, gap=None))
        assert searched.predicted_bytes <= self._limit(plan), "a search does not spend more bytes"
        return searched

    def _search(self, run: Run, plan: Plan, prices: Prices) -> None:
        weights = [weight for weight in self.source.weights if weight.pattern in plan.types]
        ladders = ladders_of(weights, plan.types, prices.damages)
        room = bytes_of(ladders, plan.types) + self._limit(plan) - plan.predicted_bytes
        ids_NS = torch.cat(list(self.token_set.sequences.values()))
        counts = self.token_set.counts
        divergences = Divergences(
            stream=self.stream, source=self.source, weights=weights, ids_NS=ids_NS,
            counts_NS=None if counts is None else torch.cat(list(counts.values())),
            bank=Bank(run.private),
        )  # fmt: skip
        divergences.read_original()
        if _name(0) not in run.finished:
            [first] = divergences.of([plan.types], range(len(ids_NS)))
            run.finish(_name(0), content={"types": dict(plan.types), "kl": first})
        best, idle = self._best(run, plan), _idle(run)
        for number in track(range(1, self.request.search + 1), SEARCHING, self.request.search):
            if _name(number) in run.finished:
                continue
            if idle >= PATIENCE:
                break
            rng = random.Random(f"{self.request.seed} {number}")
            after = next_generation(best, ladders, room, len(ids_NS), divergences.of, rng)
            gained = after is not best
            best, idle = after, 0 if gained else idle + 1
            content = {"types": dict(best.types), "kl": best.divergence} if gained else {}
            run.finish(_name(number), content=content)
            log.debug("generation %d: KL %.6f", number, best.divergence)
        run.finish(_WHOLE)
        generations = sum(name.startswith(_STEP) for name in run.finished) - 1
        log.info(
            "types: KL(original || rounded to nearest) was %.5f nats a token, and is %.5f after a search of %d "
            "generations (%s tokens of the calibration text)",
            run.finished[_name(0)].content["kl"], best.divergence, generations, f"{ids_NS.numel():,}",
        )  # fmt: skip

    def _limit(self, plan: Plan) -> int:
        """Return the bytes that the result may take."""
        weights = [weight for weight in self.source.weights if weight.pattern in plan.types]
        taken = sum(weight.num_bytes(plan.types[weight.pattern]) for weight in weights)
        beside = plan.predicted_bytes - taken
        numbers = sum(weight.num_elements for weight in weights)
        return beside + problem_of(self.source, self.request).room(num_elements=numbers, beside=beside)

    @staticmethod
    def _best(run: Run, plan: Plan) -> Parent:
        """Return the last generation that gained; types in the order of the plan."""
        *_, last = (step.content for name, step in run.finished.items() if name.startswith(_STEP) and step.content)
        return Parent(types={pattern: last["types"][pattern] for pattern in plan.types}, divergence=last["kl"])


def search_of(
    stream: Stream,
    source: Source,
    request: Request,
    calibration: CalibrationText,
    types: Mapping[str, str],
    tokens: int,
) -> Search:
    """Return a search that can begin.

    Args:
        stream: the model.
        source: the same by its headers.
        request: what is asked for.
        calibration: the text.
        types: those of an outline, for what is said beforehand.
        tokens: how many are drawn at most.
    """
    token_set = calibration.draw(min(SEARCH_TOKENS, tokens), up_to=True)
    forecast = SearchForecast(
        stream=stream, source=source, types=types, token_set=token_set, generations=request.search
    )  # fmt: skip
    return Search(stream=stream, source=source, request=request, token_set=token_set, forecast=forecast)


def ladders_of(
    weights: Sequence[Weight], types: Mapping[str, str], damages: Mapping[str, Mapping[str, float]]
) -> list[Ladder]:
    """Return the levels of matrices.

    Args:
        weights: the matrices.
        types: what they have now.
        damages: what they would cost in each type, nats a token, by pattern.
    """
    return [
        ladder_of(weight.pattern, options_of(weight, damages[weight.pattern]), types[weight.pattern], _AVOIDED)
        for weight in weights
    ]


def _name(number: int) -> str:
    return f"{_STEP}{number}"


def _idle(run: Run) -> int:
    """Return how many of the last generations gained nothing."""
    steps = [bool(step.content) for name, step in run.finished.items() if name.startswith(_STEP)]
    return steps[::-1].index(True)
