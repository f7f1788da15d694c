"""Mixing: from what is known of the sources of a text (`coterie.profile.information`) to the share of each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from coterie.errors import TextError
from coterie.profile.information import Information

#: A source is noise to the model where its perplexity is so many times the median of all sources.
MAX_PERPLEXITY_RATIO = 10.0

#: A source is degenerate where its share of new 4-grams is below this part of the median of all sources.
MIN_NOVELTY_RATIO = 0.25

#: Balancing perplexity raises the share of a source by this factor at most, and lowers it as far.
MAX_TILT = 2.0


def choose_mix(sources: Sequence[Information]) -> tuple[dict[str, float], dict[str, str]]:
    """Choose sources and balance them, guided by IGSP: least 4-gram aggregation, balanced perplexity.

    What a source adds is its share of 4-grams that are new, so that is its weight. Calibration text of high perplexity
    serves general ability and text of low perplexity serves mathematics and code [arXiv 2606.03328], so the weights are
    then tilted towards one end, by at most `MAX_TILT`, until the mean of log perplexity over the mix lies halfway
    between the lowest and the highest source. Sources that are noise or repeat themselves are left out before.

    Args:
        sources: what is known of each.

    Returns:
        Share by domain, in thousandths, and the reason for each domain that is left out.

    Raises:
        TextError: no source is left.
    """
    dropped = _degenerate(sources)
    kept = [source for source in sources if source.domain not in dropped]
    if not kept:
        reasons = "; ".join(f"{domain}: {reason}" for domain, reason in dropped.items())
        raise TextError(f"no source of text is fit for calibration: {reasons}")
    novelty = [1 - source.aggregation for source in kept]
    weights = _tilted(novelty, [source.loss for source in kept])
    whole = sum(weights)
    mix = {source.domain: max(0.001, round(w / whole, 3)) for source, w in zip(kept, weights, strict=True)}
    return mix, dropped


def _degenerate(sources: Sequence[Information]) -> dict[str, str]:
    """Return the reason for each domain that must be left out.

    Low perplexity is no reason: that is what mathematics and code have, and text in a loop shows in its 4-grams.
    """
    usual_loss = statistics.median(source.loss for source in sources)
    usual_novelty = statistics.median(1 - source.aggregation for source in sources)
    reasons: dict[str, str] = {}
    for source in sources:
        if source.loss > usual_loss + math.log(MAX_PERPLEXITY_RATIO):
            ratio = _perplexity(source.loss - usual_loss)
            reasons[source.domain] = f"its perplexity is {ratio:.3g} times the median: noise to this model"
        elif 1 - source.aggregation < MIN_NOVELTY_RATIO * usual_novelty or source.aggregation >= 1:
            reasons[source.domain] = (
                f"{source.aggregation:.1%} of its 4-grams are repeats, where the median is {1 - usual_novelty:.1%}"
            )
    return reasons


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _tilted(weights: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Multiply weights by exp(s (loss - middle)); s brings the mean loss as near the middle as it is allowed to."""
    low, high = min(losses), max(losses)
    if high == low:
        return list(weights)
    # From -1, the source that the model finds easiest, to 1, the hardest.
    places = [(2 * loss - high - low) / (high - low) for loss in losses]

    def tilted(strength: float) -> list[float]:
        return [weight * math.exp(strength * place) for weight, place in zip(weights, places, strict=True)]

    def excess(strength: float) -> float:
        return sum(weight * place for weight, place in zip(tilted(strength), places, strict=True))

    # The excess grows with the strength, so the zero is found by halving.
    weakest, strongest = -math.log(MAX_TILT), math.log(MAX_TILT)
    for _ in range(60):
        middle = (weakest + strongest) / 2
        weakest, strongest = (weakest, middle) if excess(middle) > 0 else (middle, strongest)
    return tilted((weakest + strongest) / 2)
