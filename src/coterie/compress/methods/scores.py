"""Scores: how much a layer needs each expert, from statistics alone; higher is better kept.

``frequency``: tokens that chose e. ``gate-mass``: their routing weights, summed. ``ean``: the norms of what e put out
for them, summed; ``man`` and ``msan``: the mean of those norms, and of their squares (2606.15716). ``reap``
(2510.13999): the mean of weight times norm. ``easy-ep`` (2504.06792): weight times norm times how far the routed
experts turn the residual stream, summed in each domain; the domains' scores are scaled to a sum of 1 and added.
``tcess`` (2505.17639): the mean over tokens of the router score of e, counted where e is chosen.

Legend: E experts, G domains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from coterie.errors import UnknownName

#: (statistics over all domains, the same with the domain axis first) -> (E,) float64.
Score = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


def score_needs(score: str) -> tuple[str, ...]:
    """Return the statistics that a score reads; raises UnknownName."""
    if score not in SCORES:
        raise UnknownName("score", score, SCORES)
    return SCORES[score][1]


def score_experts(score: str, statistics: Mapping[str, Tensor], by_domain: Mapping[str, Tensor]) -> Tensor:
    """Return the score of each expert, (E,) float64.

    Args:
        score: its name.
        statistics: a layer's statistics over all domains.
        by_domain: the same with the domain axis first.

    Raises:
        UnknownName: no such score.
    """
    score_needs(score)
    return SCORES[score][0](statistics, by_domain)


def _sum_of(name: str) -> Score:
    return lambda statistics, by_domain: statistics[name]


def _mean_of(name: str) -> Score:
    """The mean over the tokens that chose e; 0 where none did."""
    return lambda statistics, by_domain: statistics[name] / statistics["usage"].clamp(min=1)


def _easy_ep(statistics: Mapping[str, Tensor], by_domain: Mapping[str, Tensor]) -> Tensor:
    score_GE = by_domain["easy_ep"]
    # Scores are not negative, so their sum is the L1 norm; a domain without any has nothing to say.
    return (score_GE / score_GE.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).sum(0)


def _tcess(statistics: Mapping[str, Tensor], by_domain: Mapping[str, Tensor]) -> Tensor:
    mean_E = statistics["tcess"] / statistics["tokens"].clamp(min=1)
    # Router scores may be negative: an expert that was never chosen still ranks below all that were.
    return torch.where(statistics["tcess_tokens"] > 0, mean_E, mean_E.min().clamp(max=0) - 1)


#: Score by name, and the statistics that it reads.
SCORES: dict[str, tuple[Score, tuple[str, ...]]] = {
    "frequency": (_sum_of("usage"), ("usage",)),
    "gate-mass": (_sum_of("gate_mass"), ("gate_mass",)),
    "ean": (_sum_of("output_norm"), ("output_norm",)),
    "man": (_mean_of("output_norm"), ("output_norm", "usage")),
    "msan": (_mean_of("output_square"), ("output_square", "usage")),
    "reap": (_mean_of("reap"), ("reap", "usage")),
    "easy-ep": (_easy_ep, ("easy_ep",)),
    "tcess": (_tcess, ("tcess", "tcess_tokens", "tokens")),
}
