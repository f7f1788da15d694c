"""Same model, text, seed and number of threads: same bytes; the number is recorded, and a resumed run keeps to it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import weight_digests
from coterie import compress
from coterie.journal import Run
from coterie.model.disk.manifest import Manifest
from coterie.model.numerics import as_begun, numerics
from coterie.profile.profile import Profile

ROOT = Path(__file__).resolve().parents[2]
#: Large enough for sums in another order to show.
SIZES = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
SETTINGS: dict[str, Any] = {
    "keep": 0.5, "recipe": "mergemoe", "tokens": 1024, "seq_len": 64, "sample_tokens": 512,
}  # fmt: skip


@pytest.fixture
def threads() -> Any:
    """Return a function that sets the number of threads; it is 1 again after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Path:
    folder: Path = tiny(**SIZES)
    return folder


@pytest.mark.long
def test_equal_threads_give_equal_bytes_and_are_recorded(
    model: Path, text: Path, tmp_path: Path, threads: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    threads(2)
    whole = compress(model, tmp_path / "whole", text=text, profile=tmp_path / "profile", **SETTINGS)
    expected = {"torch": torch.__version__, "device": "cpu", "threads": 2}
    manifest = Manifest.read(whole.out)
    assert manifest is not None
    assert manifest.numerics == expected
    assert Profile.load(tmp_path / "profile").numerics == expected

    real = Run.finish

    def finish(self: Run, *arguments: Any, **more: Any) -> Any:
        step = real(self, *arguments, **more)
        if len(self.finished) == 2:
            raise KeyboardInterrupt
        return step

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            compress(model, tmp_path / "out", text=text, **SETTINGS)
    threads(1)
    again = compress(model, tmp_path / "out", text=text, **SETTINGS)
    assert torch.get_num_threads() == 1
    assert again.manifest.numerics["threads"] == 2
    assert weight_digests(again.out) == weight_digests(whole.out)


def test_another_torch_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with as_begun(numerics("cpu") | {"torch": "1.0"}, "cpu", what="the profile x"):
        pass
    assert (
        f"the profile x was begun with torch 1.0 and goes on with {torch.__version__}: bytes may differ" in caplog.text
    )


@pytest.mark.parametrize("number", [0, -1, 10**9, "two", None, 1.5])
def test_a_number_of_threads_that_cannot_be_is_not_taken(number: object) -> None:
    with as_begun(numerics("cpu") | {"threads": number}, "cpu", what="x") as computed_with:
        assert computed_with["threads"] == torch.get_num_threads() == 1


COMPRESS = """
import sys
from coterie import compress
compress(sys.argv[1], sys.argv[2], text=sys.argv[3], keep=0.5, recipe="mergemoe", tokens=16384, seq_len=512)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_the_reference_model_in_processes_of_their_own(tmp_path: Path, number: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(number), "PYTHONPATH": str(ROOT / "src")}
    for name in ("one", "two"):
        arguments = [ROOT / "reference/model", tmp_path / name, ROOT / "reference/text/calibration"]
        subprocess.run([sys.executable, "-c", COMPRESS, *map(str, arguments)], check=True, env=environment)
    manifest = Manifest.read(tmp_path / "one")
    assert manifest is not None
    assert manifest.numerics["threads"] == number
    assert weight_digests(tmp_path / "one") == weight_digests(tmp_path / "two")
    assert (tmp_path / "one/coterie.json").read_bytes() == (tmp_path / "two/coterie.json").read_bytes()
