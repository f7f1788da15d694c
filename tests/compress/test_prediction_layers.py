"""Prediction layers (MTP) follow what becomes of the last layer, or are left out; config.json agrees with them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import tensors_of
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.errors import Infeasible, InputError
from coterie.model.disk.manifest import Manifest

SMALL = {"tokens": 512, "seq_len": 64}


def with_prediction(model: Path, folder: Path, prefix: str = "model.layers.3.") -> Path:
    """Copy a GLM of three layers with a fourth one that predicts, each tensor different from the third layer's."""
    copy = Path(shutil.copytree(model, folder / "model"))
    tensors = load_file(copy / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    tensors |= {name.replace("model.layers.2.", prefix): tensor + 1 for name, tensor in last.items()}
    tensors[f"{prefix}eh_proj.weight"] = torch.randn(32, 64)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return copy


def rows(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("recipe", ["reap", "mergemoe"])
@pytest.mark.parametrize("prefix", ["model.layers.3.", "mtp.layers.0."])
def test_a_prediction_layer_keeps_the_experts_that_the_last_layer_keeps(tiny, text, tmp_path, recipe, prefix):
    model = with_prediction(tiny("glm4_moe"), tmp_path, prefix)
    result = compress(model, tmp_path / "out", keep=0.5, recipe=recipe, text=text, **SMALL)
    before, after = rows(tensors_of(model), prefix), rows(tensors_of(result.out), prefix)
    entry = result.manifest.layers[-1]
    kept = entry.centres or [entry.expert_map.index(expert) for expert in range(4)]
    expected = {name: tensor for name, tensor in before.items() if ".experts." not in name}
    expected["mlp.gate.weight"] = before["mlp.gate.weight"][list(kept)]
    expected["mlp.gate.e_score_correction_bias"] = before["mlp.gate.e_score_correction_bias"][list(kept)]
    for number, expert in enumerate(kept):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = "mlp.experts.{}." + part + ".weight"
            expected[name.format(number)] = before[name.format(expert)]
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    config = json.loads((result.out / "config.json").read_text())
    assert (config["n_routed_experts"], config["num_nextn_predict_layers"]) == (4, 1)
    assert Manifest.read(result.out).plan["mtp"] == "keep"


def test_prediction_layers_are_left_out_when_asked(tiny, text, tmp_path):
    model = with_prediction(tiny("glm4_moe"), tmp_path)
    result = compress(
        model, tmp_path / "out", keep=0.5, recipe="coterie", effort="fast", text=text, mtp="drop", **SMALL
    )
    assert not any(".layers.3." in name for name in tensors_of(result.out))
    config = json.loads((result.out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert Manifest.read(result.out).plan["mtp"] == "drop"
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(model).values())
    assert result.plan.original_bytes == whole


def test_what_cannot_follow_is_refused_before_anything_runs(tiny, tmp_path):
    model = with_prediction(tiny("glm4_moe"), tmp_path)
    for options in ({"recipe": "coterie", "keep": 0.5}, {"recipe": "easy-slim", "width": 8}):
        with pytest.raises(Infeasible, match=r"prediction layer model\.layers\.3 is sized .* --mtp drop"):
            plan(model, **options)
        assert plan(model, mtp="drop", **options).mtp == "drop"
    tensors = load_file(model / "model.safetensors")
    moved = {name.replace("layers.3.mlp.experts.0", "layers.3.mlp.experts.00"): each for name, each in tensors.items()}
    save_file(moved, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(Infeasible, match=r"model\.layers\.3\.mlp\.experts\.0.* does not lie like .* --mtp drop"):
        plan(model, keep=0.5, recipe="reap")
    assert plan(model, keep=1.0, recipe="reap").mtp == "keep", "where config.json does not change nothing else must"


def test_a_plan_says_what_becomes_of_prediction_layers(tiny, text, tmp_path):
    model = with_prediction(tiny("glm4_moe"), tmp_path)
    file = plan(model, keep=0.5, recipe="reap", mtp="drop").save(tmp_path / "plan.json")
    with pytest.raises(InputError, match="--mtp"):
        compress(model, tmp_path / "out", plan=file, mtp="keep", text=text, **SMALL)
    result = compress(model, tmp_path / "out", plan=file, text=text, **SMALL)
    assert not any(".layers.3." in name for name in tensors_of(result.out))
    without = plan(tiny("glm4_moe"), keep=0.5, recipe="reap")
    assert without.mtp is None
    assert "mtp" not in without.body()
