import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.bench.store import Store
from coterie.errors import CorruptArtifact


def test_what_was_added_is_there_again(tmp_path):
    store = Store(tmp_path / "cells.jsonl")
    for number in range(3):
        store.add({"key": f"k{number}", "value": number, "text": "zwölf\nlines"})
    store.add({"key": "k1", "value": 7})
    assert Store(tmp_path / "cells.jsonl").cells == store.cells
    assert store.cells["k1"] == {"key": "k1", "value": 7}
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 4


def test_numbers_that_are_none_come_back(tmp_path):
    Store(tmp_path / "cells.jsonl").add({"key": "k", "kl": float("inf"), "none": None})
    assert Store(tmp_path / "cells.jsonl").cells["k"] == {"key": "k", "kl": float("inf"), "none": None}


@given(cut=st.integers(0, 200))
def test_a_torn_end_is_repaired_wherever_it_was_torn(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("store") / "cells.jsonl"
    lines = [json.dumps({"key": f"k{number}", "value": "x" * 20}) + "\n" for number in range(5)]
    whole = "".join(lines)[: 200 - cut]
    path.write_text(whole)
    store = Store(path)
    assert list(store.cells) == [f"k{number}" for number in range(whole.count("\n"))]
    store.add({"key": "new"})
    assert list(Store(path).cells) == [*(f"k{number}" for number in range(whole.count("\n"))), "new"]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"value": 1}', ""])
def test_a_line_that_is_no_cell_is_an_error(tmp_path, line):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"key": "a"}\n' + line + '\n{"key": "b"}\n')
    with pytest.raises(CorruptArtifact, match=r"cells\.jsonl, line 2 is not a cell"):
        Store(path)
