"""What can go wrong around a compression, from folder to folder: nothing is lost, mixed in or written elsewhere.

Runs are interrupted in process, after a given number of finished steps; `test_kill` does it with SIGKILL.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coterie import compress
from coterie.artifact import file_digest
from coterie.compress import layers as layers_module
from coterie.errors import OutputBusy, StaleArtifact
from coterie.journal import Run
from coterie.model.disk.checkpoint import Checkpoint
from coterie.publish.hub import RUN_FILE
from coterie.testing import tiny_checkpoint, tiny_text
from some import first

LAYERS = 3
#: Steps of a run: a layer's profile each, the profile, a layer's weights each, the rest.
STEPS = 2 * LAYERS + 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    tiny_checkpoint(folder / "model", "qwen3_moe", num_hidden_layers=LAYERS)
    tiny_text(folder / "text", documents=4)
    make(folder, folder / "whole")
    return folder


def make(place, out, **options):
    settings = {"experts": 4, "recipe": "mergemoe", "text": place / "text", "tokens": 1024, "seq_len": 64} | options
    return compress(settings.pop("model", place / "model"), out, **settings)


def interrupt(place, out, steps, **options):
    """Start the same run and stop it, as with Ctrl-C, when so many steps are finished."""
    real, count = Run.finish, 0

    def finish(self, *arguments, **more):
        nonlocal count
        step = real(self, *arguments, **more)
        count += 1
        if count == steps:
            raise KeyboardInterrupt
        return step

    Run.finish = finish
    try:
        with pytest.raises(KeyboardInterrupt):
            make(place, out, **options)
    finally:
        Run.finish = real
    assert not out.exists()
    return out.with_name(f".{out.name}.partial")


def digests(folder):
    return {file.name: file_digest(file) for file in sorted(folder.iterdir()) if file.name != RUN_FILE}


@pytest.mark.parametrize("steps", first(3, [1, 3, STEPS, *(step for step in range(2, STEPS) if step != 3)]))
def test_stopped_after_any_step_it_goes_on_from_there(place, tmp_path, steps, monkeypatch):
    out = tmp_path / "out"
    interrupt(place, out, steps)
    finished = []
    real = Run.finish
    monkeypatch.setattr(Run, "finish", lambda self, step, **more: finished.append(step) or real(self, step, **more))
    make(place, out)
    assert len(finished) == STEPS - steps, finished
    assert digests(out) == digests(place / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
def test_sequential_calibration_goes_on_with_the_same_bytes(place, tmp_path):
    make(place, tmp_path / "whole", inputs="compressed")
    for steps in range(1, LAYERS + 2):
        out = tmp_path / f"out{steps}"
        interrupt(place, out, steps, inputs="compressed")
        make(place, out, inputs="compressed")
        assert digests(out) == digests(tmp_path / "whole")
    assert digests(tmp_path / "whole") != digests(place / "whole")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


def truncate(file):
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


DAMAGE = {"flip": flip, "truncate": truncate, "remove": Path.unlink}
DAMAGED = ["result/model-00002*.safetensors", "private/profile-layer-00001*", "private/profile.json"]


@pytest.mark.parametrize(
    ("damage", "what"),
    [  # each way and each file in the fast tests, every way for every file in the slow ones
        pytest.param(DAMAGE[way], what, id=f"{way}-{what}", marks=() if one == other else pytest.mark.slow)
        for one, way in enumerate(DAMAGE)
        for other, what in enumerate(DAMAGED)
    ],
)
def test_a_damaged_step_is_done_again(place, tmp_path, damage, what, caplog):
    out = tmp_path / "out"
    partial = interrupt(place, out, STEPS - 1)
    [file] = partial.glob(what)
    damage(file)
    make(place, out)
    assert "is missing or was changed; that step is done again" in caplog.text
    assert digests(out) == digests(place / "whole")


CHANGES = {
    "another recipe": {"recipe": "reap"},
    "another size": {"experts": 5},
    "another seed": {"seed": 1},
    "another amount of text": {"tokens": 512},
    "other inputs": {"inputs": "compressed"},
}


@pytest.mark.long
@pytest.mark.parametrize("options", first(2, (pytest.param(each, id=name) for name, each in CHANGES.items())))
def test_other_settings_are_never_mixed_in(place, tmp_path, options):
    out = tmp_path / "out"
    partial = interrupt(place, out, STEPS - 2)
    before = {path: path.stat().st_mtime_ns for path in partial.rglob("*")}
    with pytest.raises(StaleArtifact, match=r"was .*, now"):
        make(place, out, **options)
    assert {path: path.stat().st_mtime_ns for path in partial.rglob("*")} == before
    make(place, out)  # the right settings still go on
    assert digests(out) == digests(place / "whole")


def test_another_text_or_model_in_the_same_place_is_noticed(place, tmp_path):
    for what in ("text", "model"):
        shutil.copytree(place / what, tmp_path / what)
    interrupt(tmp_path, tmp_path / "out", 3)
    file = tmp_path / "text" / "prose.txt"
    kept = file.read_text()
    file.write_text("Something else. " + kept)
    with pytest.raises(StaleArtifact, match="text was"):
        make(tmp_path, tmp_path / "out")
    file.write_text(kept)
    weights = tmp_path / "model" / "model.safetensors"
    with weights.open("r+b") as stream:  # one byte that no sample of the digest need meet
        stream.seek(-5, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-5, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    with pytest.raises(StaleArtifact, match="model"):
        make(tmp_path, tmp_path / "out")


def test_another_version_is_noticed(place, tmp_path, monkeypatch):
    interrupt(place, tmp_path / "out", 3)
    monkeypatch.setattr("coterie.__version__", "99.0")
    with pytest.raises(StaleArtifact, match=r"99\.0"):
        make(place, tmp_path / "out")


SECOND_RUNS = {
    "journal": "from coterie.journal import open_run\n"
    "def second(model, out, text):\n"
    "    with open_run(out, {}, what='compression'):\n"
    "        pass\n",
    "compression": "from coterie import compress\n"
    "def second(model, out, text):\n"
    "    compress(model, out, experts=4, recipe='mergemoe', text=text, tokens=1024, seq_len=64)\n",
}


@pytest.mark.parametrize("second", ["journal", pytest.param("compression", marks=pytest.mark.slow)])
def test_a_second_run_on_one_out_is_refused(place, tmp_path, monkeypatch, second):
    """The second run is another process, started while the first is in the middle of a layer."""
    script = SECOND_RUNS[second] + (
        "import sys\n"
        "from pathlib import Path\n"
        "from coterie.errors import OutputBusy\n"
        "try:\n"
        "    second(*map(Path, sys.argv[1:]))\n"
        "except OutputBusy as error:\n"
        "    sys.exit(f'busy: {error}')\n"
    )
    said = []
    real = layers_module.compress_layer

    def slow(*arguments):
        if not said:
            command = [sys.executable, "-c", script, *map(str, (place / "model", tmp_path / "out", place / "text"))]
            said.append(subprocess.run(command, capture_output=True, text=True, check=False))
        return real(*arguments)

    monkeypatch.setattr(layers_module, "compress_layer", slow)
    make(place, tmp_path / "out")
    assert said[0].returncode == 1
    assert "busy: " in said[0].stderr
    assert str(tmp_path / "out") in said[0].stderr
    assert digests(tmp_path / "out") == digests(place / "whole")
    assert issubclass(OutputBusy, ValueError)


def test_links_to_a_hub_cache_are_followed_and_never_written(place, tmp_path):
    """The layout of huggingface_hub: snapshots/<revision>/<file> are links into blobs/."""
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((place / "model").iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (tmp_path / "link").symlink_to(snapshot)
    before = {blob.name: file_digest(blob) for blob in blobs.iterdir()}
    for blob in blobs.iterdir():
        blob.chmod(0o444)
    result = make(place, tmp_path / "out", model=tmp_path / "link")
    assert not any(file.is_symlink() for file in result.out.iterdir())
    assert {blob.name: file_digest(blob) for blob in blobs.iterdir()} == before
    weights = [name for name in digests(result.out) if name.endswith(".safetensors")]
    assert {name: digests(result.out)[name] for name in weights} == {
        name: digests(place / "whole")[name] for name in weights
    }


CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")


@pytest.fixture(scope="module")
def hooked():
    """Return two lists: folders to watch, and what changed something in them. Audit hooks stay for good."""
    watched, written = [], []

    def hook(event, arguments):
        if not watched or event not in ("open", *CHANGING) or isinstance(arguments[0], int):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        changes = event in CHANGING or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if changes and path.startswith(tuple(watched)):
            written.append(f"{event} {arguments}")

    sys.addaudithook(hook)
    return watched, written


def test_inputs_are_opened_for_reading_only(place, tmp_path, hooked):
    """An audit hook sees every file that Python opens; the model's and the text's are opened for reading."""
    watched, written = hooked
    watched += [str((place / name).resolve()) for name in ("model", "text")] + [str(tmp_path.resolve() / "seen")]
    try:
        make(place, tmp_path / "out", recipe="reap")
        assert written == []
        (tmp_path / "seen").touch()
        assert len(written) == 1, "the hook sees what writes"
    finally:
        watched.clear()
    assert Checkpoint.open(tmp_path / "out").num_bytes > 0
