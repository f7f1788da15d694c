"""What all commands have in common: grouped help, how much is said, completion."""

import logging
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from coterie import progress
from coterie.cli.command import PANELS
from coterie.cli.main import app
from coterie.compress.recipes import RECIPES
from coterie.errors import CoterieError
from coterie.testing.facts import known_families

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")
    logger, handler = logging.getLogger("coterie"), logging.lastResort
    before = logger.level, handler.level, handler.formatter
    yield
    logger.setLevel(before[0])
    handler.setLevel(before[1])
    handler.setFormatter(before[2])
    progress.show_bars(True)


def sections(text):
    """Return the help's headings, each with the options under it."""
    named: dict[str, list[str]] = {}
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z][\w ]+:", line):
            named[line.removesuffix(":")] = []
        elif (option := re.match(r"  (?:-\w, )?(--[\w-]+)", line)) is not None:
            named[list(named)[-1]].append(option[1])
    return named


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_option_has_its_place_in_the_help(name, option):
    result = CliRunner().invoke(app, [name, option])
    assert result.exit_code == 0
    listed = sections(result.stdout)
    assert [panel for panel in listed if panel != "Arguments"] == [p for p in (*PANELS, "Options") if p in listed]
    # An option that is not in a group of coterie.cli.command.PANELS yet stands here: give it a group there.
    assert listed["Options"] == ["--quiet", "--verbose", "--debug", "--help"]
    own = {option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")}
    assert own == {option for panel in PANELS for option in listed.get(panel, ())}


def test_the_groups_name_each_option_once_and_none_that_is_gone():
    names = [name for panel in PANELS.values() for name in panel]
    assert len(names) == len(set(names))
    assert set(names) <= {parameter.name for command in COMMANDS.values() for parameter in command.params}


@pytest.mark.parametrize("line", ["{} inspect M", "inspect {} M", "inspect M {}", "inspect M --json {}"])
class TestBeforeAndAfter:
    def test_debug_shows_the_traceback(self, line, tmp_path):
        words = line.replace("M", str(tmp_path / "nothing")).format("--debug").split()
        assert isinstance(CliRunner().invoke(app, words).exception, CoterieError)

    @pytest.mark.parametrize(
        ("options", "level", "bars"),
        [
            (("-q",), logging.WARNING, False),
            (("--quiet",), logging.WARNING, False),
            ((), logging.INFO, True),
            (("-v",), logging.DEBUG, True),
            (("--verbose",), logging.DEBUG, True),
        ],
    )
    def test_quiet_and_verbose_say_less_and_more(self, line, options, level, bars, tiny, monkeypatch):
        words = [word for part in line.split() for word in ([*options] if part == "{}" else [part])]
        result = CliRunner().invoke(app, [str(tiny()) if word == "M" else word for word in words])
        assert result.exit_code == 0
        assert logging.getLogger("coterie").level == logging.lastResort.level == level
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        assert progress.are_bars_drawn() is bars

    def test_both_are_a_contradiction(self, line):
        result = CliRunner().invoke(app, line.format("-q -v").split())
        assert (result.exit_code, result.stdout) == (2, "")
        assert "--quiet and --verbose" in result.stderr


def test_one_before_and_one_after_are_a_contradiction_too():
    assert CliRunner().invoke(app, ["-q", "recipes", "-v"]).exit_code == 2


def test_an_option_of_one_run_is_not_that_of_the_next(tmp_path):
    assert isinstance(CliRunner().invoke(app, ["inspect", str(tmp_path), "--debug"]).exception, CoterieError)
    assert CliRunner().invoke(app, ["inspect", str(tmp_path)]).exit_code == 1


def test_debug_holds_for_what_goes_wrong_while_options_are_read(tmp_path):
    words = ["profile", str(tmp_path), "out", "--text", "t", "--device", "nowhere", "--debug"]
    assert isinstance(CliRunner().invoke(app, words).exception, CoterieError)


def test_what_is_said_has_its_origin_on_request(capsys):
    def said(*options):
        assert CliRunner().invoke(app, ["recipes", *options]).exit_code == 0
        lines = []
        for level, text in ((logging.DEBUG, "detail"), (logging.INFO, "note"), (logging.WARNING, "odd")):
            record = logging.LogRecord("coterie.part", level, "file", 1, text, None, None)
            if level >= logging.lastResort.level:
                lines.append(logging.lastResort.format(record))
        return [re.sub(r"^ *-?\d+\.\d s", "T s", line) for line in lines]

    assert said("-q") == ["warning: odd"]
    assert said() == ["note", "warning: odd"]
    assert said("-v") == [
        "T s  coterie.part: detail", "T s  coterie.part: note", "T s  coterie.part: warning: odd",
    ]  # fmt: skip


def completed(*words):
    """Return what bash offers for the last word, and the packages that were imported for it."""
    line = {"_COTERIE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "coterie.cli.main"],
        env=os.environ | line, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    loaded = {each.rpartition("|")[2].strip().partition(".")[0] for each in done.stderr.splitlines()}
    assert "coterie" in loaded
    assert not loaded & {"torch", "transformers", "scipy", "numpy"}
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("coterie", "comp"), ["compress"]),
        (("coterie", "compress", "M", "O", "--recipe", "heapr"), [n for n in RECIPES if n.startswith("heapr")]),
        (("coterie", "bench", "M", "O", "--recipes", "reap,reap"), []),
        (("coterie", "bench", "M", "O", "--recipes", "naee,reap"), ["naee,reap"]),
        (("coterie", "bench", "M", "O", "--routers", "plain,m"), ["plain,map", "plain,mean"]),
        (("coterie", "profile", "M", "O", "--statistics", "usage,hessian"),
         ["usage,hessian_hidden", "usage,hessian_input"]),
        (("coterie", "families", "mix"), [f.model_type for f in known_families().families
                                          if f.model_type.startswith("mix")]),
        (("coterie", "evaluate", "M", "--deb"), ["--debug"]),
    ],
)  # fmt: skip
def test_a_shell_completes_names_without_torch(words, offered):
    assert sorted(completed(*words)) == sorted(offered)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_is_shown_and_installed(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: (shell, f"/bin/{shell}"))
    shown = CliRunner().invoke(app, ["--show-completion"], prog_name="coterie")
    assert (shown.exit_code, "_COTERIE_COMPLETE" in shown.stdout) == (0, True)
    installed = CliRunner().invoke(app, ["--install-completion"], prog_name="coterie")
    assert installed.exit_code == 0, installed.output
    assert any("_COTERIE_COMPLETE" in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
