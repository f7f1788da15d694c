"""Schedules: rates by hand, orders in which each row is seen once before one is seen again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.train.schedule import Drawn, all_rows, falling_rate, rate_at, shuffled


def test_the_rate_rises_stays_and_falls_to_nothing():
    rates = [rate_at(step, 50, 0.1) for step in range(50)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[5:26] == [0.1] * 21
    assert rates[25:] == pytest.approx([0.1 * left / 25 for left in range(25, 0, -1)])
    assert [rate_at(step, 2, 0.1) for step in range(2)] == pytest.approx([0.02, 0.04])


def test_how_long_it_rises_and_falls_can_be_said():
    rates = [rate_at(step, 10, 1.0, warm_up=2, fall=0.3) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


def test_a_rate_can_fall_from_the_first_step_on():
    assert [falling_rate(step, 4, 0.2) for step in range(4)] == pytest.approx([0.2, 0.15, 0.1, 0.05])


@given(count=st.integers(1, 20), batch=st.integers(1, 7))
def test_every_row_is_seen_once_an_epoch(count, batch):
    order = shuffled(count, batch, seed=3)
    seen = torch.cat([order(step) for step in range(3 * count)]).tolist()
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(count=st.integers(1, 20), batch=st.integers(1, 20), seed=st.integers(0, 3))
def test_drawn_epochs_are_those_of_one_generator(count, batch, seed):
    order = Drawn(count, batch, seed)
    steps = [order(step).tolist() for step in range(30)]
    generator = torch.Generator().manual_seed(seed)
    stream = torch.cat([torch.randperm(count, generator=generator) for _ in range(700)]).tolist()
    seen = [row for rows in steps for row in rows]
    assert seen == stream[: len(seen)]
    if batch <= count:
        assert {len(rows) for rows in steps} == {batch}
    else:
        assert len(steps[0]) == min(batch, 2 * count)
        assert all(count <= len(rows) <= batch for rows in steps)


@pytest.mark.parametrize("order", [shuffled(7, 3, 1), Drawn(7, 3, 1), Drawn(7, 10, 1), all_rows(7)])
def test_rows_are_a_function_of_the_step_alone(order):
    forward = [order(step).tolist() for step in range(9)]
    assert [order(step).tolist() for step in range(8, -1, -1)] == forward[::-1]
    assert order(5).tolist() == order(5).tolist() == forward[5]


def test_all_rows_are_all_rows():
    assert all_rows(3)(8).tolist() == [0, 1, 2]


@pytest.mark.parametrize("make", [shuffled, Drawn])
def test_another_seed_gives_another_order(make):
    assert make(50, 50, 0)(0).tolist() != make(50, 50, 1)(0).tolist()
