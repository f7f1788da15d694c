"""A compression that is killed at random moments goes on, and its result has the bytes of one that was not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.testing import tiny_checkpoint, tiny_text

KILLER = Path(__file__).with_name("killer.py")


def kill_often(work: Path, kills: int, *options: str, layers: int = 4) -> dict[str, object]:
    model = tiny_checkpoint(work / "model", "qwen3_moe", num_hidden_layers=layers)
    text = tiny_text(work / "text", documents=4)
    (work / "runs").mkdir()
    command = [sys.executable, str(KILLER), str(model), str(text), str(work / "runs"), str(kills), "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and kill -9")
@pytest.mark.parametrize("inputs", ["compressed", pytest.param("original", marks=pytest.mark.slow)])
def test_killed_a_few_times(tmp_path, inputs):
    check(kill_often(tmp_path, 4, f"inputs={inputs}"), 4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and kill -9")
@pytest.mark.parametrize("options", [("inputs=original",), ("inputs=compressed",), ("router=map",)], ids="-".join)
def test_killed_fifty_times_in_every_stage(tmp_path, options):
    report = kill_often(tmp_path, 50, *options, layers=6)
    check(report, 50)
    assert len(report["steps"]) >= 5, report


def check(report: dict[str, object], kills: int) -> None:
    assert report["failed"] == 0, report
    assert report["differing"] == [], report
    assert report["kills"] == kills
    assert report["left"] == ["out", "undisturbed"], "nothing hidden stays behind"
