"""Standard errors over sequences: how far a score may lie from what more text of the same kind would give.

Tokens of one sequence are not independent, sequences that were drawn are; so the spread is that of whole sequences.
Each score is a ratio of sums over sequences, or a smooth function of such ratios, and its error is that of its linear
part (the delta method; Cochran 1977, chapter 6), with N / (N - 1) for the degree of freedom that the mean takes.

Legend: N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def ratio_error(sums_N: Sequence[float], tokens_N: Sequence[int]) -> float | None:
    """Return the standard error of a mean over tokens, sum of `sums_N` divided by sum of `tokens_N`.

    Where all sequences are equally long, that is the standard deviation of their means divided by the root of N.

    Returns:
        The error in the unit of the mean; None with fewer than two sequences, or where a sum is infinite.
    """
    return residual_error(_residuals(sums_N, tokens_N), sum(tokens_N))


def perplexity_error(nll_N: Sequence[float], tokens_N: Sequence[int]) -> float | None:
    """Return the standard error of a perplexity, from the negative log-likelihood of each sequence in nats."""
    return _scaled(ratio_error(nll_N, tokens_N), _exp(_mean(nll_N, tokens_N)))


def rise_error(nll_N: Sequence[float], base_nll_N: Sequence[float], tokens_N: Sequence[int]) -> float | None:
    """Return the standard error of a perplexity minus the base's, both on the same sequences, which are paired."""
    perplexity, base = _exp(_mean(nll_N, tokens_N)), _exp(_mean(base_nll_N, tokens_N))
    pairs = zip(_residuals(nll_N, tokens_N), _residuals(base_nll_N, tokens_N), strict=True)
    return residual_error([perplexity * mine - base * other for mine, other in pairs], sum(tokens_N))


def perplexity_ratio_error(
    nll_N: Sequence[float], base_nll_N: Sequence[float], tokens_N: Sequence[int]
) -> float | None:
    """Return the standard error of a perplexity divided by the base's, both on the same sequences, which are paired."""
    differences_N = [mine - other for mine, other in zip(nll_N, base_nll_N, strict=True)]
    return _scaled(ratio_error(differences_N, tokens_N), _exp(_mean(differences_N, tokens_N)))


def residual_error(residuals_N: Sequence[float], tokens: int) -> float | None:
    """Return the standard error of a mean over `tokens`, from what each sequence adds to its deviation."""
    count = len(residuals_N)
    if count < 2 or not all(map(math.isfinite, residuals_N)):
        return None
    error = math.sqrt(math.fsum(residual * residual for residual in residuals_N) * count / (count - 1)) / tokens
    return error if math.isfinite(error) else None


def _mean(sums_N: Sequence[float], tokens_N: Sequence[int]) -> float:
    # Not fsum, which refuses a sum of infinities.
    return sum(sums_N) / sum(tokens_N) if tokens_N else math.nan


def _residuals(sums_N: Sequence[float], tokens_N: Sequence[int]) -> list[float]:
    mean = _mean(sums_N, tokens_N)
    return [total - mean * tokens for total, tokens in zip(sums_N, tokens_N, strict=True)]


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _scaled(error: float | None, factor: float) -> float | None:
    return error * factor if error is not None and math.isfinite(error * factor) else None
