import errno
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import coterie.compress.apply as apply_module
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
from coterie.model.checkpoint import Checkpoint
from coterie.model.load import load_model
from coterie.profile.profile import Profile
from coterie.testing import tiny_checkpoint

IDS = torch.arange(256).view(4, 64)


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


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
    size = {folder: (folder / "model.safetensors").stat().st_size for folder in (olmoe, out)}
    assert size[out] < 0.72 * size[olmoe]  # experts are 61 % of this tiny model
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("two")["input_ids"]) == "two"
    assert (out / "chat_template.jinja").read_bytes() == (olmoe / "chat_template.jinja").read_bytes()


def slow_mapped_logits(model: Path, out: Path) -> torch.Tensor:
    """The papers' form without our loader: the original model, each expert's weights replaced by its cluster's."""
    from safetensors.torch import load_file

    merged = load_file(out / "model.safetensors")
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
    assert result.manifest["loads_with"] == "coterie"
    assert "coterie.load_model" in result.manifest["how_to_load"]
    with pytest.raises(RuntimeError, match=r"size|mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(InputError, match="is a mapped result"):
        compress(out, tmp_path / "again", keep=0.5, profile=olmoe_profile)
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
    first = compress(olmoe, tmp_path / "a", keep=0.5, text=text_folder, tokens=512, seq_len=32, profile=where)
    assert Profile.load(where).num_tokens == (256, 256)
    second = compress(olmoe, tmp_path / "b", keep=0.5, profile=where)
    assert first.plan == second.plan
    assert file_digest(tmp_path / "a/model.safetensors") == file_digest(tmp_path / "b/model.safetensors")
    other = tiny_checkpoint(tmp_path / "other", "olmoe", seed=5)
    with pytest.raises(StaleArtifact, match="another model"):
        compress(other, tmp_path / "c", keep=0.5, profile=where)
    assert not (tmp_path / "c").exists()


def test_without_text_and_profile_nothing_starts(olmoe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give calibration text with --text"):
        compress(olmoe, tmp_path / "out", keep=0.5)
    with pytest.raises(TextError, match="not a folder"):
        compress(olmoe, tmp_path / "out", keep=0.5, text=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_only_read(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    before = digests(olmoe)
    compress(olmoe, tmp_path / "out", keep=0.5, profile=olmoe_profile)
    assert digests(olmoe) == before


def test_an_existing_out_is_left_alone(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputExists, match="choose another place"):
        compress(olmoe, out, keep=0.5, profile=olmoe_profile)
    assert (out / "precious.txt").read_text() == "mine"


def test_an_out_inside_the_model_is_refused(olmoe: Path, olmoe_profile: Profile) -> None:
    with pytest.raises(InputError, match="inside the model folder"):
        compress(olmoe, olmoe / "half", keep=0.5, profile=olmoe_profile)


def test_too_little_space_is_seen_before_any_compute(
    olmoe: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    monkeypatch.setattr(apply_module, "run_profile", lambda *_, **__: pytest.fail("profiled before checking space"))
    with pytest.raises(OutOfSpace, match=r"needs 16\.\d MiB.*has 10 B free"):
        compress(olmoe, tmp_path / "out", keep=0.5, text=text_folder)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_midway_leaves_nothing(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(apply_module, "save_file", full)
    with pytest.raises(OutOfSpace, match=r"filled up while .*out was written; nothing was kept"):
        compress(olmoe, tmp_path / "out", keep=0.5, profile=olmoe_profile)
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_computes_something_else_is_dropped(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage the weights after they were computed: the comparison with the model in flight must see it."""
    real = apply_module.save_file

    def damaged(tensors: dict[str, torch.Tensor], *args: object, **options: object) -> None:
        name = next(name for name in tensors if ".experts.0.up_proj" in name)
        real({**tensors, name: tensors[name] * 1.5}, *args, **options)

    monkeypatch.setattr(apply_module, "save_file", damaged)
    with pytest.raises(ReloadMismatch, match="nothing was kept"):
        compress(olmoe, tmp_path / "out", keep=0.5, profile=olmoe_profile)
    assert list(tmp_path.iterdir()) == []


def test_a_large_result_is_split_into_shards_with_an_index(
    olmoe: Path, olmoe_profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(olmoe, tmp_path / "whole", keep=0.5, profile=olmoe_profile)
    monkeypatch.setattr(apply_module, "MAX_SHARD_BYTES", 20_000)
    split = compress(olmoe, tmp_path / "split", keep=0.5, profile=olmoe_profile)
    shards = sorted(file.name for file in split.out.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    largest_tensor = max(info.num_bytes for info in Checkpoint.open(split.out).tensors.values())
    assert all((split.out / shard).stat().st_size < max(20_000, largest_tensor) + 4_000 for shard in shards)
    assert torch.equal(logits(load_model(split.out)), logits(load_model(whole.out)))


def test_a_damaged_result_does_not_load(olmoe: Path, olmoe_profile: Profile, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = compress(olmoe, tmp_path / "out", keep=0.5, profile=olmoe_profile).out
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.0.mlp.gate.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"missing keys: .*mlp\.gate\.weight"):
        load_model(out)


def test_tensors_that_the_class_has_no_place_for_are_carried_and_named(
    deepseek: Path, text_folder: Path, tmp_path: Path
) -> None:
    """A head for multi-token prediction, as in the checkpoints of DeepSeek-V3: one layer more than config.json says."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(deepseek, tmp_path / "model")
    tensors = load_file(deepseek / "model.safetensors")
    extra = {name.replace("layers.2", "layers.3"): tensor + 1 for name, tensor in tensors.items() if "layers.2" in name}
    save_file(tensors | extra, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    result = compress(tmp_path / "model", tmp_path / "out", keep=0.5, text=text_folder, tokens=512, seq_len=32)
    assert result.plan.untouched == ("model.layers.3",)
    assert result.logits_error == 0.0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert extra
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
