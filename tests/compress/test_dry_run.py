"""What a dry run says is what a run takes, and it writes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import digests
from coterie import compress
from coterie.cli.main import app
from coterie.compress.dry_run import DryRun, dry_run
from coterie.errors import NotEnoughMemory, OutOfSpace, OutputExists
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile import dry_run as profile_dry_run
from coterie.profile.outlook import Pace, measured_pace, scaled
from coterie.progress import StageTime

SETTINGS: dict[str, Any] = {"keep": 0.5, "tokens": 256, "seq_len": 16, "sample_tokens": 64}


@pytest.fixture(scope="module")
def model(tiny: Any) -> Path:
    folder: Path = tiny()
    return folder


@pytest.fixture(scope="module")
def foretold(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    place = tmp_path_factory.mktemp("place")
    said = dry_run(model, place / "deep" / "out", text=text, train_tokens=128, **SETTINGS)
    assert list(place.iterdir()) == []
    return said


def test_it_says_what_a_run_announces(foretold: DryRun, model: Path, text: Path, tmp_path: Path) -> None:
    result = compress(model, tmp_path / "out", text=text, train_tokens=128, **SETTINGS)
    written = sum(info.num_bytes for info in Checkpoint.open(result.out).tensors.values())
    assert foretold.plan.predicted_bytes == foretold.outlook.disk["the result"] == written
    assert foretold.outlook.memory.num_bytes == result.forecast
    assert foretold.left_out == {}


def test_every_stage_has_a_time_and_memory(foretold: DryRun) -> None:
    outlook = foretold.outlook
    names = ["measuring", "compressing", "predicting", "predicting: head", "training", "checking"]
    assert [stage.name for stage in outlook.times] == names
    assert all(stage.seconds > 0 for stage in outlook.times)
    assert outlook.basis == "measured on the first 2 of 5 parts of the model, with 128 tokens"
    assert set(outlook.disk) == {
        "the result", "the profile, while it is made", "the original's predictions, while it trains",
        "the state of training, while it trains",
    }  # fmt: skip
    assert all(size > 0 for size in outlook.disk.values())
    assert outlook.free > 0
    assert set(outlook.content()["memory"]) == {stage.name for stage in outlook.memory.stages}


def test_what_a_run_would_be_refused_for_it_is_refused_for(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputExists):
        dry_run(model, tmp_path, text=text, **SETTINGS)
    with pytest.raises(NotEnoughMemory, match="--max-memory allows"):
        dry_run(model, tmp_path / "out", text=text, max_memory="1MiB", **SETTINGS)
    with pytest.raises(TypeError, match="nonsense"):
        dry_run(model, tmp_path / "out", text=text, nonsense=1, **SETTINGS)
    monkeypatch.setattr("coterie.compress.output.free_space", lambda place: (tmp_path, 1))
    with pytest.raises(OutOfSpace):
        dry_run(model, tmp_path / "out", text=text, **SETTINGS)


def test_text_that_the_model_would_write_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("text is written")

    monkeypatch.setattr("coterie.profile.text.write_text", refuse)
    said = dry_run(model, tmp_path / "out", text="self", recipe="reap", **SETTINGS)
    assert said.outlook.basis.endswith("; without the time that writing the text takes")


def test_a_pace_is_that_of_the_first_layers(model: Path) -> None:
    from coterie.model.arch.layers import Architecture
    from coterie.model.stream.stream import Stream
    from coterie.model.stream.work import BYTES_A_SECOND, unit_work

    checkpoint = Checkpoint.open(model)
    stream, layers = Stream(checkpoint), Architecture.of(checkpoint).layers
    ids_BS = torch.zeros(1, 8, dtype=torch.int64)
    times = iter([0.0, 3.0, 4.0, 6.0, 9.0])  # reading takes 3 and 2 seconds, computing 1 and 3
    pace = measured_pace(stream, layers, ids_BS, limit=None, clock=lambda: next(times))
    sizes = [stream.unit_bytes(unit) for unit in stream.units[:2]]
    assert pace.reading == pytest.approx(5 / (sum(sizes) / BYTES_A_SECOND))
    seconds = unit_work(stream, layers, tokens=8, base=True).seconds
    reckoned = sum(seconds[unit.name] for unit in stream.units[:2]) - sum(sizes) / BYTES_A_SECOND
    assert pace.computing == pytest.approx(4 / reckoned, rel=1e-3)
    large = measured_pace(stream, layers, ids_BS, limit=2 * max(sizes))
    assert (large.reading, large.computing) == (1, 1)
    assert "2.1 s for each GiB" in large.basis


def test_times_are_scaled_by_what_they_consist_of() -> None:
    [stage] = scaled([StageTime(name="a", seconds=10, reading=4, tokens=3)], Pace(reading=2, computing=3, basis=""))
    assert (stage.seconds, stage.reading, stage.tokens) == (26, 8, 3)


def test_a_profile_is_foretold_too(model: Path, text: Path, tmp_path: Path) -> None:
    said = profile_dry_run.dry_run(model, tmp_path / "profile", text=text, tokens=256, seq_len=16, sample_tokens=64)
    assert [stage.name for stage in said.times] == ["measuring"]
    assert said.disk["the profile"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["compress", "profile"])
def test_on_the_command_line(model: Path, text: Path, tmp_path: Path, command: str) -> None:
    options = ["--text", str(text), "--tokens", "256", "--seq-len", "16", "--sample-tokens", "64", "--dry-run"]
    options += ["--keep", "0.5", "--recipe", "reap"] * (command == "compress")
    before = digests(model)
    shown = CliRunner().invoke(app, [command, str(model), str(tmp_path / "out"), *options])
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert any(line.startswith("measuring a layer takes at most ") for line in lines)
    assert any(line.startswith("time: about ") for line in lines)
    assert any(line.startswith("disk: ") and line.endswith(" are free") for line in lines)
    assert lines[-1] == "dry run: nothing was written"
    content = json.loads(
        CliRunner().invoke(app, [command, str(model), str(tmp_path / "out"), *options, "--json"]).stdout
    )
    assert content["seconds_in_all"] >= 0
    assert content["disk_free"] > 0
    assert list(tmp_path.iterdir()) == []
    assert digests(model) == before
