"""The fit of acceptance, the costs, and the rule on which guesses are worth their time."""

import math

import numpy as np
import pytest

from coterie.run.stop_rule import MOST, Acceptance, Costs, FixedLength, Guess, Round, Worth, fit_logistic


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def descended(rows, right, prior):
    """Fit the same by small steps down the slope, sum by sum."""
    weights = list(prior)
    for _ in range(4000):
        slope = [weight - before for weight, before in zip(weights, prior, strict=True)]
        for row, is_right in zip(rows, right, strict=True):
            chance = sigmoid(sum(x * weight for x, weight in zip(row, weights, strict=True)))
            slope = [each + x * (chance - is_right) for each, x in zip(slope, row, strict=True)]
        weights = [weight - 0.02 * each for weight, each in zip(weights, slope, strict=True)]
    return weights


def test_the_fit_is_the_one_that_small_steps_reach():
    draws = np.random.default_rng(0)
    rows = np.concatenate([np.ones((40, 1)), draws.normal(size=(40, 3))], axis=1)
    right = (draws.random(40) < 0.6).astype(float)
    prior = np.array([0.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(fit_logistic(rows, right, prior), descended(rows, right, prior), atol=1e-6)


def test_acceptance_begins_with_what_who_guesses_says_and_learns_what_comes():
    acceptance = Acceptance()
    for probability in (0.1, 0.5, 0.9):
        assert acceptance.probability(Guess(token=0, probability=probability), 0) == pytest.approx(probability)
    assert acceptance.probability(Guess(token=0), 3) == 0.5
    draws = np.random.default_rng(1)
    for _ in range(400):  # who guesses thinks too well of himself, the more the further he goes
        probability, position = draws.random(), int(draws.integers(0, 4))
        chance = sigmoid(math.log(max(probability, 1e-4) / max(1 - probability, 1e-4)) - 1 - 4 * position / MOST)
        guess = Guess(token=0, probability=probability)
        acceptance.learn(guess, position, is_right=bool(draws.random() < chance))
    for position, expected in ((0, sigmoid(-1)), (3, sigmoid(-2.5))):
        assert acceptance.probability(Guess(token=0, probability=0.5), position) == pytest.approx(expected, abs=0.12)
    assert len(acceptance._rows) == 256


def test_costs_are_those_of_the_passes():
    costs = Costs()
    assert costs.pass_seconds(1, 0) == 0
    draws = np.random.default_rng(2)
    for _ in range(300):
        tokens = int(draws.integers(1, 6))
        misses = round(10 * tokens**0.65)
        waited = 0.004 * misses
        costs.learn_pass(tokens, 0.05 + 0.01 * tokens + waited, waited, misses)
    assert costs.each == pytest.approx((0.05, 0.01), rel=1e-3)
    assert costs.miss == pytest.approx(0.004)
    assert costs.misses(4) == pytest.approx(10 * 4**0.65, rel=0.05)
    assert costs.pass_seconds(2, 5) == pytest.approx(0.05 + 0.02 + 0.02, rel=1e-3)
    costs.learn_guess(0.02)
    assert costs.guess == 0.02


def simulate(rule, *, right, begin, token, guess, miss, growth, rounds=400, seed=0):
    """Let rounds pass on a machine with these costs, and return tokens a second of the second half, and without."""
    draws, tokens, seconds, lengths = np.random.default_rng(seed), 0, 0.0, []
    for number in range(rounds):
        guesses, spent = [], 0.0
        if rule.begins():
            while rule.goes_on(guesses):
                spent += guess
                guesses.append(Guess(token=0, probability=right, misses=None))
                if not rule.takes(guesses):
                    guesses.pop()
                    break
        num_right = next((n for n in range(len(guesses)) if draws.random() > right), len(guesses))
        misses = round(20 * (1 + len(guesses)) ** growth)
        waited = misses * miss
        took = begin + token * (1 + len(guesses)) + waited
        rule.learn(Round(
            guesses=guesses, num_right=num_right, guessing=spent, seconds=took, waited=waited, misses=misses
        ))  # fmt: skip
        if number >= rounds // 2:
            tokens, seconds, lengths = tokens + num_right + 1, seconds + spent + took, [*lengths, len(guesses)]
    return tokens / seconds, float(np.mean(lengths))


def test_guesses_go_on_where_they_pay():
    costs = {"right": 0.9, "begin": 0.1, "token": 0.01, "guess": 0.01, "miss": 0.0, "growth": 0.65}
    rate, length = simulate(Worth(), **costs)
    plain, _ = simulate(FixedLength(0), **costs)
    assert rate > 2 * plain
    assert length > 3


def test_guesses_end_where_reads_take_what_passes_save_and_it_is_said_once(caplog):
    costs = {"right": 0.5, "begin": 0.02, "token": 0.01, "guess": 0.01, "miss": 0.01, "growth": 1.0, "rounds": 3000}
    rule = Worth()
    rate, length = simulate(rule, **costs)
    plain, _ = simulate(FixedLength(0), **costs)
    always, _ = simulate(FixedLength(4), **costs)
    assert always < 0.7 * plain
    assert rate > 0.95 * plain
    assert length < 0.3
    assert caplog.text.count("drafts stop for now") == 1
    assert rule._rest > 256  # it was tried again, and left alone for longer


def test_a_guess_that_is_expected_to_miss_much_is_not_worth_it():
    rule = Worth()
    simulate(rule, right=0.8, begin=0.05, token=0.005, guess=0.005, miss=0.002, growth=0.65)
    assert rule.takes([Guess(token=0, probability=0.8, misses=2)])
    assert not rule.takes([Guess(token=0, probability=0.8, misses=200)])
    assert not rule.takes([Guess(token=0, probability=0.001, misses=2)])
    assert not rule.goes_on([Guess(token=0, probability=0.8)] * MOST)
    assert not rule.goes_on([Guess(token=0, probability=0.2)])
