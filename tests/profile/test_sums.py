"""Exact sums: the same bytes in any order and in any parts, and as near to the truth as they say."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.profile.sums import DIGITS, ELEMENT_BYTES, BinnedSum, Totals

numbers = st.floats(allow_nan=False, allow_infinity=False, max_value=1e300, min_value=-1e300)
near = st.floats(min_value=-1e6, max_value=1e6, allow_subnormal=False)
addends = st.lists(st.one_of(numbers, near, st.integers(-(10**9), 10**9).map(float)), min_size=1, max_size=20)


def added(values):
    total = BinnedSum.zeros(1)
    for value in values:
        total = total.plus(torch.tensor([value], dtype=torch.float64))
    return total


def same(one, two):
    """Whether two sums are the same bytes; -0.0 and 0.0 are not."""
    return all(
        bytes(a.contiguous().view(torch.uint8).flatten().tolist())
        == bytes(b.contiguous().view(torch.uint8).flatten().tolist())
        for a, b in ((one.digits_K, two.digits_K), (one.place, two.place), (one.value(), two.value()))
    )


@given(values=addends, seed=st.integers(0, 10**6), data=st.data())
def test_any_order_and_any_parts_give_the_same_bytes(values, seed, data):
    whole = added(values)
    shuffled = values.copy()
    random.Random(seed).shuffle(shuffled)
    assert same(added(shuffled), whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=3)))
    parts = [added(shuffled[a:b]) for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    random.Random(seed + 1).shuffle(parts)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert same(total, whole)


@given(values=addends)
def test_a_sum_is_as_near_to_the_exact_one_as_it_says(values):
    found, exact = added(values).value().item(), math.fsum(values)
    bound = len(values) * 2.0**-64 * max(map(abs, values))
    assert abs(found - exact) <= bound + math.ulp(exact)


@given(values=st.lists(st.floats(min_value=1e-9, max_value=1e9), min_size=1, max_size=200))
def test_a_sum_of_positive_numbers_is_within_one_unit_in_the_last_place(values):
    found, exact = added(values).value().item(), math.fsum(values)
    assert abs(found - exact) <= math.ulp(exact)


@given(value=numbers)
def test_the_sum_of_one_number_is_that_number(value):
    expected = torch.tensor([value], dtype=torch.float64)
    assert torch.equal(BinnedSum.of(expected).value(), expected)


def test_what_plain_addition_loses_is_kept():
    values = [1e16, 1.0, -1e16, 2.0**-20]
    assert sum(values) != math.fsum(values)
    assert added(values).value().item() == 1 + 2.0**-20


def test_two_million_addends_are_still_exact():
    largest = torch.tensor([2.0**32 - 1], dtype=torch.float64)  # the largest digit
    total = BinnedSum.of(largest)
    for _ in range(21):
        total = total + total
    assert total.value().item() == 2**21 * (2**32 - 1)
    one_less = total + BinnedSum.of(torch.tensor([-1.0], dtype=torch.float64))
    assert one_less.value().item() == 2**21 * (2**32 - 1) - 1


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_stays_none(value):
    assert math.isnan(added([1.0, value, 2.0]).value().item())
    assert math.isnan((added([1.0, 5.0]) + added([value])).value().item())


def test_elements_do_not_touch_each_other():
    rows = torch.tensor([[1e-200, 3.0, 0.0], [1e200, -3.0, 0.0], [5.0, 2.0**-50, -0.0]], dtype=torch.float64)
    total = BinnedSum.zeros(3)
    for row in rows:
        total = total.plus(row)
    assert total.value().tolist() == [1e200, 2.0**-50, 0.0]
    assert total.digits_K.shape == (DIGITS, 3)
    assert total.digits_K.nbytes + total.place.nbytes == 3 * ELEMENT_BYTES
    both = BinnedSum.of(rows[:2])
    assert same(both[1], BinnedSum.of(rows[1]))
    assert same(both[0] + both[1], BinnedSum.of(rows[0]).plus(rows[1]))


def test_totals_read_only_what_is_asked_for():
    read = []
    held = {"sum": added([0.1, 0.2]), "peak": torch.tensor([3.0])}
    totals = Totals(held, lambda name: read.append(name) or held[name])
    assert list(totals) == ["sum", "peak"]
    assert len(totals) == 2
    assert "sum" in totals
    assert "other" not in totals
    assert read == []
    assert totals["sum"].item() == pytest.approx(0.3)
    assert totals["peak"] is held["peak"]
    assert read == ["sum", "peak"]
    with pytest.raises(KeyError):
        totals["other"]
