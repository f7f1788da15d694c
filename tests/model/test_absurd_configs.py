"""A config.json that no model can have: one line with the entry and the way out, within seconds, from every command."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.errors import InputError
from coterie.model.arch.meta import meta_model
from coterie.testing import tiny_families
from coterie.testing.families import model_class, tiny_config


def altered(model: Path, folder: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(model, folder / "model"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def commands(model: Path, text: Path, out: Path) -> dict[str, list[object]]:
    small = ["--text", text, "--tokens", "512", "--seq-len", "64"]
    return {
        "inspect": [model],
        "plan": [model, "--keep", "0.5", "--recipe", "reap"],
        "profile": [model, out, *small],
        "compress": [model, out, "--keep", "0.5", *small],
        "evaluate": [model, "--text", text],
    }


def refusals(model: Path, text: Path, out: Path, *leave_out: str) -> dict[str, str]:
    """Return what each command says of a model, after checking that it is one line, that nothing ran and was left."""
    messages: dict[str, str] = {}
    for command, arguments in commands(model, text, out).items():
        if command in leave_out:
            continue
        began = time.perf_counter()
        result = CliRunner().invoke(app, [command, *map(str, arguments)])
        assert time.perf_counter() - began < 20, command
        assert result.exit_code == 1, (command, result.exception)
        assert isinstance(result.exception, SystemExit), (command, result.exception)
        assert result.stderr.startswith("error: "), (command, result.stderr)
        assert result.stderr.count("\n") == 1, (command, result.stderr)
        assert result.stdout == "", command
        assert not out.exists(), command
        messages[command] = result.stderr
    return messages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": -1}, "num_experts_per_tok = -1, but a token can choose 1 to 8 experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9, but a token can choose 1 to 8 experts"),
        ({"architectures": [5]}, "architectures = [5], expected a list with the name of a class"),
        ({"architectures": {"a": "b"}}, "architectures = {'a': 'b'}, expected a list"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers = 1000000, but the weight files hold 69 tensors"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    ],
)
def test_every_command_names_the_entry(tiny, text, tmp_path, changes, message):
    model = altered(tiny(), tmp_path, **changes)
    for command, said in refusals(model, text, tmp_path / "out").items():
        assert message in said, command


@pytest.mark.parametrize("value", [0, 2.5, "2", True, 10**9])
def test_numbers_that_cannot_be_chosen(tiny, text, tmp_path, value):
    messages = refusals(altered(tiny(), tmp_path, num_experts_per_tok=value), text, tmp_path / "out")
    assert all("num_experts_per_tok" in said for said in messages.values()), messages


def test_a_model_without_a_head_is_refused_before_it_is_run(tiny, text, tmp_path):
    model = altered(tiny("qwen3_moe"), tmp_path, architectures=["Qwen3MoeModel"])
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for command, said in refusals(model, text, tmp_path / "out", "inspect").items():
        assert "names Qwen3MoeModel, a class without a head" in said, command
        assert "name Qwen3MoeForCausalLM under architectures" in said, command


@pytest.mark.parametrize("model_type", tiny_families())
def test_no_config_of_a_family_is_taken_for_absurd(model_type):
    config = json.loads(tiny_config(model_type).to_json_string())
    model = meta_model(config | {"architectures": [model_class(model_type).__name__]})
    assert type(model) is model_class(model_type)
    headless = type(model.base_model).__name__
    if hasattr(transformers, headless):
        with pytest.raises(InputError, match=f"names {headless}, a class without a head"):
            meta_model(config | {"architectures": [headless]})
