"""A result in blocks that is trained: what is stored is what was trained, codes and size stay, and it is nearer."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from checkpoints import tensors_of, weight_digests
from coterie import compress, load_model
from coterie.compress.block_model import BlockModel
from coterie.compress.decide import plan
from coterie.compress.dry_run import dry_run
from coterie.compress.recipes import RECIPES
from coterie.compress.result_steps import distill_blocks as step
from coterie.errors import CorruptArtifact, Infeasible
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import SIZES, get_type
from coterie.model.disk.open import open_checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile.calibration import tokenize
from coterie.testing import tiny_checkpoint, tiny_text
from coterie.train import distill, memory
from coterie.train.loop import Loop

TRAINED = replace(RECIPES["gptaq"], name="trained", result_steps=(("distill-blocks", {}),))
SETTINGS = {"recipe": TRAINED, "type": "Q4_0", "tokens": 128, "seq_len": 16, "train_tokens": 1024}
SIZES_OF = {
    "olmoe": {"intermediate_size": 64, "num_experts": 4},
    "gpt_oss": {"intermediate_size": 64},
    "granitemoe": {"intermediate_size": 64},
    "deepseek_v3": {"moe_intermediate_size": 64},
    "qwen3_next": {"moe_intermediate_size": 64},
    "gemma4_text": {"moe_intermediate_size": 64},
}
LAYOUTS = [name for name in SIZES_OF if name != "olmoe"]


@pytest.fixture(scope="module", autouse=True)
def for_random_models():
    """A random model is told apart from noise by whole predictions only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "KEPT", 272)
        yield


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("text") / "text", documents=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_folder):
    """Return a factory of (model, trained result, the same without training), each made once."""
    folder, done = tmp_path_factory.mktemp("blocks"), {}

    def make(family="olmoe", dtype=torch.bfloat16):
        if family not in done:
            sizes = {"hidden_size": 64, "num_hidden_layers": 2, **SIZES_OF[family]}
            model = tiny_checkpoint(folder / f"{family}-model", family, dtype=dtype, **sizes)
            with pytest.MonkeyPatch.context() as patch:
                if family != "olmoe":  # whatever it is worth: random models of other families may not gain
                    falling = itertools.count(0.5, -0.01)
                    patch.setattr(distill, "mean_loss", lambda *arguments, **options: next(falling))
                trained = compress(model, folder / f"{family}-trained", text=text_folder, **SETTINGS)
            plain = compress(
                model,
                folder / f"{family}-plain",
                text=text_folder,
                **SETTINGS | {"train_tokens": None, "effort": "fast"},
            )
            done[family] = (model, trained, plain)
        return done[family]

    return make


