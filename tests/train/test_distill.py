"""The recipe `coterie`, checkpoint to checkpoint: it distils, goes on where it was killed, says what it left out."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import tensors_of, weight_digests
from coterie import compress, load_model, profile
from coterie.errors import InputError, UnknownName
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile.calibration import tokenize
from coterie.testing import tiny_checkpoint, tiny_text
from coterie.train import distill, memory
from coterie.train.loop import Loop
from coterie.train.predictions import Predictions
from some import first

SETTINGS = {
    "keep": 0.5, "recipe": "coterie", "tokens": 8192, "seq_len": 16, "sample_tokens": 256, "train_tokens": 8192,
}  # fmt: skip
#: For what does not depend on how much is learnt, as long as it is something.
FEW = SETTINGS | {"tokens": 1024, "train_tokens": 1024}


@pytest.fixture(scope="module", autouse=True)
def for_random_models():
    """A random model is told apart from noise by small steps and whole predictions only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "RATE", 0.003)
        patch.setattr(distill, "KEPT", 272)
        yield


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v3", "gpt_oss")]


@pytest.fixture(scope="module", params=["olmoe", *OTHERS])
def folder(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("text") / "text", documents=60)


@pytest.fixture(scope="module")
def whole(folder, text_folder, tmp_path_factory):
    return compress(folder, tmp_path_factory.mktemp("whole") / "out", text=text_folder, **SETTINGS)


@pytest.fixture(scope="module")
def few(folder, text_folder, tmp_path_factory):
    made = compress(folder, tmp_path_factory.mktemp("few") / "out", text=text_folder, **FEW)
    assert made.manifest.distilled["taken"], "the tests show little when the weights stay what they were"
    return made


