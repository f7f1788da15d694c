"""Shares: how many tokens each domain of a text gets.

Weights are shares of the tokens: with ``math=2,python=1`` two of three tokens come from the domain "math". Statistics
are sums over domains, so this is how a weight acts on them. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from coterie.errors import InputError


def parse_domains(text: str) -> dict[str, float]:
    """Read domains with weights: ``math=2,python=1``; a domain without a weight has weight 1.

    Returns:
        Weight by domain; empty where no domain is named.

    Raises:
        InputError: a weight is not a number, or a domain has two weights.
    """
    weights: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, sign, amount = (piece.strip() for piece in part.rpartition("="))
        if not sign:
            name, amount = amount, "1"
        try:
            weight = float(amount)
        except ValueError:
            weight = math.nan
        if math.isnan(weight):
            raise InputError(f"{amount!r}, the weight in {part!r}, is not a number; write math=2")
        if not name:
            raise InputError(f"{part!r} names no domain; write math=2")
        if weights.setdefault(name, weight) != weight:
            raise InputError(f"domain {name!r} has two weights, {weights[name]:g} and {weight:g}; give it one")
    return weights


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights that are above zero: domains of weight 0 get nothing.

    Raises:
        InputError: a weight is negative or not a finite number, or all of them are zero.
    """
    for domain, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise InputError(f"the weight of domain {domain!r} is {weight!r}; give a finite number like 2 or 0.5")
        if weight < 0:
            raise InputError(f"the weight of domain {domain!r} is {weight:g}; a weight is 0 or more")
    positive = {domain: weight for domain, weight in weights.items() if weight > 0}
    if weights and not positive:
        raise InputError(f"all weights are 0 ({', '.join(weights)}); one domain at least needs a weight above 0")
    return positive


def shares(total: int, weights: Sequence[float], *, step: int = 1) -> list[int]:
    """Share out an amount by weights.

    Every share is rounded by itself, half to even, and is never below 1, so a larger total never gives less to any.

    Args:
        total: what there is, such as tokens.
        weights: above zero.
        step: size of a piece, such as the tokens of a sequence.

    Returns:
        Pieces of each.
    """
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    return [max(1, round(total * weight / whole / step)) for weight in exact]
