"""The knapsack against brute force: within the budget, within one step of the best, more bytes never worse."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.compress.allocators.knapsack import Option, choose

OPTIONS = st.builds(
    Option,
    name=st.sampled_from("abcd"),
    num_bytes=st.integers(1, 30),
    damage=st.one_of(st.just(0.0), st.floats(1e-6, 8.0), st.floats(1e-12, 1e-9)),
)
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=4)


def size(chosen):
    return sum(option.num_bytes for option in chosen)


def damage(chosen):
    return sum(option.damage for option in chosen)


def least_damage(items, budget):
    return min((damage(chosen) for chosen in product(*items) if size(chosen) <= budget), default=None)


def largest_step(items):
    """The most that one item can take off."""
    return max(max(o.damage for o in options) - min(o.damage for o in options) for options in items)


@given(ITEMS, st.integers(0, 130))
def test_none_exactly_where_nothing_fits_and_never_over_the_budget(items, budget):
    chosen = choose(items, budget)
    if least_damage(items, budget) is None:
        assert chosen is None
        return
    assert size(chosen) <= budget
    assert all(option in options for option, options in zip(chosen, items, strict=True))


@given(ITEMS, st.integers(0, 130))
def test_it_is_within_one_step_of_the_best(items, budget):
    chosen = choose(items, budget)
    if chosen is not None:
        best = least_damage(items, budget)
        assert damage(chosen) <= best + largest_step(items) + 1e-9


@given(ITEMS, st.integers(0, 130))
def test_what_is_left_over_is_spent(items, budget):
    """No single step that fits lowers the damage."""
    chosen = choose(items, budget)
    if chosen is None:
        return
    for now, options in zip(chosen, items, strict=True):
        for option in options:
            fits = size(chosen) - now.num_bytes + option.num_bytes <= budget
            assert not (fits and option.damage < now.damage)


@given(ITEMS, st.integers(0, 130), st.integers(0, 40))
def test_more_bytes_are_no_worse_than_one_step(items, budget, more):
    before, after = choose(items, budget), choose(items, budget + more)
    if before is None:
        return
    assert after is not None
    assert damage(after) <= damage(before) + 1e-9


@given(st.lists(st.lists(st.floats(0.01, 5), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(0, 50))
def test_it_is_the_best_where_every_step_takes_the_same_bytes_and_less_off_each_time(drops, budget):
    """Convex and equal steps: the greedy way is the optimum, so there is nothing to be lost."""
    items = []
    for steps in drops:
        off = sorted(steps, reverse=True)
        items.append(
            [Option(name=str(n), num_bytes=4 * (n + 1), damage=20.0 - sum(off[:n])) for n in range(len(off) + 1)]
        )
    chosen, best = choose(items, budget), least_damage(items, budget)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        assert damage(chosen) == pytest.approx(best, abs=1e-9)


def test_of_equal_damage_it_takes_the_smallest_and_it_never_pays_for_more():
    options = [Option(name=str(size), num_bytes=size, damage=1.0) for size in (7, 3, 5)]
    assert [option.name for option in choose([options], 100)] == ["3"]
    worse = Option(name="larger and worse", num_bytes=9, damage=2.0)
    assert [option.name for option in choose([[*options, worse]], 100)] == ["3"]


def test_nothing_to_choose_costs_nothing():
    assert choose([], 0) == []
    assert choose([], -1) is None


def test_damages_of_very_different_sizes_are_told_apart():
    """What matters is decided by what matters, though another item is a billion times as dear."""
    big = [Option(name="a", num_bytes=1, damage=1e3), Option(name="b", num_bytes=2, damage=0.0)]
    small = [
        [Option(name="a", num_bytes=1, damage=d * 1e-9), Option(name="b", num_bytes=2, damage=0.0)] for d in (1, 3)
    ]
    assert [option.name for option in choose([big, *small], 5)] == ["b", "a", "b"]
