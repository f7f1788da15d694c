"""The calibration benchmark runs, and its tables are what was measured."""

import importlib
import json
import sys

import pytest


@pytest.fixture(scope="module")
def benchmark(importable):
    return importlib.import_module("calibration")


def run(benchmark, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["calibration.py", *map(str, arguments)])
    benchmark.main()


@pytest.mark.long
def test_every_source_is_calibrated_on_and_compared(benchmark, tiny, text, tmp_path, monkeypatch, capsys):
    files = {"--markdown": tmp_path / "table.md", "--json": tmp_path / "all.json"}
    outputs = [part for pair in files.items() for part in pair]
    small = ("--tokens", 256, "--test-tokens", 128, "--seq-len", 32, "--questions", 1)
    run(benchmark, monkeypatch, "--model", tiny(), "--text", text, "--test", text, *small, *outputs)
    shown = capsys.readouterr().out
    assert shown == files["--markdown"].read_text()
    found = json.loads(files["--json"].read_text())
    tokens = {name: entry["calibration_tokens"] for name, entry in found["results"].items()}
    assert tokens["code"] == {"code": 256}
    assert tokens["prose"] == {"prose": 256}
    assert tokens["all"] == {"code": 128, "prose": 128}
    assert tokens["self"] == {"self": 256}
    assert tokens["all+self"].keys() == {"code", "prose", "self"}
    assert tokens.keys() == {"code", "prose", "all", "auto", "self", "all+self"}
    for name, entry in found["results"].items():
        kl = [entry["domains"][domain]["kl"] for domain in ("code", "prose")]
        lines = [line.replace("*", "") for line in shown.splitlines() if line.startswith(f"| {name} |")]
        assert len(lines) == 2
        assert lines[0].split(" | ")[1:5] == [f"{value:.3f}" for value in (*kl, sum(kl) / 2, max(kl))]


def test_a_source_that_there_is_not_is_refused(benchmark, tiny, text, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(benchmark, monkeypatch, "--model", tiny(), "--text", text, "--sources", "prosa")
    assert "unknown source prosa; choose from code, prose, all, auto, self, all+self" in capsys.readouterr().err


def test_the_best_of_each_domain_is_bold(benchmark):
    rows = {"a": [1.0, 3.0], "b": [2.0, 0.5]}
    lines = benchmark.table(["x", "y"], rows, 1, max, {"more": {"a": "-", "b": "7"}}).splitlines()
    assert lines[2:] == ["| a | **1.0** | 3.0 | 3.0 | 3.0 | - |", "| b | 2.0 | **0.5** | 2.0 | 2.0 | 7 |"]
