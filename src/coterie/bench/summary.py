"""Summaries: the cells of one method at one size, over the draws of the calibration text, as one row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

from coterie.evaluate.scorecard import Scorecard
from coterie.model.disk.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean and sample standard deviation over draws; the latter is None for a single one."""

    mean: float
    deviation: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """What a model itself scores.

    Attributes:
        name: its name.
        family: its family, as its config names it.
        digest: digest of its checkpoint.
        num_bytes: bytes of its tensors.
        parameters: number of their elements.
        perplexity: on the test text.
        accuracy: share of the questions that it answers exactly; None without questions.
        domains: perplexity by domain.
    """

    name: str
    family: str
    digest: str
    num_bytes: int
    parameters: int
    perplexity: float | None
    accuracy: float | None
    domains: Mapping[str, float | None]

    @property
    def title(self) -> str:
        """Its name and, where that does not say it, its family."""
        return self.name if self.family in self.name else f"{self.name} ({self.family})"

    @classmethod
    def of(cls, checkpoint: Checkpoint, card: Scorecard) -> Original:
        """Return what the headers and a scorecard of the original say."""
        return cls(
            name=card.model,
            family=str(checkpoint.config.get("model_type", "")),
            digest=card.model_digest,
            num_bytes=card.num_bytes,
            parameters=sum(info.num_elements for info in checkpoint.tensors.values()),
            perplexity=card.overall["perplexity"],
            accuracy=card.overall["accuracy"],
            domains={domain: scores["perplexity"] for domain, scores in card.domains.items()},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method at one size on one model.

    Attributes:
        model: name of the model.
        method: name of the method.
        recipe: name of its recipe.
        router: form of its router.
        removed: share of the expert parameters that was to be removed.
        seeds: draws that were measured; empty where the method cannot do it.
        stock: whether stock loaders load the result.
        reason: why it cannot be done, or failed, where there is no draw.
        num_bytes: bytes of the result, mean over the draws.
        kl: KL divergence from the original in nats.
        agreement: share of tokens with the original's likeliest token.
        accuracy: share of questions answered exactly.
        perplexity_ratio: perplexity divided by the original's.
        seconds: what compressing took, without the profile.
        peak_bytes: the largest peak memory while compressing.
        domain_kl: KL divergence by domain.
        domain_perplexity: perplexity by domain.
    """

    model: str
    method: str
    recipe: str
    router: str
    removed: float
    seeds: tuple[int, ...]
    stock: bool
    reason: str | None
    num_bytes: float | None
    kl: Spread | None
    agreement: Spread | None
    accuracy: Spread | None
    perplexity_ratio: Spread | None
    seconds: Spread | None
    peak_bytes: int | None
    domain_kl: Mapping[str, Spread]
    domain_perplexity: Mapping[str, Spread]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self)


def summarize(cells: Sequence[Mapping[str, Any]], originals: Mapping[str, Scorecard]) -> list[Row]:
    """Return a row for each method, size and model, in the order of the cells."""
    groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["model"], cell["removed"], cell["method"]), []).append(cell)
    return [_row(group, originals[model]) for (model, _, _), group in groups.items()]


def _row(cells: Sequence[Mapping[str, Any]], original: Scorecard) -> Row:
    first = cells[0]
    finished = [cell for cell in cells if cell["status"] == "done"]
    base = original.overall["perplexity"]

    def ratio(cell: Mapping[str, Any]) -> float | None:
        return None if base is None or cell["perplexity"] is None else cell["perplexity"] / base

    domains = finished[0]["domains"] if finished else {}
    peaks = [cell["peak_bytes"] for cell in finished if cell["peak_bytes"] is not None]
    return Row(
        model=first["model"],
        method=first["method"],
        recipe=first["recipe"],
        router=first["router"],
        removed=first["removed"],
        seeds=tuple(cell["seed"] for cell in finished),
        stock=all(cell["loads_with"] == "transformers" for cell in finished),
        reason=None if finished else f"{first['status']}: {first['reason']}",
        num_bytes=statistics.fmean(cell["bytes"] for cell in finished) if finished else None,
        kl=spread(finished, lambda cell: cell["kl"]),
        agreement=spread(finished, lambda cell: cell["agreement"]),
        accuracy=spread(finished, lambda cell: cell["accuracy"]),
        perplexity_ratio=spread(finished, ratio),
        seconds=spread(finished, lambda cell: cell["seconds"]["compress"]),
        peak_bytes=max(peaks, default=None),
        domain_kl=_by_domain(finished, domains, "kl"),
        domain_perplexity=_by_domain(finished, domains, "perplexity"),
    )


def _by_domain(
    cells: Sequence[Mapping[str, Any]], domains: Sequence[str] | Mapping[str, Any], measure: str
) -> dict[str, Spread]:
    spreads = {
        domain: spread([cell["domains"][domain] for cell in cells if domain in cell["domains"]], itemgetter(measure))
        for domain in domains
    }
    return {domain: value for domain, value in spreads.items() if value is not None}


def spread(cells: Sequence[Mapping[str, Any]], value_of: Callable[[Mapping[str, Any]], float | None]) -> Spread | None:
    """Return mean and deviation of a number over cells; None where there is none, or where it was not measured."""
    values = [value for cell in cells if (value := value_of(cell)) is not None]
    if not values:
        return None
    finite = all(map(math.isfinite, values))
    deviation = statistics.stdev(values) if finite and len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation)


def gaps(rows: Sequence[Row], cells: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[float, Spread]]:
    """Return how much more M router rows cost than the original's E rows and a map: their KL minus that of the map.

    Returns:
        (model, method) -> share removed -> mean and deviation over the draws that have both; methods are those whose
        recipe has a mapped form.
    """
    mapped = {
        (cell["model"], cell["recipe"], cell["removed"], cell["seed"]): cell["kl"]
        for cell in cells
        if cell["router"] == "map" and cell["status"] == "done" and cell["kl"] is not None
    }
    by_method: dict[tuple[str, str], dict[float, Spread]] = {}
    for row in rows:
        pairs = [
            {"gap": cell["kl"] - mapped[place]}
            for cell in cells
            if (cell["model"], cell["method"], cell["removed"]) == (row.model, row.method, row.removed)
            and cell["router"] != "map"
            and cell["status"] == "done"
            and cell["kl"] is not None
            and (place := (row.model, row.recipe, row.removed, cell["seed"])) in mapped
        ]
        difference = spread(pairs, lambda pair: pair["gap"])
        if difference is not None:
            by_method.setdefault((row.model, row.method), {})[row.removed] = difference
    return by_method
