"""What free memory decides is decided once: recorded, shown, and kept to by a run that goes on."""

import logging
from pathlib import Path
from typing import Any

import pytest

from checkpoints import weight_digests
from coterie import compress
from coterie.compress.apply import Result
from coterie.compress.recipes import EFFORTS
from coterie.errors import NotEnoughMemory, StaleArtifact
from coterie.journal import Run
from coterie.model.disk.manifest import Manifest

SETTINGS: dict[str, Any] = {
    "keep": 0.5, "recipe": "coterie", "tokens": 256, "seq_len": 16, "sample_tokens": 64, "effort": "balanced",
}  # fmt: skip


@pytest.fixture(autouse=True)
def little_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EFFORTS, "balanced", 128)


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Say that so much memory is free."""
    monkeypatch.setattr("coterie.model.stream.memory.free_bytes", lambda device: num_bytes)


def interrupt(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, text: Path, **options: Any) -> None:
    """Begin a compression, and stop it after its first step."""
    real = Run.finish

    def finish(self: Run, *arguments: Any, **more: Any) -> Any:
        real(self, *arguments, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            compress(model, out, text=text, **SETTINGS | options)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Path:
    folder: Path = tiny()
    return folder


@pytest.mark.long
def test_a_run_that_began_without_training_goes_on_without(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free(monkeypatch, 2**20)
    interrupt(monkeypatch, model, tmp_path / "out", text)
    assert "more than was free: training is left out" in caplog.text
    free(monkeypatch, 2**50)
    result = compress(model, tmp_path / "out", text=text, **SETTINGS)
    assert "training is left out, as when the run began: training the result as a whole takes at most" in caplog.text
    manifest = Manifest.read(result.out)
    assert manifest is not None
    assert manifest.distilled is None
    assert manifest.left_out["distill"].endswith(" of memory, more than was free")
    fast = compress(model, tmp_path / "fast", text=text, **SETTINGS | {"effort": "fast"})
    assert weight_digests(fast.out) == weight_digests(result.out)
    assert not fast.manifest.left_out  # nobody asked for it


def test_a_run_that_began_with_training_goes_on_with_it(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free(monkeypatch, 2**50)
    interrupt(monkeypatch, model, tmp_path / "out", text)
    free(monkeypatch, 2**20)
    with pytest.raises(NotEnoughMemory, match="--max-memory allows 1"):
        compress(model, tmp_path / "out", text=text, max_memory="1GiB", **SETTINGS | {"seq_len": 16_384})
    result: Result = compress(model, tmp_path / "out", text=text, **SETTINGS)
    assert "it was decided when the run began that it trains" in caplog.text
    assert result.manifest.distilled is not None
    assert not result.manifest.left_out


def test_tokens_that_were_asked_for_by_number_are_not_left_out(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 2**20)
    with pytest.raises(NotEnoughMemory, match=r"more than was free; give fewer --seq-len, --train-tokens 0"):
        compress(model, tmp_path / "out", text=text, **SETTINGS | {"train_tokens": 128})
    interrupt(monkeypatch, model, tmp_path / "out", text)
    free(monkeypatch, 2**50)
    with pytest.raises(StaleArtifact, match="distill"):  # the number says that it is to be trained
        compress(model, tmp_path / "out", text=text, **SETTINGS | {"train_tokens": 128})


def test_a_run_says_its_stages_and_how_long_they_take(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free(monkeypatch, 2**50)
    monkeypatch.setattr("coterie.progress.SHORT", 0.0)
    with caplog.at_level(logging.INFO, logger="coterie.progress"):
        compress(model, tmp_path / "out", text=text, **SETTINGS)
    said = [record.getMessage() for record in caplog.records if record.name == "coterie.progress"]
    names = ("measuring", "compressing", "predicting", "predicting: head", "training", "checking")
    stages = [line.partition(";")[0] for line in said if not line.startswith("time: ")]
    assert stages == [f"{number} of 6: {name}" for number, name in enumerate(names, start=1)]
    [forecast] = [line for line in said if line.startswith("time: ")]
    parts = forecast.partition(": about")[2].partition(": ")[2].split(", ")
    assert len(parts) == 6
    assert all(part.startswith(name) for part, name in zip(parts, names, strict=True))