def divergence(model, other, folder, text):
    """Mean divergence on other sequences of the same text than those that the seed draws."""
    sequences = tokenize(load_tokenizer(folder), text, seq_len=16, seed=7).sequences
    ids = torch.cat([ids_BS[:64] for ids_BS in sequences.values()])
    with torch.no_grad():
        p, q = (load_model(each)(input_ids=ids, use_cache=False).logits.log_softmax(-1) for each in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.long
def test_it_is_nearer_to_the_original_in_as_many_bytes(made, text_folder):
    model, trained, plain = made()
    notes = trained.manifest.distilled
    assert notes["taken"]
    assert notes["heldout_divergence_after"] < notes["heldout_divergence_before"]
    assert plain.manifest.distilled is None
    better, worse = (divergence(model, each.out, model, text_folder) for each in (trained, plain))
    assert better < 0.98 * worse
    sizes = [{file.name: file.stat().st_size for file in each.out.glob("*.safetensors")} for each in (trained, plain)]
    assert sizes[0] == sizes[1]
    assert Checkpoint.open(trained.out).num_bytes == trained.plan.predicted_bytes == plain.plan.predicted_bytes


@pytest.mark.parametrize("family", ["olmoe", *LAYOUTS])
@pytest.mark.long
def test_what_is_loaded_computes_the_very_numbers_that_were_trained(family, made):
    _, trained, _ = made(family)
    assert (trained.manifest.distilled["steps"], trained.manifest.distilled["taken"]) == (16, True)
    assert trained.logits_error == 0


@pytest.mark.parametrize("family", ["olmoe", *LAYOUTS])
@pytest.mark.long
def test_codes_stay_and_only_scales_norms_routers_and_biases_move(family, made):
    _, trained, plain = made(family)
    assert trained.manifest.distilled["taken"], "the test shows little when all stays what it was"
    before, after = tensors_of(plain.out), tensors_of(trained.out)
    packed = {name for name, info in open_checkpoint(trained.out).tensors.items() if info.packed is not None}
    kinds = {name: open_checkpoint(trained.out).tensors[name].packed.encoding for name in packed}
    assert before.keys() == after.keys()
    moved = set()
    for name, tensor in after.items():
        if name not in packed:
            moved |= {name} if not torch.equal(tensor, before[name]) else set()
            continue
        place, size = get_type(kinds[name].type).numbers_at, SIZES[kinds[name].type][1]
        old_GK, new_GK = (
            each.transpose(kinds[name].axis, -1).reshape(-1, size).clone() for each in (before[name], tensor)
        )
        assert not torch.equal(old_GK, new_GK), f"{name} was not trained"
        old_GK[:, place] = new_GK[:, place] = 0
        assert torch.equal(old_GK, new_GK), name
    assert any("norm" in name for name in moved)
    assert any("gate.weight" in name or "router" in name for name in moved)
    assert all(before[name].ndim < 2 or "gate" in name or "router" in name or "bias" in name for name in moved)


@pytest.mark.long
def test_bytes_on_disk_are_what_the_trained_model_computed_with(made, text_folder, tmp_path, monkeypatch):
    """Every matrix of the model in memory, after its last step, against the loaded result."""
    model, trained, _ = made()
    seen = {}
    real = BlockModel.changed

    def changed(self, shard, weights):
        for name, tensor in weights.items():
            if name in self._blocks:
                seen[name] = self._blocks[name].values(tensor).detach()
        seen.update({name: self.model.get_parameter(f"{name.replace('.weight', '.parametrizations.weight')}.original")
                     .detach().to(torch.bfloat16).float() for name in self._plain})  # fmt: skip
        return real(self, shard, weights)

    monkeypatch.setattr(BlockModel, "changed", changed)
    again = compress(model, tmp_path / "out", text=text_folder, **SETTINGS)
    assert weight_digests(again.out) == weight_digests(trained.out)
    loaded = load_model(again.out).state_dict()
    stacked = {}
    for name in [name for name in seen if name.endswith("gate_EFD")]:
        experts = name.removesuffix(".gate_EFD")
        stacked[f"{experts}.gate_up_proj"] = torch.cat((seen.pop(name), seen.pop(f"{experts}.up_EFD")), dim=1)
        stacked[f"{experts}.down_proj"] = seen.pop(f"{experts}.down_EDF")
    for name, tensor in {**seen, **stacked}.items():
        assert torch.equal(loaded[name], tensor), name
    assert loaded.keys() == seen.keys() | stacked.keys()


def killing(real, after):
    """Return a function that ends the run when it is called once more than so often."""
    calls = itertools.count()

    def call(*arguments, **options):
        if next(calls) == after:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize("at", ["training", "new files", "first in place"])
@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_bits(at, made, text_folder, tmp_path, monkeypatch):
    model, trained, _ = made()
    monkeypatch.setattr(distill, "SAVE_SECONDS", 0.0)

    if at == "training":
        monkeypatch.setattr(Loop, "advance", killing(Loop.advance, 7))
    elif at == "new files":
        monkeypatch.setattr(BlockModel, "changed", killing(BlockModel.changed, 1))
    else:  # logits are written, one file is in its place, and that of the second is empty
        monkeypatch.setattr(step, "atomic_path", killing(step.atomic_path, 2))
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", text=text_folder, **SETTINGS)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    again = compress(model, tmp_path / "out", text=text_folder, **SETTINGS)
    assert weight_digests(again.out) == weight_digests(trained.out)
    assert again.logits_error == 0
    manifests = [json.loads((each.out / "coterie.json").read_text()) for each in (again, trained)]
    assert manifests[0] == manifests[1]


@pytest.mark.long
def test_files_are_not_trained_twice_where_new_ones_were_damaged(made, text_folder, tmp_path, monkeypatch):
    model, trained, _ = made()
    monkeypatch.setattr(step, "atomic_path", killing(step.atomic_path, 2))
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", text=text_folder, **SETTINGS)
    monkeypatch.undo()
    file, *_ = (tmp_path / ".out.partial" / "private").glob("distilled-model*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match="is trained already"):
        compress(model, tmp_path / "out", text=text_folder, **SETTINGS)
    again = compress(model, tmp_path / "out", text=text_folder, **SETTINGS)
    assert weight_digests(again.out) == weight_digests(trained.out)


@pytest.mark.long
def test_what_does_not_help_is_left_undone(made, text_folder, tmp_path, monkeypatch):
    model, _, plain = made()
    monkeypatch.setattr(step, "RATE", 50.0)
    out = compress(model, tmp_path / "out", text=text_folder, **SETTINGS)
    assert not out.manifest.distilled["taken"]
    assert weight_digests(out.out) == weight_digests(plain.out)


@pytest.mark.long
def test_it_is_left_out_where_it_does_not_fit(made, text_folder, tmp_path, monkeypatch, caplog):
    model, _, plain = made()
    monkeypatch.setattr(memory, "block_training_bytes", lambda *arguments, **options: (("weights", 2**50),))
    out = compress(model, tmp_path / "out", text=text_folder, **SETTINGS | {"train_tokens": None})
    assert out.manifest.left_out == {
        "distill-blocks": "training the result as a whole takes at most 1024 TiB of memory, more than was free"
    }
    assert weight_digests(out.out) == weight_digests(plain.out)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 64}
    return tiny_checkpoint(tmp_path_factory.mktemp("small") / "model", "qwen3_moe", **sizes)


@pytest.mark.long
def test_a_plan_may_leave_matrices_plain(small, text_folder, tmp_path):
    """One projection of a layer's experts, and all of another's: they stay as they are, the others are trained."""
    whole = replace(plan(small, type="Q4_0", recipe="nearest"), result_steps=TRAINED.result_steps)
    left = ("layers.1.mlp.experts", "layers.0.mlp.experts.*.up_proj", "embed_tokens")
    types = {name: kind for name, kind in whole.types.items() if not any(each in name for each in left)}
    settings = {key: value for key, value in SETTINGS.items() if key not in ("recipe", "type")}
    result = compress(small, tmp_path / "out", plan=replace(whole, types=types), text=text_folder, **settings)
    assert result.manifest.distilled["taken"]
    assert result.logits_error == 0
    before, after = tensors_of(small), tensors_of(result.out)
    for name in before:
        if "up_proj" in name or "layers.1.mlp.experts" in name or "embed_tokens" in name:
            assert torch.equal(before[name], after[name]), name


@pytest.mark.long
def test_blocks_without_scales_stay_and_the_rest_is_trained(small, text_folder, tmp_path):
    result = compress(small, tmp_path / "out", text=text_folder, **SETTINGS | {"type": "MXFP4", "train_tokens": 512})
    plain = compress(small, tmp_path / "plain", text=text_folder, **SETTINGS | {"type": "MXFP4", "train_tokens": 0})
    assert result.manifest.distilled["taken"]
    assert result.logits_error == 0
    before, after = tensors_of(plain.out), tensors_of(result.out)
    four = [name for name, kind in open_checkpoint(result.out).tensors.items()
            if kind.packed is not None and kind.packed.encoding.type == "MXFP4"]  # fmt: skip
    assert four
    assert all(torch.equal(before[name], after[name]) for name in four)


def test_the_step_without_blocks_is_refused(small, text_folder, tmp_path):
    wrong = replace(plan(small, type="Q8_0", recipe="nearest"), result_steps=TRAINED.result_steps, types={})
    with pytest.raises(Infeasible, match="distill-blocks trains what is stored in blocks, and the plan stores nothing"):
        compress(small, tmp_path / "out", plan=wrong, text=text_folder, tokens=128, seq_len=16)


@pytest.mark.long
def test_a_dry_run_says_time_memory_and_disk(small, text_folder, tmp_path):
    settings = {"text": text_folder, "tokens": 128, "seq_len": 16, "bits": 5.5, "train_tokens": 512}
    foretold = dry_run(small, tmp_path / "out", **settings)
    names = [stage.name for stage in foretold.outlook.memory.stages]
    assert names[-2:] == ["reading the result to train it", "training the result as a whole"]
    assert "training" in [time.name for time in foretold.outlook.times]
    new = foretold.outlook.disk["the new weight files, until they are in their place"]
    assert new == foretold.plan.predicted_bytes
    assert RECIPES["coterie-bits"].trains


def test_recipes_in_one_type_train_nothing():
    assert not any(RECIPES[name].trains for name in ("nearest", "gptq", "gptaq"))
