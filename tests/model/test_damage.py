"""Damage is named: numbers that are none, parts of experts that are missing, pointers in place of files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie.compress.decide import plan
from coterie.errors import CorruptCheckpoint
from coterie.model.arch.inspect import inspect
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.damage import check_finite
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.stream.stream import Stream

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\nsize 4999999\n"


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


def changed(folder: Path, tensors: dict[str, torch.Tensor | None]) -> Path:
    """Replace tensors of a checkpoint of one file, or leave out those that are None."""
    file = folder / "model.safetensors"
    content = load_file(file) | tensors
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, file, {"format": "pt"})
    return folder


def run_stream(folder: Path) -> None:
    with Stream(Checkpoint.open(folder)) as stream:
        list(stream.run([stream.logits_job(torch.arange(64).view(1, 64))]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_wrong_number_is_named(dtype, value):
    tensor = torch.ones(3, 4, 5, dtype=dtype)
    check_finite(Path("file"), "name", tensor, infinity=False)
    tensor[1, 2, 3] = tensor[2, 0, 0] = value
    with pytest.raises(
        CorruptCheckpoint, match=rf"file: m.experts.up \[3, 4, 5\] holds {value} at \[1, 2, 3\], in .*1,"
    ):
        check_finite(Path("file"), "m.experts.up", tensor, infinity=False)
    if value == value:
        check_finite(Path("file"), "mask", tensor, infinity=True)
    else:
        with pytest.raises(CorruptCheckpoint, match="holds nan"):
            check_finite(Path("file"), "mask", tensor, infinity=True)


def test_the_largest_numbers_of_a_format_are_numbers():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check_finite(Path("file"), "name", torch.full((1000,), torch.finfo(dtype).max, dtype=dtype), infinity=False)
    check_finite(Path("file"), "name", torch.empty(0), infinity=False)
    check_finite(Path("file"), "name", torch.full((2,), 7), infinity=False)


@pytest.mark.parametrize(
    ("model_type", "name", "place", "expert"),
    [
        ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.weight", (1, 2), "expert 3"),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", (5, 1, 2), "expert 5"),
        ("olmoe", "model.layers.1.self_attn.k_proj.weight", (0, 1), "1"),
        ("olmoe", "lm_head.weight", (4, 1), "4"),
    ],
)
def test_a_damaged_weight_is_named_where_it_comes_in(tiny, tmp_path, model_type, name, place, expert):
    folder = copied(tiny(model_type), tmp_path)
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor[place] = float("nan")
    changed(folder, {name: tensor})
    with pytest.raises(CorruptCheckpoint) as caught:
        run_stream(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'model.safetensors'}: {name} [")
    assert f"nan at {list(place)}" in message
    assert expert in message


@pytest.mark.parametrize("look", [inspect, lambda folder: plan(folder, keep=0.5, recipe="reap")])
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["mlp.experts.2.up_proj.weight"], r"layers\.1\.mlp\.experts\.2 has no up_proj, which other experts"),
        (["mlp.experts.0.down_proj.weight"], r"layers\.1\.mlp\.experts\.0 has no down_proj"),
        (
            [f"mlp.experts.3.{part}_proj.weight" for part in ("gate", "up", "down")],
            "holds 7 of the .*; expert 3 is missing",
        ),
    ],
)
def test_a_missing_matrix_of_one_expert_is_seen_in_the_headers(tiny, tmp_path, look, missing, message):
    folder = changed(copied(tiny(), tmp_path), {f"model.layers.1.{name}": None for name in missing})
    with pytest.raises(CorruptCheckpoint, match=message):
        look(folder)


def test_plan_sees_any_tensor_that_is_missing(tiny, tmp_path):
    folder = changed(copied(tiny(), tmp_path), {"model.layers.1.self_attn.q_proj.weight": None})
    with pytest.raises(CorruptCheckpoint, match=r"layers\.1\.self_attn\.q_proj\.weight is missing, and 0 others"):
        plan(folder, keep=0.5, recipe="reap")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_called_that(tiny, tmp_path, name):
    folder = copied(tiny(), tmp_path)
    (folder / name).write_text(POINTER)
    message = rf"{name}: this is a pointer .* of 4999999 bytes \(Git LFS\); run git lfs pull in "
    with pytest.raises(CorruptCheckpoint, match=message):
        load_tokenizer(folder) if name.startswith("tokenizer") else Checkpoint.open(folder)


def test_pointers_in_place_of_an_index_and_of_a_pickle(tiny, tmp_path):
    folder = copied(tiny(), tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(CorruptCheckpoint, match=r"index\.json: this is a pointer"):
        Checkpoint.open(folder)
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(CorruptCheckpoint, match=r"pytorch_model\.bin: this is a pointer"):
        Checkpoint.open(folder, allow_pickle=True)


def test_text_that_only_speaks_of_pointers_is_no_pointer(tiny, tmp_path):
    folder = copied(tiny(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": POINTER}))
    assert Checkpoint.open(folder).config["note"] == POINTER
