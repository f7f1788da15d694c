"""Results in rotated blocks, which Coterie alone reads: written where they are named, never chosen by themselves."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.compress.apply import compress
from coterie.compress.damages import PRICED_TYPES
from coterie.compress.decide import plan
from coterie.errors import Infeasible, InputError
from coterie.export.run import export
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import OWN_TYPES
from coterie.testing import tiny_checkpoint

TEXT = {"tokens": 128, "seq_len": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose gate and up rows, and all but those of down, have blocks of 256."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "moe_intermediate_size": 64}
    return tiny_checkpoint(tmp_path_factory.mktemp("own") / "model", "qwen3_moe", **sizes)


def test_a_result_is_read_as_it_was_written_and_no_gguf_file_is_made_of_it(model, text_folder, tmp_path):
    result = compress(model, tmp_path / "out", type="turbo3", target="packed", text=text_folder, **TEXT)
    assert result.logits_error <= 1e-6
    kinds = {name.rpartition(".layers.0.")[2]: kind for name, kind in result.plan.types.items()}
    assert kinds["mlp.experts.*.gate_proj.weight"] == "TURBO3"
    assert kinds["mlp.experts.*.down_proj.weight"] == "IQ4_NL"  # rows of 64
    assert result.plan.predicted_bytes == Checkpoint.open(result.out).num_bytes
    before, after = (load_model(folder, dtype=torch.float32).state_dict() for folder in (model, result.out))
    far = {name: float((before[name] - after[name]).norm() / before[name].norm()) for name in before}
    experts = next(far[name] for name in far if "gate_up" in name)
    assert 0.1 < experts < 0.4  # a matrix in the place of another one would be off by 1.4
    with pytest.raises(InputError, match=r"is stored as TURBO3, a type of Coterie's own, .* like --type Q4_K"):
        export(result.out, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_the_commands_take_them_together_with_their_reader(model, text_folder, tmp_path):
    wanted = ["--type", "turbo3", "--target", "packed"]
    planned = CliRunner().invoke(app, ["plan", str(model), *wanted, "--json"])
    assert planned.exit_code == 0, planned.output
    assert "TURBO3" in json.loads(planned.stdout)["types"].values()
    made = ["compress", str(model), str(tmp_path / "out"), "--text", str(text_folder), "--tokens", "128"]
    foretold = CliRunner().invoke(app, [*made, *wanted, "--seq-len", "32", "--dry-run"])
    assert foretold.exit_code == 0, foretold.output
    refused = CliRunner().invoke(app, [*made, *wanted[:2]])
    assert refused.exit_code != 0
    assert not (tmp_path / "out").exists()


def test_they_do_not_run_on_from_row_to_row(model, text_folder, tmp_path):
    whole = plan(model, type="Q4_0", recipe="nearest")
    wrong = replace(whole, types={**whole.types, "model.layers.0.mlp.experts.*.down_proj.weight": "TURBO3.W"})
    with pytest.raises(Infeasible, match=r"row to row; blocks of TURBO3 are coded as a whole, each within one row"):
        compress(model, tmp_path / "out", plan=wrong, text=text_folder, **TEXT)


def test_they_are_never_chosen_by_themselves(model):
    with pytest.raises(InputError, match=r"TURBO3 is a type that no GGUF file holds: say --target packed"):
        plan(model, type="TURBO3", recipe="nearest")
    for bits in (4.07, 3.07, 2.07):
        for reader in ("gguf", "packed"):
            chosen = plan(model, bits=bits, recipe="nearest", target=reader).types.values()
            assert not set(chosen) & set(OWN_TYPES)
    assert not set(PRICED_TYPES) & set(OWN_TYPES)
