"""benchmarks/first_steps.py: the commands of the README print today what the README shows."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("first_steps")


def words(text):
    """Return what is said, however it is laid out, and with a place for each number."""
    return NUMBER.sub("0", " ".join(re.findall(r"[^\s│─]+", text)))


def kept(script):
    """Return the commands that were kept with what they printed."""
    text = (ROOT / "benchmarks" / "first_steps.md").read_text(encoding="utf-8")
    assert text.startswith("```text\n$ ")
    assert text.endswith("\n```\n")
    blocks = text.removeprefix("```text\n$ ").removesuffix("\n```\n").split("\n\n$ ")
    return [tuple(block.split("\n", 1)) for block in blocks]


def test_the_commands_that_were_kept_are_those_that_are_run(script):
    assert tuple(command for command, _ in kept(script)) == script.COMMANDS
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in readme.splitlines() if line.startswith("$ coterie")] == [
        f"$ {command}" for command in script.COMMANDS
    ]


@pytest.mark.slow
def test_the_commands_of_the_readme_print_what_it_shows(script, bundled, tmp_path):
    for (command, before), now in zip(kept(script), script.run_commands(tmp_path), strict=True):
        assert words(now) == words(before), command
        # The difference after loading is of the order of rounding, and another on every machine.
        pairs = zip(NUMBER.findall(now), NUMBER.findall(before), strict=True)
        differing = [
            (a, b) for a, b in pairs if "e" not in a and float(a) != pytest.approx(float(b), rel=0.05, abs=0.5)
        ]
        assert differing == [], command
