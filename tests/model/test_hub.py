"""Hub ids: what is fetched of a model, and what is said when it cannot be."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.errors import Infeasible, NotACheckpoint, OutOfSpace
from coterie.model.arch.inspect import inspect
from coterie.model.disk.beside import belongs, files_beside
from coterie.model.disk.checkpoint import Checkpoint, resolve
from coterie.model.disk.manifest import Manifest
from coterie.model.disk.tokenizer import load_tokenizer
from stub_hub import COMMIT, OTHER_COMMIT, running_hub

ID = "someone/Some-Model-7B"
COPIES = (
    "original/consolidated.00.pth", "original/params.json", "consolidated.safetensors", "params.json", "model.gguf",
    "pytorch_model.bin", "onnx/model.onnx_data", "onnx/config.json", "metal/model.bin", "fp8/model.safetensors",
    ".gitattributes", "fp8/deep/config.json",
)  # fmt: skip
CARRIED = ("LICENSE", "additional_chat_templates/tool_use.jinja", "modeling.py")


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory):
    """Return a sharded model with all that lies beside weights on the hub."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(tiny(), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # Weights far beyond what headers and samples take, so that nobody reads them unseen.
    tensors |= {f"model.layers.{layer}.extra.weight": torch.zeros(2**19) for layer in range(2)}
    weight_map = {name: f"model-0000{1 + (name > 'model.layers.1')}-of-00002.safetensors" for name in tensors}
    for shard in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in (*COPIES, *CARRIED):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.add(ID, published)
        yield hub


def small_names(folder):
    return {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
            "tokenizer_config.json", "chat_template.jinja"} & {file.name for file in folder.iterdir()}  # fmt: skip


def test_inspect_reads_headers_by_ranges_and_nothing_else(hub, published):
    inspection = inspect(ID)
    local = inspect(published)
    assert inspection.to_json() | {"path": ""} == local.to_json() | {"path": ""}
    assert inspection.file_bytes == sum(file.stat().st_size for file in published.glob("model-*.safetensors"))
    shards = {name: count for name, count in hub.served.items() if name.endswith(".safetensors")}
    assert set(hub.served) - set(shards) == small_names(published)
    assert sorted(shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sum(shards.values()) <= 2 * 2**17
    assert hub.tokens == [], "the token is for the hub alone"


@pytest.mark.long
def test_plan_reads_samples_too_and_is_the_plan_of_the_folder(hub, published):
    decided = plan(ID, keep=0.5, recipe="reap")
    assert decided == plan(published, keep=0.5, recipe="reap"), "the digest too"
    shards = {name: count for name, count in hub.served.items() if name.endswith(".safetensors")}
    assert sum(shards.values()) < 2 * (2**17 + 2**18 + 4096), "of several MiB"
    assert set(hub.served) - set(shards) == small_names(published)


@pytest.mark.long
def test_compress_fetches_the_weights_once_and_says_how_much(hub, published, text, tmp_path, caplog):
    settings = {"keep": 0.5, "recipe": "reap", "text": text, "tokens": 512, "seq_len": 64}
    with caplog.at_level(logging.INFO, logger="coterie"):
        result = compress(ID, tmp_path / "out", **settings)
    weights = {file.name: file.stat().st_size for file in published.glob("model-*.safetensors")}
    [said] = [record.getMessage() for record in caplog.records if "of weights" in record.getMessage()]
    assert said.startswith(f"{ID}: fetching {sum(weights.values()) / 2**20:.2f} MiB in 2 files of weights")
    for name, size in weights.items():
        assert size <= hub.served[name] <= size + 2**17 + 2**18 + 4096
    assert not set(COPIES) & set(hub.served)
    assert set(CARRIED) <= {file.relative_to(result.out).as_posix() for file in result.out.rglob("*")}
    assert Manifest.read(result.out).model == ID
    # What the cache has is not fetched again, and is enough without a hub.
    before = hub.served.copy()
    compress(ID, tmp_path / "again", **settings)
    assert hub.served == before
    assert [file.read_bytes() for file in sorted((tmp_path / "again").glob("*.safetensors"))] == [
        file.read_bytes() for file in sorted(result.out.glob("*.safetensors"))
    ]
    local = compress(published, tmp_path / "local", **settings)
    for file in local.out.glob("*.safetensors"):
        assert file.read_bytes() == (result.out / file.name).read_bytes()


@pytest.mark.long
def test_what_cannot_be_is_said_before_weights_are_fetched(hub, published, text, tmp_path):
    with pytest.raises(Infeasible, match="the least"):
        compress(ID, tmp_path / "out", budget="2KiB", recipe="reap", text=text, tokens=512, seq_len=64)
    size = min(file.stat().st_size for file in published.glob("model-*.safetensors"))
    assert max(count for name, count in hub.served.items() if name.endswith(".safetensors")) < size


def test_a_disk_that_is_too_small_is_said_before_weights_are_fetched(hub, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("coterie.model.disk.hub.shutil.disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(OutOfSpace, match=f"{ID} has .* MiB of weights to fetch, .* has 1.00 MiB free; .* HF_HUB_CACHE"):
        Checkpoint.open(ID)
    assert not any(name.endswith(".safetensors") for name in hub.served)


@pytest.mark.long
def test_a_revision(hub, tiny):
    hub.add(ID, tiny("mixtral"), revision="refs/pr/1", commit=OTHER_COMMIT)
    assert inspect(f"{ID}@refs/pr/1").model_type == "mixtral"
    assert inspect(f"{ID}@{OTHER_COMMIT}").model_type == "mixtral"
    assert (inspect(ID).model_type, inspect(f"{ID}@main").model_type) == ("olmoe", "olmoe")
    assert resolve(f"{ID}@{COMMIT}").name == COMMIT
    with pytest.raises(NotACheckpoint, match=f"{ID}@v9 .* no such revision; .*/{ID}/tree/main"):
        inspect(f"{ID}@v9")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "someone/nothing",
            r"someone/nothing is no local folder .* knows no model of that name, or it is private",
        ),
        ("a--b/c", "a--b/c does not exist; pass a folder .*, or a hub id"),
        ("someone/gated", r"it is gated, .*; ask for it at http://[\d.:]+/someone/gated and log in with hf auth login"),
        (f"{ID}@nowhere", "it has no such revision"),
    ],
)
def test_models_that_cannot_be_had(hub, published, text, tmp_path, model, message):
    hub.add("someone/gated", published)
    hub.gated.add("someone/gated")
    out = tmp_path / "out"
    for command in (
        ["inspect", model],
        ["plan", model, "--keep", "0.5"],
        ["compress", model, str(out), "--keep", "0.5", "--text", str(text)],
        ["profile", model, str(out), "--text", str(text)],
        ["evaluate", model, "--text", str(text)],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1, (command, result.exception)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        assert re.search(message, result.stderr), (command, result.stderr)
    assert not out.exists()


def test_no_network_and_no_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotACheckpoint, match=r"http://127\.0\.0\.1:9 cannot be reached; .*hf download ID --local-dir"):
        inspect(ID)


