import errno
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import coterie.compress.apply as apply_module
import coterie.compress.layers as layers_module
import coterie.compress.shards as shards_module
from checkpoints import logits, tensors_of, weight_digests
from coterie.artifact import file_digest
from coterie.compress.apply import compress
from coterie.errors import (
    CorruptCheckpoint,
    InputError,
    OutOfSpace,
    OutputExists,
    ReloadMismatch,
    StaleArtifact,
    TextError,
)
from coterie.model.arch.load import load_model
from coterie.profile.profile import Profile
from coterie.testing import tiny_checkpoint


def digests(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file_digest(file) for file in folder.rglob("*") if file.is_file()}


def test_stock_auto_class_loads_a_plain_result_without_a_warning(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "half"
    result = compress(olmoe, out, keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    transformers.utils.logging.get_logger().propagate = True
    with caplog.at_level(logging.WARNING):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert caplog.records == []
    assert not any(info.values())
    assert model.config.num_experts == 4
    assert result.logits_error == 0.0
    size = {folder: sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (olmoe, out)}
    assert size[out] < 0.72 * size[olmoe]  # experts are 61 % of this tiny model
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("two")["input_ids"]) == "two"
    assert (out / "chat_template.jinja").read_bytes() == (olmoe / "chat_template.jinja").read_bytes()


def slow_mapped_logits(model: Path, out: Path) -> torch.Tensor:
    """The papers' form without our loader: the original model, each expert's weights replaced by its cluster's."""
    merged = tensors_of(out)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers = json.loads((out / "coterie.json").read_text())["body"]["layers"]
    with torch.no_grad():
        for layer in layers:
            experts = loaded.get_submodule(layer["block"]).experts
            for old, new in enumerate(layer["expert_map"]):
                parts = {
                    part: merged[f"{layer['block']}.experts.{new}.{part}_proj.weight"]
                    for part in ("gate", "up", "down")
                }
                experts.gate_up_proj[old] = torch.cat((parts["gate"], parts["up"])).float()
                experts.down_proj[old] = parts["down"].float()
    return logits(loaded.eval())


@pytest.mark.parametrize("recipe", ["m-smoe", "hc-smoe", "mergemoe"])
def test_a_mapped_result_is_the_papers_model_and_stock_loaders_refuse_it(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, recipe: str
) -> None:
    out = tmp_path / "mapped"
    result = compress(olmoe, out, keep=0.5, recipe=recipe, router="map", profile=olmoe_profile)
    torch.testing.assert_close(logits(load_model(out)), slow_mapped_logits(olmoe, out), atol=1e-4, rtol=1e-4)
    assert result.manifest.loads_with == "coterie"
    assert "coterie.load_model" in result.manifest.how_to_load("OUT")
    with pytest.raises(RuntimeError, match=r"size|mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(InputError, match="is a mapped result"):
        compress(out, tmp_path / "again", keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    assert not (tmp_path / "again").exists()


def test_a_plain_result_can_be_compressed_again(olmoe: Path, text_folder: Path, tmp_path: Path) -> None:
    for source, out, experts in ((olmoe, "six", 6), (tmp_path / "six", "four", 4)):
        compress(
            source, tmp_path / out, experts=experts, recipe="reap", text=text_folder, tokens=512, seq_len=32,
            profile=tmp_path / f"profile-{out}",
        )  # fmt: skip
    assert load_model(tmp_path / "four").config.num_experts == 4


def test_the_profile_is_made_kept_and_used_again(olmoe: Path, text_folder: Path, tmp_path: Path) -> None:
    where = tmp_path / "profile"
    first = compress(
        olmoe, tmp_path / "a", keep=0.5, recipe="mergemoe", text=text_folder, tokens=512, seq_len=32, profile=where
    )
    assert Profile.load(where).num_tokens == (256, 256)
    second = compress(olmoe, tmp_path / "b", keep=0.5, recipe="mergemoe", profile=where)
    assert first.plan == second.plan
    assert weight_digests(tmp_path / "a") == weight_digests(tmp_path / "b")
    other = tiny_checkpoint(tmp_path / "other", "olmoe", seed=5)
    with pytest.raises(StaleArtifact, match="another model"):
        compress(other, tmp_path / "c", keep=0.5, recipe="mergemoe", profile=where)
    assert not (tmp_path / "c").exists()


def test_without_text_and_profile_nothing_starts(olmoe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give calibration text with --text"):
        compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe")
    with pytest.raises(TextError, match="not a folder"):
        compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe", text=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_only_read(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    before = digests(olmoe)
    compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    assert digests(olmoe) == before


def test_an_existing_out_is_left_alone(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputExists, match="choose another place"):
        compress(olmoe, out, keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    assert (out / "precious.txt").read_text() == "mine"


def test_an_out_inside_the_model_is_refused(olmoe: Path, olmoe_profile: Profile) -> None:
    with pytest.raises(InputError, match="inside the model folder"):
        compress(olmoe, olmoe / "half", keep=0.5, recipe="mergemoe", profile=olmoe_profile)


def test_too_little_space_is_seen_before_any_compute(
    olmoe: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.compress.output.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    monkeypatch.setattr(apply_module, "open_run", lambda *_, **__: pytest.fail("began before checking space"))
    with pytest.raises(OutOfSpace, match=r"needs 16\.\d MiB.*has 10 B free"):
        compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe", text=text_folder)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_midway_keeps_what_was_finished(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = shards_module.save_file, []

    def full(*arguments: Any, **options: Any) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(real(*arguments, **options))

    monkeypatch.setattr(shards_module, "save_file", full)
    with pytest.raises(OutOfSpace, match=r"filled up while .* steps are kept: free some space and give the same"):
        compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shards_module, "save_file", real)
    monkeypatch.setattr(layers_module, "compress_layer", _counted(calls := []))
    compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    assert calls == [1]  # the layer that had been written was not compressed again
    whole = compress(olmoe, tmp_path / "whole", keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    assert weight_digests(tmp_path / "out") == weight_digests(whole.out)


def _counted(calls: list[int]) -> Any:
    real = layers_module.compress_layer

    def compress_layer(model: Any, layer: Any, *arguments: Any) -> Any:
        calls.append(layer.index)
        return real(model, layer, *arguments)

    return compress_layer


def test_a_result_that_computes_something_else_is_dropped(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage the weights after they were computed: the comparison with the model in flight must see it."""
    real = shards_module.save_file

    def damaged(tensors: dict[str, torch.Tensor], *args: object, **options: object) -> None:
        real(
            {name: tensor * 1.5 if "up_proj" in name else tensor for name, tensor in tensors.items()}, *args, **options
        )

    monkeypatch.setattr(shards_module, "save_file", damaged)
    with pytest.raises(ReloadMismatch, match="nothing was kept"):
        compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    assert list(tmp_path.iterdir()) == []


def test_every_layer_has_a_weight_file_and_the_rest_shares_one(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path
) -> None:
    result = compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe", profile=olmoe_profile)
    files = {file.name: set(load_file(file)) for file in result.out.glob("*.safetensors")}
    assert sorted(files) == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    for number in (0, 1):
        names = files[f"model-{number + 1:05d}-of-00003.safetensors"]
        assert names
        assert all(name.startswith(f"model.layers.{number}.") for name in names)
    assert files["model-00003-of-00003.safetensors"] == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    index = json.loads((result.out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in files.items() for name in names}
    assert index["metadata"]["total_size"] == result.plan.predicted_bytes


def test_a_damaged_result_does_not_load(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    out = compress(olmoe, tmp_path / "out", keep=0.5, recipe="mergemoe", profile=olmoe_profile).out
    tensors = tensors_of(out)
    del tensors["model.layers.0.mlp.gate.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"missing keys: .*mlp\.gate\.weight"):
        load_model(out)


def test_tensors_that_the_class_has_no_place_for_are_carried_and_named(
    deepseek: Path, text_folder: Path, tmp_path: Path
) -> None:
    """A head for multi-token prediction, as in the checkpoints of DeepSeek-V3: one layer more than config.json says."""
    shutil.copytree(deepseek, tmp_path / "model")
    tensors = load_file(deepseek / "model.safetensors")
    extra = {name.replace("layers.2", "layers.3"): tensor + 1 for name, tensor in tensors.items() if "layers.2" in name}
    save_file(tensors | extra, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    result = compress(
        tmp_path / "model", tmp_path / "out", keep=0.5, recipe="mergemoe", text=text_folder, tokens=512, seq_len=32
    )
    assert (result.plan.untouched, result.plan.mtp) == (("model.layers.3",), "keep")
    assert result.logits_error == 0.0
    written = tensors_of(tmp_path / "out")
    others = {name: tensor for name, tensor in extra.items() if ".experts." not in name and ".mlp.gate." not in name}
    assert others
    assert all(torch.equal(written[name], tensor) for name, tensor in others.items())
