"""The tutorial shows what the commands print for the model that it is about, from its headers."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coterie.cli.main import app
from qwen3_30b import write_headers

TUTORIAL = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
SHOWN = re.compile(r"<!-- printed by `coterie ([^`]+)` -->\n```text\n(.*?)\n```", re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_headers(tmp_path_factory.mktemp("qwen3") / "Qwen3-30B-A3B")


def printed(command, model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(model.parent)
    done = CliRunner().invoke(app, command.replace("Qwen/Qwen3-30B-A3B", model.name).split())
    assert done.exit_code == 0, done.output
    return done.stdout.rstrip()


def words(text):
    """Return what is said, however it is laid out: lines may break elsewhere."""
    return re.findall(r"[^\s│─]+", text)


def shown():
    return SHOWN.findall(TUTORIAL.read_text(encoding="utf-8"))


def test_what_is_inside_is_what_inspect_prints(model, monkeypatch):
    [(command, block)] = [(command, block) for command, block in shown() if command.startswith("inspect")]
    assert words(printed(command, model, monkeypatch)) == words(block)


@pytest.mark.slow
def test_the_plan_is_what_plan_prints(model, monkeypatch):
    [(command, block)] = [(command, block) for command, block in shown() if command.startswith("plan")]
    assert words(printed(command, model, monkeypatch)) == words(block)