def test_no_network_and_what_the_cache_has(hub, monkeypatch, caplog):
    inspect(ID)  # headers are not kept
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotACheckpoint, match=r"without model-00001\S* and 1 others, and .* cannot be reached"):
        Checkpoint.open(ID)
    assert load_tokenizer(ID).eos_token == "<|endoftext|>"


def test_offline_with_a_whole_cache(hub, monkeypatch, caplog):
    there = Checkpoint.open(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    served = hub.served.copy()
    assert (Checkpoint.open(ID).digest, inspect(ID).total) == (there.digest, inspect(there.path).total)
    assert plan(ID, keep=0.5, recipe="reap") == plan(there.path, keep=0.5, recipe="reap")
    assert hub.served == served
    for model in ("someone/else", f"{ID}@v2"):
        with pytest.raises(NotACheckpoint, match=r"HF_HUB_OFFLINE is set, .*; unset it, or pass a folder"):
            inspect(model)


def test_offline_with_half_a_cache(hub, monkeypatch):
    inspect(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for read in (Checkpoint.open, inspect):
        with pytest.raises(NotACheckpoint, match=r"HF_HUB_OFFLINE is set.*unset it, or pass a folder"):
            read(ID)


def test_a_server_without_ranges_is_not_asked_for_whole_files(hub):
    hub.ranges = False
    with pytest.raises(NotACheckpoint, match=r"cannot be read in parts: .* hf download ID --local-dir DIR"):
        inspect(ID)


def test_pickles(hub, tiny, tmp_path):
    folder = shutil.copytree(tiny(), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.add("someone/old", folder, commit=OTHER_COMMIT)
    with pytest.raises(NotACheckpoint, match=r"it has pytorch_model\.bin, a pickle.* --allow-pickle"):
        Checkpoint.open("someone/old")
    assert "pytorch_model.bin" not in hub.served
    assert Checkpoint.open("someone/old", allow_pickle=True).pickled


def test_both_rules_for_what_belongs_to_a_model_agree(published):
    names = [file.relative_to(published).as_posix() for file in published.rglob("*") if file.is_file()]
    assert belongs(names) == sorted(file.relative_to(published).as_posix() for file in files_beside(published))
    assert set(CARRIED) < set(belongs(names))
    assert not set(COPIES) & set(belongs(names))


@pytest.mark.long
def test_the_environment_names_the_hub(hub, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "NO_COLOR": "1",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", "from coterie.cli.main import main; main()", "inspect", ID, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["model_type"] == "olmoe"
    assert result.stderr == ""
