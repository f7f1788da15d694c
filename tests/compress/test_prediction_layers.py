"""Prediction layers (MTP) follow what becomes of the last layer, or are left out; config.json agrees with them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import tensors_of
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.recipes import Recipe
from coterie.errors import Infeasible, InputError
from coterie.model.arch.experts import canonical_experts, is_experts
from coterie.model.disk.manifest import Manifest, PredictionEntry
from some import first

SMALL = {"tokens": 512, "seq_len": 64}


def with_prediction(model: Path, folder: Path, prefix: str = "model.layers.3.") -> Path:
    """Copy a model with one layer more, which predicts, each tensor different from that of the last layer."""
    copy = Path(shutil.copytree(model, folder / "model"))
    tensors, config = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    base = f"model.layers.{config['num_hidden_layers'] - 1}."
    last = {name: tensor for name, tensor in tensors.items() if name.startswith(base)}
    for name, tensor in last.items():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 4
        tensors[prefix + name.removeprefix(base)] = (tensor + noise).to(tensor.dtype)
    tensors[f"{prefix}eh_proj.weight"] = torch.randn(32, 64)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return copy


def run_as_a_layer(model: Path, folder: Path, prefix: str) -> torch.nn.Module:
    """Load a model in stock transformers with its prediction layer as its last one: shape and config must agree."""
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    number = config["num_hidden_layers"]
    longer = {key: [*value, value[-1]] for key, value in config.items() if key.endswith("layer_types") and value}
    config |= longer | {"num_hidden_layers": number + 1, "num_nextn_predict_layers": 0}
    tensors = {
        name.replace(prefix, f"model.layers.{number}."): tensor
        for name, tensor in tensors_of(model).items()
        if not name.endswith("eh_proj.weight")
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(64).view(2, 32), use_cache=False).logits


def rows(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("recipe", first(1, ["mergemoe", "reap"]))
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
    assert Manifest.read(result.out).prediction == PredictionEntry(kept=False, layers=("model.layers.3",))
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(model).values())
    assert result.plan.original_bytes == whole


FAMILIES = [
    ("glm4_moe", "model.layers.3."),
    pytest.param("gpt_oss", "model.layers.2.", id="gpt_oss: all experts in one tensor, gate and up mixed, with biases"),
    pytest.param("deepseek_v3", "model.layers.3.", marks=pytest.mark.slow),
    pytest.param("qwen3_next", "mtp.layers.0.", marks=pytest.mark.slow),
]


CUT = {"recipe": "coterie", "keep": 0.5, "train_tokens": 512}
SLIMMED = {"recipe": "coterie-slim", "width": 8, "effort": "fast"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "prefix", "options"),
    [
        ("glm4_moe", "model.layers.3.", CUT),
        ("gpt_oss", "model.layers.2.", SLIMMED),
        pytest.param("gpt_oss", "model.layers.2.", CUT, marks=pytest.mark.slow),
        pytest.param("glm4_moe", "model.layers.3.", SLIMMED, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "model.layers.3.", CUT, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "model.layers.3.", SLIMMED, marks=pytest.mark.slow),
        pytest.param("qwen3_next", "mtp.layers.0.", CUT, marks=pytest.mark.slow),
        pytest.param("qwen3_next", "mtp.layers.0.", SLIMMED, marks=pytest.mark.slow),
    ],
)
def test_shape_and_config_of_a_prediction_layer_agree(tiny, text, tmp_path, family, prefix, options):
    model = with_prediction(tiny(family), tmp_path, prefix)
    result = compress(model, tmp_path / "out", text=text, **options, **SMALL)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(result.out).values()) == (
        result.plan.predicted_bytes
    )
    assert torch.isfinite(logits(run_as_a_layer(result.out, tmp_path / "longer", prefix))).all()
    said, last = Manifest.read(result.out).prediction, result.manifest.layers[-1]
    assert (said.kept, said.compressed, said.width) == (True, (prefix.rstrip("."),), last.width_after)
    assert said.experts == (last.centres or tuple(range(last.num_experts_after)))


@pytest.mark.parametrize(("family", "prefix"), [FAMILIES[0], FAMILIES[1], FAMILIES[3]])  # no router groups
def test_a_prediction_layer_that_is_cut_and_loses_nothing_computes_the_same(tiny, text, tmp_path, family, prefix):
    model = with_prediction(tiny(family), tmp_path, prefix)
    cut = Recipe(name="cut", allocator="parts", passes=(("segment", {"score": "energy", "parts": 3}),))
    outlined = plan(model, keep=1.0, recipe=cut)
    layers = tuple(replace(layer, num_experts=24, width=8, top_k=6) for layer in outlined.layers)
    result = compress(model, tmp_path / "out", plan=replace(outlined, layers=layers), text=text, **SMALL)
    hidden = torch.randn(1, 64, 32)
    outputs = []
    for name, each in (("before", model), ("after", result.out)):
        with torch.no_grad():
            output = run_as_a_layer(each, tmp_path / name, prefix).model.layers[-1].mlp(hidden)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    before, after = outputs
    # Of what parts weigh only the last layer was asked, where lesser ones come a little behind.
    assert float((after - before).norm() / before.norm()) < 0.03
    assert not torch.equal(after, before)


@pytest.mark.parametrize(("family", "prefix"), FAMILIES)
def test_the_neurons_with_the_largest_weights_stay(tiny, text, tmp_path, family, prefix):
    model = with_prediction(tiny(family), tmp_path, prefix)
    result = compress(model, tmp_path / "out", width=8, recipe="easy-slim", text=text, **SMALL)
    before, after = (
        run_as_a_layer(each, tmp_path / name, prefix) for each, name in ((model, "before"), (result.out, "after"))
    )
    [full, slim] = (list(filter(is_experts, each.modules()))[-1] for each in (before, after))
    full, slim = canonical_experts(full), canonical_experts(slim)
    for expert in range(8):
        products = []
        for neuron in range(full.width):
            product = 1.0
            for tensor in (
                full.gate_EFD[expert, neuron],
                full.up_EFD[expert, neuron],
                full.down_EDF[expert, :, neuron],
            ):
                product *= math.sqrt(sum(float(weight) ** 2 for weight in tensor))
            products.append(product)
        stay = sorted(sorted(range(full.width), key=lambda neuron: -products[neuron])[:8])
        assert torch.equal(slim.gate_EFD[expert], full.gate_EFD[expert, stay])
        assert torch.equal(slim.up_EFD[expert], full.up_EFD[expert, stay])
        assert torch.equal(slim.down_EDF[expert], full.down_EDF[expert][:, stay])


def test_what_cannot_follow_is_refused_before_anything_runs(tiny, tmp_path):
    model = with_prediction(tiny("glm4_moe"), tmp_path)
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
