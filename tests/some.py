"""Some cases of a test in every run, the others where all are asked for (make test-more)."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(count: int, cases: Iterable[Any]) -> list[Any]:
    """Return the parameters of a test: as many as said belong to the fast tests, the others are marked long."""
    every = list(cases)
    assert 0 < count < len(every), f"{count} of {len(every)} cases"
    rest = [each if hasattr(each, "marks") else _case(each) for each in every[count:]]
    long = [pytest.param(*each.values, id=each.id, marks=(*each.marks, pytest.mark.long)) for each in rest]
    return [*every[:count], *long]


def _case(values: Any) -> Any:
    return pytest.param(*values) if isinstance(values, tuple) else pytest.param(values)
