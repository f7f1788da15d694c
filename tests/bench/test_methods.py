"""benchmarks/methods.py: what it keeps is what the bench found."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from coterie.compress.recipes import RECIPES


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("methods")


@pytest.mark.long
def test_tables_results_and_plot_are_kept(methods, made, tmp_path):
    place = tmp_path / "kept" / "found"
    methods.keep(made, place, ["--recipes", "a b"])
    assert sorted(path.name for path in place.parent.iterdir()) == ["found.json", "found.md", "found.svg"]
    text = place.with_suffix(".md").read_text()
    assert text.endswith(made.table)
    assert "Made by `python benchmarks/methods.py --recipes 'a b'`: " in text
    assert "6 compressions, each evaluated against the original on 256 tokens" in text
    assert "Calibration: 512 tokens of the same kinds of text, 2 draws;" in text
    assert "![damage against bytes](found.svg)" in text
    assert place.with_suffix(".svg").read_bytes() == (made.out / "plot.svg").read_bytes()
    kept = json.loads(place.with_suffix(".json").read_text())
    whole = json.loads((made.out / "results.json").read_text())
    assert kept.keys() == whole.keys()
    for line, cell in zip(kept["cells"], whole["cells"], strict=True):
        assert line["kl"] == pytest.approx(cell["kl"], rel=1e-5)
        assert line["key"] == cell["key"]
        assert "domains" not in line
    assert [row["method"] for row in kept["rows"]] == [row["method"] for row in whole["rows"]]
    assert len(place.with_suffix(".json").read_text().splitlines()) < 40


def test_a_model_that_is_not_there_is_left_out(methods, tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(methods, "bench", lambda *arguments, **options: called.append((arguments, options)))
    there = tmp_path / "there"
    there.mkdir()
    (there / "config.json").write_text("{}")
    methods.run([there, tmp_path / "gone"], tmp_path / "out", jobs=3)
    assert called == [
        (([there], tmp_path / "out"), {"text": methods.CALIBRATION, "test": methods.TEST, "jobs": 3}),
    ]
    assert f"{tmp_path / 'gone'} is not there: left out" in capsys.readouterr().err


def test_published_methods_and_our_default_are_compared_by_default(methods):
    assert {"reap", "heapr-ragged", "coterie"} < set(methods.RECIPES_HERE)
    assert "coterie-slim" not in methods.RECIPES_HERE
    structural = [name for name, recipe in RECIPES.items() if recipe.quantiser is None]
    assert len(methods.RECIPES_HERE) == len(structural) - 3


@pytest.mark.long
def test_the_command_line_says_what_is_run(methods, made, tmp_path, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(methods, "run", lambda models, out, **options: asked.update(options, out=out) or made)
    monkeypatch.setattr(sys, "argv", ["methods.py", "--out", "x", "--keep", str(tmp_path / "m"), "--recipes", "reap"])
    methods.main()
    assert made.summary in capsys.readouterr().out
    assert (tmp_path / "m.md").is_file()
    assert asked == {
        "out": Path("x"), "recipes": "reap", "routers": ["plain"], "removed": [0.25, 0.5, 0.625, 0.75],
        "seeds": 3, "tokens": 65_536, "test_tokens": 20_480, "questions": 200, "effort": "balanced", "jobs": 2,
    }  # fmt: skip
