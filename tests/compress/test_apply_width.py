"""Narrower experts from end to end: uniform widths for stock loaders, ragged ones for ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import coterie.compress.layers as layers_module
import coterie.compress.result_model as result_module
from checkpoints import logits, tensors_of
from coterie.compress.apply import compress
from coterie.errors import ArchitectureMismatch, InputError
from coterie.model.arch.entries import with_values
from coterie.model.arch.inspect import inspect
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.arch.resize import resized_config
from coterie.profile.profile import Profile
from coterie.profile.run import profile
from coterie.testing.conformance import check_result
from some import first


@pytest.fixture(scope="module")
def gradient_profile(olmoe: Path, text_folder: Path) -> Profile:
    return profile(olmoe, text=text_folder, tokens=256, seq_len=64, sample_tokens=64, gradients=True)


@pytest.fixture(scope="module")
def ragged(olmoe: Path, gradient_profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("ragged") / "out"
    return compress(olmoe, out, width=3, recipe="heapr-ragged", profile=gradient_profile)


def test_a_uniform_result_loads_anywhere(olmoe: Path, gradient_profile: Profile, tmp_path: Path) -> None:
    result = compress(olmoe, tmp_path / "out", width=8, recipe="heapr", profile=gradient_profile)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info.values())
    assert (model.config.intermediate_size, model.config.num_experts) == (8, 8)
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()  # with the grouped matrix products that stock transformers chooses
    assert result.logits_error == 0.0
    assert (result.manifest.loads_with, result.manifest.ragged) == ("transformers", None)
    for layer in result.manifest.layers:
        assert (layer.width_before, layer.width_after, layer.widths_after) == (24, 8, None)
        assert 0 < layer.notes["slim"]["share_of_score"] < 1
    check_result(olmoe, result)


def slow_ragged_logits(model: Path, out: Path) -> torch.Tensor:
    """The result without our loader: the original model with zeros for experts, and the narrow ones put in there."""
    narrow, loaded = tensors_of(out), load_model(model)
    with torch.no_grad():
        for index, layer in enumerate(loaded.model.layers):
            experts = layer.mlp.experts
            experts.gate_up_proj.zero_()
            experts.down_proj.zero_()
            for expert in range(8):
                part = {
                    kind: narrow[f"model.layers.{index}.mlp.experts.{expert}.{kind}_proj.weight"].float()
                    for kind in ("gate", "up", "down")
                }
                width = len(part["gate"])
                experts.gate_up_proj[expert, :width] = part["gate"]
                experts.gate_up_proj[expert, 24 : 24 + width] = part["up"]
                experts.down_proj[expert, :, :width] = part["down"]
    return logits(loaded)


def test_a_ragged_result_computes_what_its_narrow_experts_say(olmoe: Path, ragged: Any) -> None:
    torch.testing.assert_close(logits(load_model(ragged.out)), slow_ragged_logits(olmoe, ragged.out))
    assert ragged.logits_error == 0.0
    check_result(olmoe, ragged)


def test_a_ragged_result_holds_narrow_tensors_and_says_so(olmoe: Path, ragged: Any) -> None:
    widths = [size.widths for size in ragged.plan.layers]
    assert 0 in widths[0] + widths[1]  # whole experts go
    for name, tensor in tensors_of(ragged.out).items():
        if ".experts." in name:
            parts = name.split(".")
            width = widths[int(parts[2])][int(parts[5])]
            assert tensor.shape == ((32, width) if parts[6] == "down_proj" else (width, 32)), name
        else:
            assert torch.equal(tensor, tensors_of(olmoe)[name]), name
    assert ragged.manifest.loads_with == "coterie"
    assert "coterie.load_model" in ragged.manifest.how_to_load("OUT")
    assert ragged.manifest.layers[1].widths_after == widths[1]
    shown = inspect(ragged.out)
    assert [(layer.num_experts, layer.width) for layer in shown.moe_layers] == [(8, 24)] * 2
    assert shown.parts["experts"].parameters == sum(map(sum, widths)) * 3 * 32
    uniform = inspect(olmoe).total.bytes - 2 * 8 * 21 * 3 * 32 * 2
    assert shown.total.bytes == ragged.plan.predicted_bytes == uniform


def test_stock_loaders_refuse_a_ragged_result(ragged: Any) -> None:
    with pytest.raises(RuntimeError):
        transformers.AutoModelForCausalLM.from_pretrained(ragged.out)


def test_a_ragged_result_loads_in_its_own_number_format_with_its_generation_config(olmoe: Path, ragged: Any) -> None:
    loaded = load_model(ragged.out, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.to_dict() == load_model(olmoe).generation_config.to_dict()


def test_a_ragged_result_can_be_profiled_but_not_compressed_again(
    ragged: Any, text_folder: Path, tmp_path: Path
) -> None:
    again = profile(ragged.out, text=text_folder, tokens=128, seq_len=64, sample_tokens=16)
    for layer, size in enumerate(ragged.plan.layers):
        square_EF = again.sum(layer, "hidden_square")
        for expert, width in enumerate(size.widths):
            assert not square_EF[expert, width:].any()
    with pytest.raises(InputError, match="is a ragged result; compress the model that it was made from"):
        compress(ragged.out, tmp_path / "again", keep=0.5, recipe="easy-slim", profile=again)


@pytest.mark.parametrize(
    ("recipe", "kept"), first(1, [("heapr-ragged", "inside"), ("easy-slim", "inside"), ("heapr-ragged", "profile")])
)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    olmoe: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, kept: str
) -> None:
    options: dict[str, Any] = {"width": 8, "recipe": recipe, "text": text_folder, "tokens": 128, "seq_len": 64}
    folders = {name: {"profile": tmp_path / f"profile-{name}"} if kept == "profile" else {} for name in ("a", "b")}
    whole = compress(olmoe, tmp_path / "a", **options, **folders["a"])
    real = layers_module.write_shard

    def dies(folder: Path, shard: Any, tensors: Any) -> None:
        if "layers.1" in shard.names[0]:
            raise KeyboardInterrupt
        real(folder, shard, tensors)

    monkeypatch.setattr(layers_module, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(olmoe, tmp_path / "b", **options, **folders["b"])
    monkeypatch.setattr(layers_module, "write_shard", real)
    resumed = compress(olmoe, tmp_path / "b", **options, **folders["b"])
    first, second = tensors_of(whole.out), tensors_of(resumed.out)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.logits_error == 0.0


def test_gradients_cannot_be_measured_on_compressed_layers(olmoe: Path, text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe heapr needs gradients .*leave the inputs original"):
        compress(olmoe, tmp_path / "out", width=8, recipe="heapr", text=text_folder, inputs="compressed")
    assert not (tmp_path / "out").exists()


def test_activations_can(olmoe: Path, text_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"text": text_folder, "tokens": 128, "seq_len": 64, "inputs": "compressed"}
    result = compress(olmoe, tmp_path / "out", width=8, recipe="easy-slim", **options)
    assert result.manifest.calibration_inputs == "compressed"
    assert result.logits_error == 0.0


def test_shared_experts_keep_their_width(deepseek: Path, text_folder: Path, tmp_path: Path) -> None:
    held = profile(deepseek, text=text_folder, tokens=128, seq_len=64, sample_tokens=16)
    result = compress(deepseek, tmp_path / "out", width=8, recipe="easy-slim", profile=held)
    config = json.loads((result.out / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["n_shared_experts"]) == (8, 3)
    check_result(deepseek, result)


def test_an_entry_with_another_meaning_is_noticed(
    olmoe: Path, gradient_profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry that makes up for the width also decides whether routing weights are normalised."""

    def resized(
        architecture: Architecture, num_experts: int, width: int | None = None, top_k: int | None = None
    ) -> dict[str, Any]:
        config = resized_config(architecture, num_experts, width, top_k)
        return config if width is None else with_values(config, {("norm_topk_prob",): False}, architecture.model)

    monkeypatch.setattr("coterie.model.arch.load.resized_config", resized)
    monkeypatch.setattr("coterie.compress.output.resized_config", resized)
    with pytest.raises(ArchitectureMismatch, match="computes something else beside them"):
        compress(olmoe, tmp_path / "out", width=8, recipe="heapr", profile=gradient_profile)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(result_module.ResultModel, "check_rest", lambda *_: None)
    assert compress(olmoe, tmp_path / "out", width=8, recipe="heapr", profile=gradient_profile).logits_error == 0.0


@pytest.mark.long
def test_dead_neurons_go_without_a_trace(olmoe: Path, text_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "dead"
    shutil.copytree(olmoe, model)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name and "down_proj" in name:
            expert = int(name.split(".")[5])
            tensor[:, [neuron for neuron in range(24) if (neuron + expert) % 3]] = 0
    from safetensors.torch import save_file

    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    held = profile(model, text=text_folder, tokens=256, seq_len=64, sample_tokens=16, gradients=True)
    expected = logits(load_model(model))
    for recipe in ("easy-slim", "heapr", "heapr-ragged"):
        out = compress(model, tmp_path / recipe, width=8, recipe=recipe, profile=held).out
        torch.testing.assert_close(logits(load_model(out)), expected, rtol=1e-4, atol=1e-4)
