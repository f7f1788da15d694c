"""The split: both parts disjoint, all rows in one of them, the held-out ones evenly spread."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.train.split import split


@given(count=st.integers(0, 200), every=st.integers(1, 50))
def test_each_row_is_in_one_part(count, every):
    fit, held = (part.tolist() for part in split(count, every))
    assert sorted(fit + held) == list(range(count))
    assert fit == sorted(fit)
    assert held == [row for row in range(count) if (row + 1) % every == 0]


def test_fewer_rows_than_a_group_are_all_trained_on():
    fit, held = split(3, 4)
    assert fit.tolist() == [0, 1, 2]
    assert held.tolist() == []


@pytest.mark.parametrize("every", [0, -1])
def test_no_row_can_be_the_last_of_an_empty_group(every):
    with pytest.raises(ValueError, match="give 1 or more"):
        split(10, every)
