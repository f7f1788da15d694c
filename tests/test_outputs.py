"""Every command that writes, given every place that it must not write to: nothing is lost, and nothing is computed."""

import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import coterie
from conftest import digests
from coterie.bench.run import _may_go_on as may_go_on
from coterie.cli.main import app
from coterie.compress.patterns import patterns
from coterie.errors import InputError, OutputExists
from coterie.evaluate.scorecard import Scorecard
from coterie.outputs import check_output, claim_output, is_artifact
from coterie.report.page import report
from manifests import manifest_of

#: Command -> its line, and the places (see below) that it may write to, or that say nothing about it.
COMMANDS = {
    "plan": ("plan {model} --keep 0.5 --recipe hc-smoe --out {place}", "in the text, in the profile"),
    "plan with a profile": ("plan {model} {profile} --keep 0.5 --recipe reap --out {place}", "in the text"),
    "card": (
        "card {result} --out {place}",
        "in the model, in the model through a link, in the text, in the profile",
    ),
    "report": ("report {run} --out {place}", "in the model, in the model through a link, in the text"),
    "evaluate": ("evaluate {model} --text {text} --questions 0 --out {place}", "the profile, in the profile"),
    "evaluate, the base": (
        "evaluate {copy} --against {model} --text {text} --out {place}",
        "the profile, in the profile",
    ),
    "profile": ("profile {model} {place} --text {text}", "in the profile, in no folder"),
    "compress": ("compress {model} {place} --keep 0.5 --profile {profile} --text {text}", "in no folder"),
    "compress, its profile": (
        "compress {model} {free} --keep 0.5 --text {text} --profile {place}",
        "the profile, in the profile, in no folder",
    ),
    "bench": ("bench {model} {place} --text {text} --test {text}", "in the profile, in no folder"),
    "calibrate": (
        "calibrate {model} --generate {place} --tokens 64 --seq-len 16",
        "the run, the profile, in the text, in the profile, in no folder",
    ),
}  # fmt: skip

#: What is named as the output -> where that is, and what is said.
PLACES = {
    "the weights": ("model/model.safetensors", "exists|is not a folder"),
    "the config": ("model/config.json", "exists|is not a folder"),
    "the model": ("model", "is a folder|exists|inside the model folder"),
    "the run": ("run.json", "is a folder|exists"),
    "the profile": ("run.json/profile", "is a folder|exists|inside the profile"),
    "somebody's file": ("notes.json", "exists|is not a folder"),
    "in the model": ("model/new.json", "inside the model folder"),
    "in the model through a link": ("model link/new.json", "inside the model folder"),
    "in the text": ("text/new.json", "inside the text folder"),
    "in the profile": ("run.json/profile/new.json", "inside the profile"),
    "a link to the weights": ("weights link.json", "exists|is not a folder"),
    "a link that leads nowhere": ("loose link.json", "exists|is not a folder"),
    "below a file": ("notes.json/new.json", "is not a folder"),
    "in no folder": ("nowhere/new.json", "is not a folder; make it first"),
}


@pytest.fixture(scope="module")
def made(tiny, text, tmp_path_factory):
    """Return a ground of a model, text, and a run with a profile, a plan and a scorecard; copy it to change it."""
    ground = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny(), ground / "model")
    shutil.copytree(text, ground / "text")
    run = ground / "run.json"
    coterie.profile(ground / "model", run / "profile", text=text, tokens=512, seq_len=64, sample_tokens=64)
    coterie.plan(ground / "model", keep=0.5, recipe="hc-smoe").save(run / "plan.json")
    [card] = coterie.evaluate(ground / "model", text=text, tokens=512, seq_len=64, questions=0)
    card.save(run / "card.json")
    shutil.copytree(ground / "model", ground / "result")
    manifest_of().write(ground / "result", {})
    return ground


@pytest.fixture
def ground(made, tmp_path):
    ground = shutil.copytree(made, tmp_path / "ground")
    (ground / "notes.json").write_text('{"coterie": "mine", "kind": "plan"}', encoding="utf-8")
    (ground / "model link").symlink_to(ground / "model", target_is_directory=True)
    (ground / "weights link.json").symlink_to(ground / "model" / "model.safetensors")
    (ground / "loose link.json").symlink_to(ground / "gone")
    return ground


def arguments(command: str, ground: Path, place: Path) -> list[str]:
    folders = {"run": "run.json", "profile": "run.json/profile"}
    names = {
        name: str(ground / folders.get(name, name))
        for name in ("model", "copy", "text", "run", "profile", "free", "result")
    }
    return [word.format(**names, place=place) for word in COMMANDS[command][0].split(" ")]


def tree(ground: Path) -> dict[str, str]:
    """Return the digest of each file, and where each link leads."""
    links = {str(path.relative_to(ground)): str(path.readlink()) for path in ground.rglob("*") if path.is_symlink()}
    return digests(ground) | links


@pytest.mark.parametrize(
    ("command", "place"),
    [(name, place) for name, (_, skipped) in COMMANDS.items() for place in PLACES if place not in skipped.split(", ")],
)
def test_what_is_there_stays_and_nothing_is_computed(ground, monkeypatch, command, place):
    where, message = PLACES[place]
    before = tree(ground)
    monkeypatch.setattr("coterie.model.disk.checkpoint.Checkpoint.open", None)
    result = CliRunner().invoke(app, arguments(command, ground, ground / where))
    assert result.exit_code == 1, result.output or result.exception
    assert result.stdout == ""
    assert re.match(f"error: .*({message})", result.stderr)
    assert tree(ground) == before


