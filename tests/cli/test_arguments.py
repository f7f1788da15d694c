"""Every option and argument of every command, given what it was not made for: one line or usage, never a traceback."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from coterie.bench import run as bench_run
from coterie.cli.main import app
from coterie.errors import InputError
from coterie.model.stream.stream import Stream
from coterie.profile import calibrate
from coterie.run import pack as packing
from coterie.run.engine import Runtime

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

#: A few that have broken something, for every run; and many.
FEW = ("", "nan", str(2**64), "a\x00b", "\udcff")
MANY = (
    *FEW, "-1", "9" * 5000, "~no-such-user/model", "/dev/null", " ", "0", "inf", "1e400", str(2**63), "9" * 400,
    "cuda:99", "cuda:-1", "meta", "mps", "x" * 300, "x" * 5000, "..", "=", ",", ":", "math=1e308,prose=1e308",
    "math=1e-320", "module:attribute", "json:dumps", "50%", "hf:", "hf:a/b:c:d:e", "hf:\udcff", "hf:a\x00b", "20",
    "٣",
)  # fmt: skip

#: How each command is called, M for the model, O for its output and T for the text.
CALLS = {
    "inspect": "M", "calibrate": "M --text T", "profile": "M O --text T", "price": "M O --text T", "frontier": "M O",
    "plan": "M --keep 0.5", "compress": "M O --keep 0.5 --text T", "evaluate": "M --text T",
    "bench": "M O --text T --test T --jobs 0", "card": "M", "push": "M owner/name", "export": "M O",
    "imatrix": "M O --text T", "route": "M O --experts-per-token 2 --profile T", "pack": "M O --bits 8",
    "run": "M prompt", "serve": "M --port 0", "report": "M", "recipes": "", "families": "",
}  # fmt: skip
TARGETS = ("--experts", "--width", "--budget", "--params", "--active-params", "--bits", "--type", "--plan")


def parameters() -> Iterator[Any]:
    """Yield (command, parameter) for all that take a value."""
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if not getattr(parameter, "is_flag", False):
                yield pytest.param(name, parameter, id=f"{name} {parameter.opts[0]}")


def line_of(name: str, parameter: Any, value: str, places: dict[str, str]) -> list[str]:
    """Return the command line with one value in it."""
    words = [places.get(word, word) for word in CALLS[name].split()]
    if parameter.param_type_name == "option":
        option = parameter.opts[0]
        if option in TARGETS and "--keep" in words:
            words = [word for word in words if word not in ("--keep", "0.5")]
        if option == "--generate":
            words = words[:1]
        return [name, *words, option, value]
    position = [each for each in COMMANDS[name].params if each.param_type_name == "argument"].index(parameter)
    words[position : position + 1] = [value]
    return [name, *words]


def test_every_command_is_called() -> None:
    assert COMMANDS.keys() == CALLS.keys()


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse where work would begin, so that no option starts any."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise InputError("here work would begin")

    monkeypatch.setattr(Stream, "__enter__", refuse)
    monkeypatch.setattr(bench_run, "open_pool", refuse)
    monkeypatch.setattr(calibrate, "write_text", refuse)
    monkeypatch.setattr(Runtime, "__init__", refuse)
    monkeypatch.setattr(packing, "open_run", refuse)


def check(name: str, parameter: Any, values: tuple[str, ...], model: Path, text: Path, folder: Path) -> None:
    places = {"M": str(model), "T": str(text), "O": str(folder / "place" / "out")}
    (folder / "place").mkdir()
    os.chdir(folder / "place")
    wrong = []
    # What these name is made, with the folders that it is in.
    makes = parameter.opts[0] in ("--out", "out", "--generate", "--profile", "--prices", "--picture", "prices", "file")
    for value in values:
        result = CliRunner().invoke(app, line_of(name, parameter, value, places))
        ended = result.exception is None or isinstance(result.exception, SystemExit)
        if not ended or result.exit_code not in (0, 1, 2, 130) or "Traceback" in result.output:
            wrong.append((value[:30], result.exit_code, repr(result.exception)[:200]))
        if result.exit_code == 1 and not (result.stderr.strip().isprintable() and len(result.stderr) < 3000):
            wrong.append((value[:30], result.exit_code, result.stderr[:200]))
        if not makes and (left := list((folder / "place").iterdir())):
            wrong.append((value[:30], result.exit_code, f"left {left}"))
    assert not wrong


@pytest.fixture
def kept_folder() -> Iterator[None]:
    before = Path.cwd()
    yield
    os.chdir(before)


@pytest.mark.usefixtures("no_work", "kept_folder")
@pytest.mark.parametrize(("name", "parameter"), list(parameters()))
def test_a_value_that_an_option_was_not_made_for(name: str, parameter: Any, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "prose.txt").write_text("some text " * 50, encoding="utf-8")
    check(name, parameter, FEW, tmp_path / "missing" / "model", text, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("no_work", "kept_folder")
@pytest.mark.parametrize(("name", "parameter"), list(parameters()))
def test_many_values_that_an_option_was_not_made_for(
    name: str, parameter: Any, tiny: Any, text: Path, tmp_path: Path
) -> None:
    check(name, parameter, MANY, tiny(), text, tmp_path)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan M --keep abc", "'abc' is no share; write 0.5 or 50%"),
        ("plan M --budget 20", "'20' has no unit, and 20 bytes hold no model; did you mean 20GiB?"),
        (
            "plan M --params 15GiB",
            "'15GiB' is no number of parameters; write a number like 15B (10^9)",
        ),
        ("plan M --active-params -1", "'-1' parameters are none; write a number like 15B"),
        (f"plan M --params {'9' * 5000}", "a number of 5000 digits is more than there is"),
        (f"plan M --budget {'9' * 5000}", "an amount of 5000 digits is more than there is"),
        ("plan M --keep 0.5 --seed -1", "seed -1 cannot be; give a whole number from 0 to"),
        (f"profile M O --text T --seed {2**64}", f"seed {2**64} cannot be; give a whole number from 0 to"),
        (f"evaluate M --text T --seed {2**64}", f"seed {2**64} cannot be"),
        (f"bench M O --text T --test T --seeds {2**63}", "draws of the text are too many; give --seeds 1000 at most"),
        ("inspect ~no-such-user/model", "the home folder of ~no-such-user is not known; write the path in full"),
        ("families nosuch", "unknown model family 'nosuch'"),
        ("families mixtal", "did you mean mixtral"),
    ],
)
def test_a_value_that_cannot_be_says_what_can(
    tiny: Any, text: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    places = {"M": str(tiny()), "T": str(text), "O": str(tmp_path / "out")}
    result = CliRunner().invoke(app, [places.get(word, word) for word in arguments.split()])
    assert result.exit_code in (1, 2), result.exception
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_share_may_be_a_percentage(tiny: Any) -> None:
    bodies = [CliRunner().invoke(app, ["plan", str(tiny()), "--json", "--keep", keep, "--recipe", "hc-smoe"])
              for keep in ("50%", "0.5")]  # fmt: skip
    assert bodies[0].stdout == bodies[1].stdout
    assert bodies[0].stderr == bodies[1].stderr