def divergence(model, other, folder, text):
    """Mean divergence on other sequences of the same text than those that the seed draws."""
    sequences = tokenize(load_tokenizer(folder), text, seq_len=16, seed=7).sequences
    ids = torch.cat([ids_BS[:64] for ids_BS in sequences.values()])
    with torch.no_grad():
        p, q = (each(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for each in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.long
def test_what_is_trained_is_what_stock_loaders_load(folder, whole, text_folder, tmp_path):
    notes = whole.manifest.distilled
    assert notes["taken"]
    assert notes["heldout_divergence_after"] < notes["heldout_divergence_before"]
    assert notes["steps"] == 512 / 4  # 8192 tokens, 4 sequences a step
    fast = compress(folder, tmp_path / "fast", text=text_folder, **SETTINGS | {"train_tokens": None, "effort": "fast"})
    assert fast.manifest.distilled is None
    original = load_model(folder, dtype=torch.float32)
    trained, plain = (AutoModelForCausalLM.from_pretrained(each.out, dtype=torch.float32) for each in (whole, fast))
    better, worse = (divergence(original, each, folder, text_folder) for each in (trained, plain))
    assert better < worse
    assert whole.plan.predicted_bytes == fast.plan.predicted_bytes


@pytest.mark.parametrize("at", first(1, [2, 4]))
def test_a_killed_run_goes_on_to_the_same_bits(folder, few, text_folder, tmp_path, monkeypatch, at):
    """Killed while training (after two steps that were saved), and while the weight files are written anew."""
    monkeypatch.setattr(distill, "SAVE_SECONDS", 0.0)
    if at == 2:
        real, taken = Loop.advance, []

        def advance(self, *arguments):
            if len(taken) == at:
                raise KeyboardInterrupt
            taken.append(self.step)
            return real(self, *arguments)

        monkeypatch.setattr(Loop, "advance", advance)
    else:
        from coterie.compress.result_model import ResultModel

        real_changed, written = ResultModel.changed, []

        def changed(self, folder, shard, memory):
            found = real_changed(self, folder, shard, memory)
            if found is not None and written:
                raise KeyboardInterrupt
            written.append(shard.file)
            return found

        monkeypatch.setattr(ResultModel, "changed", changed)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, tmp_path / "out", text=text_folder, **FEW)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    made = compress(folder, tmp_path / "out", text=text_folder, **FEW)
    assert weight_digests(made.out) == weight_digests(few.out)
    assert json.loads((made.out / "coterie.json").read_text()) == json.loads((few.out / "coterie.json").read_text())


@pytest.mark.long
def test_a_held_profile_wants_its_text_beside_it(folder, few, text_folder, tmp_path):
    held = profile(folder, text=text_folder, tokens=1024, seq_len=16, sample_tokens=256, gradients=True)
    with pytest.raises(InputError, match="give it with --text beside the profile, or take --effort fast"):
        compress(folder, tmp_path / "out", profile=held, **FEW)
    made = compress(folder, tmp_path / "out", profile=held, text=text_folder, **FEW)
    assert weight_digests(made.out) == weight_digests(few.out)


def test_it_is_left_out_where_it_does_not_fit(folder, text_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "training_bytes", lambda *arguments, **options: (("weights", 2**50),))
    made = compress(folder, tmp_path / "out", text=text_folder, **FEW | {"train_tokens": None})
    assert made.manifest.distilled is None
    reason = "training the result as a whole takes at most 1024 TiB of memory, more than was free"
    assert f"{reason}: training is left out" in caplog.text
    assert made.manifest.left_out == {"distill": reason}


def test_an_unknown_effort_is_refused(folder, text_folder, tmp_path):
    with pytest.raises(UnknownName, match="unknown effort 'quick'"):
        compress(folder, tmp_path / "out", text=text_folder, **FEW | {"train_tokens": None, "effort": "quick"})
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_what_the_original_predicts_is_kept_for_other_runs(folder, few, text_folder, tmp_path, monkeypatch):
    first = compress(folder, tmp_path / "first", text=text_folder, cache=tmp_path / "cache", **FEW)
    assert weight_digests(first.out) == weight_digests(few.out)
    assert len(list((tmp_path / "cache").iterdir())) == 1

    def of(cls, *arguments):
        raise AssertionError("computed anew")

    monkeypatch.setattr(Predictions, "of", classmethod(of))
    again = compress(folder, tmp_path / "again", text=text_folder, cache=tmp_path / "cache", **FEW)
    assert weight_digests(again.out) == weight_digests(few.out)


@pytest.mark.long
def test_kept_predictions_that_were_damaged_are_made_again(folder, few, text_folder, tmp_path, caplog):
    compress(folder, tmp_path / "first", text=text_folder, cache=tmp_path / "cache", **FEW)
    [file] = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    again = compress(folder, tmp_path / "again", text=text_folder, cache=tmp_path / "cache", **FEW)
    assert "they are made again" in caplog.text
    assert file.read_bytes() == content
    assert weight_digests(again.out) == weight_digests(few.out)


@pytest.mark.long
def test_it_trains_on_more_text_than_is_measured_and_again_where_there_is_no_more(tmp_path, caplog, monkeypatch):
    folder = tiny_checkpoint(tmp_path / "model", "olmoe")
    text = tiny_text(tmp_path / "text", documents=1)
    there = sum(len(rows) for rows in tokenize(load_tokenizer(folder), text, seq_len=16).sequences.values())
    few = SETTINGS | {"tokens": 512}
    more = compress(folder, tmp_path / "more", text=text, **few | {"train_tokens": 1024})
    assert more.manifest.distilled["tokens"] == 1024
    assert more.manifest.calibration_tokens == 512
    monkeypatch.setattr(distill, "EPOCHS", 1.5)
    most = compress(folder, tmp_path / "most", text=text, **few | {"train_tokens": 2**40})
    assert most.manifest.distilled["steps"] == round(1.5 * (there - there // 16) / 4)
    assert "asked for" not in caplog.text


@pytest.mark.parametrize(("recipe", "tokens", "says"), [("reap", 64, "trains nothing"), ("coterie", -1, "0 or more")])
def test_training_that_cannot_be_is_refused(folder, text_folder, tmp_path, recipe, tokens, says):
    with pytest.raises(InputError, match=says):
        compress(folder, tmp_path / "out", text=text_folder, **SETTINGS | {"recipe": recipe, "train_tokens": tokens})
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_ragged_result_is_trained_within_its_widths(text_folder, tmp_path):
    """What is written of an expert has its width, and was trained: it is not what training began with."""
    folder = tiny_checkpoint(tmp_path / "model", "olmoe")
    trained = compress(folder, tmp_path / "out", text=text_folder, **FEW | {"recipe": "coterie-ragged"})
    assert trained.manifest.distilled["taken"]
    assert trained.manifest.loads_with == "coterie"
    plain = compress(
        folder, tmp_path / "plain", text=text_folder, **FEW | {"recipe": "coterie-ragged", "train_tokens": 0}
    )
    widths = [layer.widths_after for layer in trained.manifest.layers]
    assert len({width for each in widths for width in each}) > 1
    before, after = tensors_of(plain.out), tensors_of(trained.out)
    moved = 0
    for name, tensor in after.items():
        assert tensor.shape == before[name].shape
        if ".experts." in name:
            parts = name.split(".")
            assert widths[int(parts[2])][int(parts[5])] in tensor.shape
            moved += not torch.equal(tensor, before[name])
    assert moved > 8


@pytest.mark.slow
def test_a_ragged_result_is_nearer_to_the_original_once_it_is_trained(tmp_path):
    text_folder = tiny_text(tmp_path / "text", documents=120)
    ragged = SETTINGS | {"recipe": "coterie-ragged", "tokens": 16384, "train_tokens": 8192}
    folder = tiny_checkpoint(tmp_path / "model", "olmoe")
    made = compress(folder, tmp_path / "out", text=text_folder, **ragged)
    assert made.manifest.distilled["taken"]
    assert made.manifest.loads_with == "coterie"
    widths = {width for layer in made.manifest.layers for width in layer.widths_after}
    assert len(widths) > 1
    original = load_model(folder, dtype=torch.float32)
    fast = compress(folder, tmp_path / "fast", text=text_folder, **ragged | {"train_tokens": 0})
    trained, plain = (load_model(each.out, dtype=torch.float32) for each in (made, fast))
    better, worse = (divergence(original, each, folder, text_folder) for each in (trained, plain))
    assert better < worse
