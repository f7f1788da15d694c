import json

import pytest
from typer.testing import CliRunner

from coterie.bench import run as bench_run
from coterie.cli.main import app


@pytest.fixture(scope="module")
def arguments(tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    options = ("--text", text, "--test", text, "--tokens", 512, "--test-tokens", 128, "--seq-len", 64, "--jobs", 0)
    return ["bench", tiny(), out, *options, "--sample-tokens", 128, "--questions", 0, "--seeds", 1]


def call(arguments, *more):
    return CliRunner().invoke(app, [str(argument) for argument in (*arguments, *more)])


def test_bench_prints_its_tables_and_says_where_they_are(arguments, tiny, monkeypatch):
    monkeypatch.setattr(bench_run, "draw_png", lambda *arguments: False)
    options = ("--recipes", "reap", "--removed", "0.5, 0.25")
    result = call(arguments, *options)
    assert result.exit_code == 0, result.stderr
    out = arguments[2]
    assert "By domain" in (out / "table.md").read_text()
    assert "By domain" not in result.stdout
    assert "### 25 % of the expert parameters removed" in result.stdout
    assert result.stdout.endswith(f"tables, also by domain, results and plot written to {out}\n")
    shown = json.loads(call(arguments, *options, "--json").stdout)
    assert shown["computed"] == 0
    assert [(cell["recipe"], cell["removed"]) for cell in shown["cells"]] == [("reap", 0.5), ("reap", 0.25)]


def test_cells_that_failed_are_named_and_the_exit_code_says_so(arguments, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(bench_run, "draw_png", lambda *arguments: False)
    monkeypatch.setattr("coterie.bench.tasks.compress", broken)
    result = call(arguments, "--recipes", "hc-smoe", "--routers", "map", "--removed", "0.5")
    assert result.exit_code == 1
    assert result.stderr.endswith(", hc-smoe (map), 0.5 removed, seed 0: no such luck\n")
    assert "failed: no such luck" in result.stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--removed", "half"), 2, "'half' are no numbers"),
        (("--recipes", "reep"), 1, "did you mean reap"),
        (("--removed", "1.5"), 1, "1.5 of the experts cannot be removed"),
    ],
)
def test_nonsense_is_refused(arguments, options, code, message):
    result = call(arguments, *options)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
