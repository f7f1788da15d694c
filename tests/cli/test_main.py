import json
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import coterie
from coterie.cli.main import app
from coterie.errors import CoterieError

COMMANDS = (
    "inspect", "calibrate", "profile", "price", "frontier", "plan", "compress", "export", "imatrix", "route", "pack",
    "run",
    "serve", "evaluate", "card", "push", "bench", "report", "recipes", "families",
)  # fmt: skip


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def program(*arguments, **options):
    command = [sys.executable, "-m", "coterie.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_help_lists_all_commands_and_each_has_its_own():
    result = run("--help")
    assert result.exit_code == 0
    listed = re.findall(r"^  (\w+)  +(\S.*)$", result.stdout.partition("Commands:")[2], flags=re.MULTILINE)
    assert tuple(name for name, _ in listed) == COMMANDS
    assert not any(summary.endswith("...") for _, summary in listed), "a summary is cut"
    for name in COMMANDS:
        own = run(name, "-h")
        assert own.exit_code == 0
        assert "--json" in own.stdout


def test_version_is_the_package_s():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"coterie {coterie.__version__}\n")


def test_the_installed_program_is_main():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"coterie": "coterie.cli.main:main"}


def test_help_takes_less_than_a_third_of_a_second_of_cpu_time():
    def cpu_seconds():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    taken = []
    for _ in range(5):
        before = cpu_seconds()
        assert program("--help").returncode == 0
        taken.append(cpu_seconds() - before)
    assert min(taken) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspct",), "No such command 'inspct'. Did you mean 'inspect'?"),
        (("evalute", "m"), "Did you mean 'evaluate'?"),
        (("inspect",), "Missing argument 'MODEL'"),
        (("inspect", "m", "--budgt", "1GiB"), "--budget"),
        (("profile", "m", "out"), "Missing option '--text'"),
        (("plan", "m", "--keep", "half"), "Invalid value for '--keep'"),
        (("plan", "m", "--keep", "0.5", "--router", "maps"), "maps"),
        (
            ("plan", "m"),
            "--active-params, --bits, --type: say how small with exactly one of them; got none",
        ),
        (("plan", "m", "--keep", "0.5", "--experts", "4"), "exactly one of them; got --keep and --experts"),
        (("compress", "m", "o"), "exactly one of them; got none"),
        (("compress", "m", "o", "--experts", "4", "--budget", "1GiB"), "got --experts and --budget"),
        (("evaluate", "--text", "t"), "Missing argument 'MODEL'"),
        (("evaluate", "a", "b", "--text", "t", "--out", "card.json"), "2 models have 2 scorecards: name a folder"),
        (("evaluate", "x/m", "x/m", "--text", "t", "--out", "cards"), "need distinct names"),
    ],
)
def test_a_command_line_that_is_not_understood_ends_with_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert not result.stdout
    assert message in re.sub(r"\s+", " ", result.stderr)


def test_an_error_is_one_message_without_traceback_unless_asked_for(tmp_path, monkeypatch):
    missing = tmp_path / "nothing"
    result = run("inspect", missing)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert (
        result.stderr
        == f"error: {missing} does not exist; pass a folder with config.json and *.safetensors, or a hub id\n"
    )
    assert isinstance(run("--debug", "inspect", missing).exception, CoterieError)
    monkeypatch.setenv("COTERIE_DEBUG", "1")
    assert isinstance(run("inspect", missing).exception, CoterieError)


def test_a_traceback_goes_to_standard_error(tmp_path):
    done = program("--debug", "inspect", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" in done.stderr
    assert "NotACheckpoint" in done.stderr


def test_file_system_errors_are_messages_too(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr("coterie.model.arch.inspect.inspect", refuse)
    result = run("inspect", tmp_path)
    assert (result.exit_code, result.stderr) == (1, "error: Permission denied: some/file\n")


def test_a_mistake_of_ours_is_not_hidden(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("coterie.model.arch.inspect.inspect", fail)
    assert isinstance(run("inspect", tmp_path).exception, ZeroDivisionError)


def test_an_interrupt_ends_with_130(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("coterie.model.arch.inspect.inspect", interrupt)
    result = run("inspect", tmp_path)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_inspect_imports_nothing_heavy(tiny):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "coterie.cli.main", "inspect", tiny(), "--json"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "coterie" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "safetensors", "matplotlib", "rich"}
    assert json.loads(done.stdout)["model_type"] == "olmoe"


def test_a_reader_that_goes_away_is_no_error_of_ours(tiny):
    command = [sys.executable, "-m", "coterie.cli.main", "inspect", str(tiny()), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
