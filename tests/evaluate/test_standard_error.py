"""Standard errors against what they mean: the spread over draws of text, and slow derivatives by weights."""

import math
import random

import numpy as np
import pytest

from coterie.evaluate.standard_error import perplexity_error, perplexity_ratio_error, ratio_error, rise_error


def mean(sums, tokens, weights):
    total = math.fsum(weight * value for weight, value in zip(weights, sums, strict=True))
    return total / math.fsum(weight * count for weight, count in zip(weights, tokens, strict=True))


def slow_error(score, count, step=1e-6):
    """Move the weight of one sequence at a time (the infinitesimal jackknife), in float64."""
    total = 0.0
    for place in range(count):
        up, down = ([1 + sign * step * (place == other) for other in range(count)] for sign in (1, -1))
        total += ((score(up) - score(down)) / (2 * step)) ** 2
    return math.sqrt(total * count / (count - 1))


def drawn(count, seed=0):
    source = random.Random(seed)
    tokens = [source.randrange(20, 60) for _ in range(count)]
    base = [number * source.gauss(2.0, 0.3) for number in tokens]
    mine = [value + number * source.gauss(0.2, 0.05) for value, number in zip(base, tokens, strict=True)]
    return mine, base, tokens


def test_errors_are_those_of_slow_derivatives():
    mine, base, tokens = drawn(17)
    scores = {
        ratio_error(mine, tokens): lambda w: mean(mine, tokens, w),
        perplexity_error(mine, tokens): lambda w: math.exp(mean(mine, tokens, w)),
        rise_error(mine, base, tokens): lambda w: math.exp(mean(mine, tokens, w)) - math.exp(mean(base, tokens, w)),
        perplexity_ratio_error(mine, base, tokens): lambda w: math.exp(mean(mine, tokens, w) - mean(base, tokens, w)),
    }
    assert len(scores) == 4
    for found, score in scores.items():
        assert found == pytest.approx(slow_error(score, 17), rel=1e-5)


def test_equally_long_sequences_have_the_error_of_their_means():
    sums = [3.0, 5.0, 10.0, 2.5]
    assert ratio_error(sums, [10] * 4) == pytest.approx(np.std([0.3, 0.5, 1.0, 0.25], ddof=1) / 2)


def test_an_error_is_the_spread_over_draws_and_pairs_make_it_small():
    found = []
    for seed in range(400):
        mine, base, tokens = drawn(60, seed)
        rise = math.exp(sum(mine) / sum(tokens)) - math.exp(sum(base) / sum(tokens))
        found.append((rise, rise_error(mine, base, tokens), perplexity_error(mine, tokens)))
    rises, paired, alone = np.array(found).T
    assert np.mean(paired) == pytest.approx(np.std(rises), rel=0.1)
    assert np.mean(alone) > 3 * np.mean(paired)


def test_the_base_does_not_differ_from_itself():
    mine, _, tokens = drawn(5)
    assert rise_error(mine, mine, tokens) == perplexity_ratio_error(mine, mine, tokens) == 0


@pytest.mark.parametrize("sums", [[], [1.0], [1.0, math.inf], [math.inf, math.inf], [1e5, 2e5]])
def test_what_has_no_error_has_none(sums):
    tokens = [10] * len(sums)
    assert perplexity_error(sums, tokens) is None
    assert rise_error(sums, sums, tokens) is None
    if sums != [1e5, 2e5]:  # finite, but beyond what an exponential can hold
        assert ratio_error(sums, tokens) is perplexity_ratio_error(sums, sums, tokens) is None
