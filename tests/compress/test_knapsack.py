"""The knapsack against brute force: within the budget, within one step of the best, more bytes never worse."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.compress.allocators.knapsack import Option, choose, choose_exactly, choose_within, gap_of, least_damage

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


def least_damage_by_trying(items, budget):
    return min((damage(chosen) for chosen in product(*items) if size(chosen) <= budget), default=None)


def largest_step(items):
    """The most that one item can take off."""
    return max(max(o.damage for o in options) - min(o.damage for o in options) for options in items)


@given(ITEMS, st.integers(0, 130))
def test_none_exactly_where_nothing_fits_and_never_over_the_budget(items, budget):
    chosen = choose(items, budget)
    if least_damage_by_trying(items, budget) is None:
        assert chosen is None
        return
    assert size(chosen) <= budget
    assert all(option in options for option, options in zip(chosen, items, strict=True))


@given(ITEMS, st.integers(0, 130))
def test_it_is_within_one_step_of_the_best(items, budget):
    chosen = choose(items, budget)
    if chosen is not None:
        best = least_damage_by_trying(items, budget)
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
    chosen, best = choose(items, budget), least_damage_by_trying(items, budget)
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


# The exact answer, and how far the other can be from it.


@given(ITEMS, st.integers(0, 130))
@settings(max_examples=25)
def test_the_exact_answer_is_the_best_and_never_over_the_budget(items, budget):
    chosen, best = choose_exactly(items, budget), least_damage_by_trying(items, budget)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        assert size(chosen) <= budget
        assert all(option in options for option, options in zip(chosen, items, strict=True))
        assert damage(chosen) <= best + 1e-9


@pytest.mark.long
@given(ITEMS, st.integers(0, 130), st.integers(0, 40))
@settings(max_examples=60)
def test_more_bytes_are_never_worse_for_the_exact_answer(items, budget, more):
    before, after = choose_exactly(items, budget), choose_exactly(items, budget + more)
    if before is not None:
        assert damage(after) <= damage(before) + 1e-9


@pytest.mark.long
@given(ITEMS, st.integers(0, 130), st.sampled_from("abcd"), st.integers(0, 3))
@settings(max_examples=60)
def test_as_many_as_there_have_to_be_take_a_name(items, budget, name, floor):
    allowed = [
        chosen
        for chosen in product(*items)
        if size(chosen) <= budget and sum(option.name == name for option in chosen) >= floor
    ]
    chosen = choose_exactly(items, budget, at_least={name: floor})
    assert (chosen is None) == (not allowed)
    if chosen is not None:
        assert size(chosen) <= budget
        assert sum(option.name == name for option in chosen) >= floor
        assert damage(chosen) <= min(map(damage, allowed)) + 1e-9


@given(ITEMS, st.integers(0, 130))
def test_the_bound_is_below_every_choice_within_the_budget(items, budget):
    bound, best = least_damage(items, budget), least_damage_by_trying(items, budget)
    if best is None:
        assert bound == float("inf")
        return
    assert 0 <= bound <= best + 1e-9
    gap = gap_of(items, choose(items, budget), budget)
    assert 0 <= gap <= 1
    assert damage(choose(items, budget)) * (1 - gap) <= best + 1e-9


def test_the_bound_is_the_damage_where_the_budget_falls_on_a_step():
    """Three equal items, one step each: the dual has no gap at whole numbers of steps, and halves the one between."""
    options = [Option(name="a", num_bytes=1, damage=3.0), Option(name="b", num_bytes=3, damage=1.0)]
    for steps in range(4):
        assert least_damage([options] * 3, 3 + 2 * steps) == pytest.approx(9 - 2 * steps)
        assert gap_of([options] * 3, choose([options] * 3, 3 + 2 * steps), 3 + 2 * steps) == pytest.approx(0, abs=1e-9)
    assert least_damage([options] * 3, 4) == pytest.approx(8)
    assert gap_of([options] * 3, choose([options] * 3, 4), 4) == pytest.approx(1 / 9)


def test_the_exact_answer_is_better_where_one_price_does_not_split_the_items():
    """The best two are not the ones that are worth most a byte."""
    items = [
        [Option(name="a", num_bytes=0, damage=d), Option(name="b", num_bytes=n, damage=0.0)]
        for n, d in ((6, 6.6), (5, 5.0), (5, 5.0))
    ]
    assert damage(choose(items, 10)) == pytest.approx(10.0)
    assert damage(choose_exactly(items, 10)) == pytest.approx(6.6)
    assert gap_of(items, choose_exactly(items, 10), 10) < 0.2


def test_nothing_to_choose_is_chosen_exactly():
    assert choose_exactly([], 0) == []
    assert choose_exactly([], -1) is None
    assert choose_exactly([], 5, at_least={"a": 1}) is None


def test_bytes_of_large_models_are_counted_to_the_byte():
    """Tolerances of the solver are absolute: a byte over a budget of many gigabytes is still over."""
    unit = 7 * 2**30 + 1
    items = [
        [Option(name="a", num_bytes=unit, damage=2.0 + n), Option(name="b", num_bytes=2 * unit, damage=1.0)]
        for n in range(6)
    ]
    whole = choose_exactly(items, 9 * unit)
    assert [option.name for option in whole] == ["a", "a", "a", "b", "b", "b"]
    short = choose_exactly(items, 9 * unit - 1)
    assert [option.name for option in short] == ["a", "a", "a", "a", "b", "b"]


def test_many_items_that_are_alike_are_chosen_in_no_time():
    """Where one price flips all of them, the steps are taken one by one."""
    options = [Option(name=str(n), num_bytes=100 * (n + 1), damage=4.0**-n) for n in range(4)]
    chosen = choose([options] * 20_000, 150 * 20_000)
    assert size(chosen) == 150 * 20_000
    assert {option.name for option in chosen} == {"0", "1"}


@given(ITEMS, st.integers(0, 130), st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=25)
def test_it_is_as_near_to_the_best_as_it_has_to_be(items, budget, gap):
    chosen, best = choose_within(items, budget, gap), least_damage_by_trying(items, budget)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        assert size(chosen) <= budget
        assert damage(chosen) * (1 - gap) <= best + 1e-9
