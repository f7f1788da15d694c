"""What needs no torch is answered without importing it: lists, and refusals of what cannot be."""

import subprocess
import sys

import pytest

from some import first

HEAVY = {"torch", "transformers", "scipy"}


def answer(*arguments):
    """Run coterie in a fresh interpreter; return the exit code, what it said, and the packages that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "coterie.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stderr.splitlines()
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    said = done.stdout + "\n".join(line for line in lines if not line.startswith("import time:"))
    return done.returncode, said, loaded


def test_recipes_are_listed_without_torch():
    code, said, loaded = answer("recipes")
    assert code == 0
    assert "heapr-ragged" in said
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", [("plan",), ("compress", "{out}")])
@pytest.mark.parametrize(
    ("options", "says"),
    first(
        3,
        [
            (("--keep", 0.5, "--recipe", "nowhere:RECIPE"), "cannot be imported"),
            (("--budget", "12GX", "--recipe", "reap"), "unknown unit 'GX'"),
            (("--keep", 2), "must be above 0 and at most 1"),
            (("--keep", 0.5, "--recipe", "reep"), "unknown recipe 'reep'; did you mean"),
            (("--experts", 4, "--recipe", "heapr"), "say how small with --keep, --width, --budget, --params or"),
            (("--keep", 0.5, "--recipe", "reap", "--router", "map"), "there is nothing to map"),
            (("--keep", 0.5, "--recipe", "mergemoe+protect"), "drops no experts"),
        ],
    ),
)
def test_a_wrong_option_is_refused_without_torch(tiny, tmp_path, command, options, says):
    arguments = [part.format(out=tmp_path / "out") for part in command]
    code, said, loaded = answer(arguments[0], tiny(), *arguments[1:], *options)
    assert (code, says in said) == (1, True), said
    assert not loaded & HEAVY


def test_what_is_no_model_is_refused_without_torch(tmp_path):
    (tmp_path / "empty").mkdir()
    for model, says in (("nowhere", "does not exist"), ("empty", "has no config.json")):
        code, said, loaded = answer("plan", tmp_path / model, "--keep", 0.5)
        assert (code, says in said) == (1, True), said
        assert not loaded & HEAVY


def test_training_that_cannot_be_is_refused_without_torch(tiny, tmp_path):
    for options, says in (
        (("--recipe", "reap", "--train-tokens", 64), "trains nothing"),
        (("--train-tokens", -1), "0 or more"),
    ):
        code, said, loaded = answer("compress", tiny(), tmp_path / "out", "--keep", 0.5, *options)
        assert (code, says in said) == (1, True), said
        assert not loaded & HEAVY
