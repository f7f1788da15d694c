"""Experts cut into parts, from end to end."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import coterie.compress.layers as layers_module
from checkpoints import logits, weight_digests
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.layer_plan import ExpertPlan, LayerPlan
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile.profile import Profile
from coterie.profile.run import profile
from coterie.testing import tiny_checkpoint
from coterie.testing.conformance import check_result
from some import first

FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3", "qwen3_moe", "granitemoe")


@pytest.fixture(scope="module", params=first(2, FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Groups are chosen by their two best experts, which are parts of one once experts are cut: one group, then.
    changes = {"n_group": 1, "topk_group": 1} if request.param == "deepseek_v3" else {}
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param) / "model", request.param, **changes)


@pytest.fixture(scope="module")
def held(model: Path, text_folder: Path) -> Profile:
    return profile(model, text=text_folder, tokens=256, seq_len=64, sample_tokens=256, gradients=True)


def test_a_result_of_parts_loads_anywhere(model: Path, held: Profile, tmp_path: Path) -> None:
    result = compress(model, tmp_path / "out", keep=0.5, recipe="coterie", effort="fast", profile=held)
    size, layers = result.plan.layers[0], Architecture.of(Checkpoint.open(model)).layers
    assert size.width == 8
    found, info = transformers.AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info.values())
    made = Architecture.of(Checkpoint.open(result.out)).layers
    assert [(each.num_experts, each.width, each.top_k) for each in made] == [
        (size.num_experts, size.width, size.top_k)
    ] * len(layers)
    assert torch.isfinite(logits(found)).all()
    assert result.logits_error == 0.0
    assert result.manifest.loads_with == "transformers"
    for entry in result.manifest.layers:
        assert sum(entry.notes["segment"]["parts_by_expert"]) == size.num_experts
        assert (entry.top_k_before, entry.top_k_after) == (2, size.top_k)
    check_result(model, result)


def test_cutting_alone_leaves_the_logits(
    model: Path, held: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parts stay and as many times more are chosen, by the family's own router, in its own normalisation."""
    monkeypatch.setattr("coterie.compress.methods.segment.GAP", 0.0)
    layer = Architecture.of(Checkpoint.open(model)).layers[0]
    parts = [ExpertPlan(sources=(expert,), part=part) for expert in range(layer.num_experts) for part in range(3)]
    all_parts = LayerPlan(num_experts=len(parts), width=8, top_k=3 * layer.top_k, experts=tuple(parts))
    half = plan(model, held, keep=0.5, recipe="coterie")
    whole = replace(half, layers=(all_parts,) * len(half.layers))
    result = compress(model, tmp_path / "out", plan=whole, effort="fast", profile=held)
    info = Checkpoint.open(model).tensors
    rows = [
        name
        for name in info
        if any(part in name for part in (".gate.", ".router.")) and "experts" not in name.rpartition(".gate")[2]
    ]
    biases = [name for name in info if "experts.down_proj_bias" in name]
    more = sum(2 * info[name].num_bytes for name in (*rows, *biases))  # they are there three times
    assert result.plan.predicted_bytes == result.plan.original_bytes + more
    found, expected = logits(load_model(result.out)), logits(load_model(model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    olmoe: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "keep": 0.5,
        "recipe": "coterie",
        "train_tokens": 512,
        "tokens": 256,
        "seq_len": 64,
        "text": text_folder,
    }
    whole = compress(olmoe, tmp_path / "whole", **settings)  # type: ignore[arg-type]
    real, done = layers_module.compress_layer, []

    def once(*arguments: object) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(layers_module, "compress_layer", once)
    with pytest.raises(KeyboardInterrupt):
        compress(olmoe, tmp_path / "out", **settings)  # type: ignore[arg-type]
    monkeypatch.undo()
    again = compress(olmoe, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert weight_digests(again.out) == weight_digests(whole.out)
    assert again.manifest == whole.manifest