@pytest.mark.parametrize("command", ["plan", "report", "evaluate", "card"])
def test_what_coterie_wrote_of_the_same_kind_is_replaced_and_said(ground, caplog, command):
    place = ground / "output.json"
    line = arguments(command, ground, place)
    if command == "evaluate":
        line += ["--tokens", "512", "--seq-len", "64"]
    kind = {"plan": "plan", "report": "page", "evaluate": "scorecard", "card": "card"}[command]
    first = CliRunner().invoke(app, line)
    assert first.exit_code == 0, first.output
    assert "replaced" not in caplog.text
    before = place.read_bytes()
    again = CliRunner().invoke(app, line)
    assert again.exit_code == 0, again.output
    assert [record.getMessage() for record in caplog.records if "replaced" in record.getMessage()] == [
        f"{place}: the {kind} that was there is replaced"
    ]
    assert place.read_bytes() == before


@pytest.mark.parametrize("change", ["another kind", "edited", "newer", "cut off"])
def test_an_artefact_that_is_not_what_coterie_would_write_stays(ground, change):
    file = ground / "run.json" / "plan.json"
    content = file.read_text(encoding="utf-8")
    if change == "another kind":
        content = (ground / "run.json" / "card.json").read_text(encoding="utf-8")
    elif change == "edited":
        content = content.replace('"seed": 0', '"seed": 1')
    elif change == "newer":
        content = content.replace('"format": 2', '"format": 99')
    else:
        content = content[: len(content) // 2]
    assert content != file.read_text(encoding="utf-8")
    file.write_text(content, encoding="utf-8")
    result = CliRunner().invoke(app, arguments("plan", ground, file))
    assert result.exit_code == 1
    assert (
        f"{file} exists; choose another place or remove it: only a plan that coterie wrote is replaced" in result.stderr
    )
    assert file.read_text(encoding="utf-8") == content
    with pytest.raises(OutputExists):
        coterie.plan(ground / "model", keep=0.5, recipe="hc-smoe").save(file)
    assert file.read_text(encoding="utf-8") == content


def test_what_is_saved_from_python_replaces_no_file_of_another_kind(ground):
    weights = ground / "model" / "model.safetensors"
    profile = coterie.Profile.load(ground / "run.json" / "profile")
    plan = coterie.Plan.load(ground / "run.json" / "plan.json")
    card = Scorecard.load(ground / "run.json" / "card.json")
    found = patterns(profile, 4)
    (ground / "other").mkdir()
    (ground / "other" / "profile.json").write_text("mine", encoding="utf-8")
    before = tree(ground)
    for save in (plan.save, card.save, found.save, lambda place: report(ground / "run.json", place)):
        for place in (weights, ground / "weights link.json", ground / "notes.json"):
            with pytest.raises(OutputExists, match=r"only a .* that coterie wrote is replaced"):
                save(place)
    with pytest.raises(OutputExists, match="only a profile that coterie wrote is replaced"):
        profile.save(ground / "other")
    with pytest.raises(OutputExists, match="is a folder; name the file to write"):
        plan.save(ground / "other")
    assert tree(ground) == before


def test_a_report_is_not_drawn_into_a_checkpoint_that_it_reads(ground):
    (ground / "run.json" / "half").mkdir()
    (ground / "run.json" / "half" / "coterie.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="inside the model folder"):
        report(ground / "run.json", ground / "run.json" / "half" / "page.html")
    with pytest.raises(InputError, match="inside the profile"):
        report(ground / "run.json" / "profile")


def test_generated_text_replaces_no_file_beside_it(ground):
    for name in ("self.json", "self.jsonl", "self.txt"):
        folder = ground / f"beside {name}"
        folder.mkdir()
        (folder / name).write_text("mine", encoding="utf-8")
        result = CliRunner().invoke(app, arguments("calibrate", ground, folder))
        assert (result.exit_code, [file.read_text() for file in folder.iterdir()]) == (1, ["mine"])
        assert f"{folder / name} exists" in result.stderr


@pytest.mark.parametrize(
    ("names", "goes_on"),
    [
        ((), True), ((".lock",), True), ((".lock", "work", "cache"), True), ((".lock", "cells.jsonl", "notes"), True),
        (("work", "cache"), False), ((".lock", "work", "notes"), False), (("cells.jsonl",), False),
    ],
)  # fmt: skip
def test_a_bench_goes_on_only_in_the_folder_of_one(tmp_path, names, goes_on):
    for name in names:
        (tmp_path / name).touch()
    assert may_go_on(tmp_path) is goes_on


def test_an_artefact_is_known_without_reading_what_is_none(tmp_path):
    large = tmp_path / "weights"
    with large.open("wb") as file:
        file.truncate(2**40)  # a sparse file, larger than any memory
    assert not is_artifact(large, kind="plan")
    os.mkfifo(tmp_path / "pipe")
    assert not is_artifact(tmp_path / "pipe", kind="plan")


def test_a_hub_id_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reads = {"model folder": ["owner/name", None, Path("nowhere")]}
    assert check_output("plan.json", kind="plan", reads=reads) == Path("plan.json")


def test_a_home_folder_and_a_new_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/plan.json", kind="plan") == tmp_path / "plan.json"
    assert claim_output("~/new/plan.json", kind="plan") == tmp_path / "new" / "plan.json"
    assert list(tmp_path.iterdir()) == [], "nothing is made"


def test_a_place_that_is_not_writable_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("coterie.outputs.os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match=r"plan\.json cannot be written: .* is not writable"):
        check_output(tmp_path / "plan.json", kind="plan")
