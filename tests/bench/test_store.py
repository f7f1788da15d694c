import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.bench.store import Store, read_seconds
from coterie.errors import CorruptArtifact


def cell(key, **changes):
    """Return a finished cell."""
    scores = {"perplexity": 12.5, "kl": 0.25, "agreement": 0.75, "accuracy": 0.5, "tokens": 100, "questions": 2}
    entry = {
        "key": key, "method": "reap", "model": "m", "model_digest": "d", "recipe": "reap", "router": "plain",
        "removed": 0.5, "seed": 0, "status": "done", **scores, "bytes": 1000, "bytes_ratio": 0.5, "num_experts": [4, 4],
        "loads_with": "transformers", "logits_error": 1e-6, "domains": {"code": scores}, "peak_bytes": None,
        "seconds": {"profile": 1.0, "compress": 2.0, "evaluate": 3.0, "stages": {"plan": 0.5}},
    }  # fmt: skip
    return entry | changes


LINE = json.dumps(cell("k0")) + "\n"


def test_what_was_added_is_there_again(tmp_path):
    store = Store(tmp_path / "cells.jsonl")
    for number in range(3):
        store.add(cell(f"k{number}", seed=number, model="zwölf\nlines"))
    store.add(cell("k1", seed=7))
    assert Store(tmp_path / "cells.jsonl").cells == store.cells
    assert store.cells["k1"] == cell("k1", seed=7)
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 4


def test_numbers_that_are_none_come_back(tmp_path):
    entry = cell("k", kl=float("inf"), accuracy=None)
    Store(tmp_path / "cells.jsonl").add(entry)
    assert Store(tmp_path / "cells.jsonl").cells["k"] == entry


@given(cut=st.integers(0, 5 * len(LINE)))
def test_a_torn_end_is_repaired_wherever_it_was_torn(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("store") / "cells.jsonl"
    lines = [json.dumps(cell(f"k{number}")) + "\n" for number in range(5)]
    whole = "".join(lines)[: 5 * len(LINE) - cut]
    path.write_text(whole)
    store = Store(path)
    assert list(store.cells) == [f"k{number}" for number in range(whole.count("\n"))]
    store.add(cell("new"))
    assert list(Store(path).cells) == [*(f"k{number}" for number in range(whole.count("\n"))), "new"]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"value": 1}', "", "[" * 100_000, "9" * 5000])
def test_a_line_that_is_no_cell_is_an_error(tmp_path, line):
    path = tmp_path / "cells.jsonl"
    path.write_text(f"{LINE}{line}\n{LINE}")
    with pytest.raises(CorruptArtifact, match=r"cells\.jsonl, line 2 is not a cell .* computed again"):
        Store(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": float("nan")}, "kl is nan: should be a number"),
        ({"perplexity": "12"}, "perplexity is '12'"),
        ({"bytes": 2**80}, "at most 64 bits"),
        ({"flavour": 1}, "flavour is 1: no such field is known"),
        ({"agreement": 1.5}, "agreement is 1.5: is a share"),
        ({"removed": 1}, "removed is 1.0: should be a share"),
        ({"domains": {"code": {"perplexity": 1.0}}}, "domains.code.kl is missing"),
        ({"seconds": {"compress": -1}}, "seconds.profile is missing"),
        ({"status": "failed"}, "error is missing"),
        ({"status": "perhaps"}, "status is 'perhaps': should be done or failed or infeasible"),
    ],
)
def test_a_cell_that_says_what_cannot_be_names_the_field(tmp_path, changes, message):
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(cell("k") | changes) + "\n")
    with pytest.raises(CorruptArtifact, match=re.escape(message)):
        Store(path)


def test_a_cell_that_failed_says_why(tmp_path):
    entry = {name: cell("k")[name] for name in ("key", "method", "model", "model_digest", "recipe", "router")}
    entry |= {"removed": 0.5, "seed": 0, "status": "failed", "error": "Died", "reason": "a signal", "seconds": {}}
    Store(tmp_path / "cells.jsonl").add(entry)
    assert Store(tmp_path / "cells.jsonl").cells == {"k": entry}


@pytest.mark.parametrize("content", ["", "{}", '{"seconds": "1"}', '{"seconds": NaN}', "[1]"])
def test_the_seconds_of_a_profile_are_a_number(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_text('{"seconds": 1.5, "peak_bytes": null}')
    assert read_seconds(path) == 1.5
    path.write_text(content)
    with pytest.raises(CorruptArtifact, match=r"profile\.json does not say how long .* made again"):
        read_seconds(path)
