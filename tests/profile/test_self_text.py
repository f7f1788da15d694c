"""Text that a model writes itself: drawn from the model's own distribution, valid, and the same for the same seed."""

import json
import math
from dataclasses import replace

import pytest
import torch

from coterie.errors import Infeasible, InputError, OutputExists, TextError
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.stream import memory
from coterie.profile import calibrate as calibrate_module
from coterie.profile import self_text
from coterie.profile.calibrate import calibrate, generate
from coterie.profile.calibration import tokenize
from coterie.profile.documents import read_documents
from coterie.profile.run import profile
from coterie.profile.self_text import Writing, write_documents, write_text
from coterie.profile.text import CalibrationText, TextSettings
from coterie.testing import END_OF_TEXT_ID, tiny_tokenizer
from some import first

SHORT = Writing(tokens=40, max_length=9)


def written(path, writing=SHORT, tokenizer=None):
    return write_documents(load_model(path), tokenizer or load_tokenizer(path), writing)


def slow_document(model, tokenizer, writing, number):
    """Sample one document without a cache, a token at a time, in float64."""
    uniform = self_text._uniform(writing.seed, number, writing.max_length).tolist()
    if tokenizer.eos_token_id is None:
        prompt, ids = [], [int(uniform[0] * 256)]
    else:
        prompt, ids = [tokenizer.bos_token_id], []
    while len(ids) < writing.max_length - 1 + (not prompt):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].double() / writing.temperature
        allowed = list(range(257 if ids and prompt else 256))
        if writing.first_token == "likeliest" and not ids:
            ids.append(sorted(allowed, key=lambda token: -scores[token])[number])
            continue
        largest = max(scores[token].item() for token in allowed)
        masses = {token: math.exp(scores[token].item() - largest) for token in allowed}
        left = uniform[len(ids)] * sum(masses.values())
        for token in allowed:
            left -= masses[token]
            if left < 0:
                break
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(ids)
        ids.append(token)
    return tokenizer.decode(ids).rstrip("\ufffd")


@pytest.mark.parametrize("model_type", first(1, ["olmoe", "gpt_oss"]))
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5, "seed": 3}, {"first_token": "likeliest"}])
def test_documents_are_drawn_from_the_model_s_own_distribution(tiny, model_type, changes):
    writing = replace(SHORT, **changes)
    model, tokenizer = load_model(tiny(model_type)), load_tokenizer(tiny(model_type))
    found = write_documents(model, tokenizer, writing)
    slow = [slow_document(model, tokenizer, writing, number) for number in range(len(found) + 2)]
    slow = [text.replace("\0", "") for text in slow]
    assert found == [text for text in slow if text.strip()][: len(found)]
    assert len({text[:1] for text in found}) > 2


def test_a_seed_always_gives_the_same_text_and_more_contains_less(tiny):
    one, again = written(tiny()), written(tiny())
    assert one == again
    assert written(tiny(), replace(SHORT, seed=1)) != one
    more = written(tiny(), replace(SHORT, tokens=120))
    assert more[: len(one)] == one
    assert len(more) > len(one)


def test_as_much_is_written_as_was_asked_for(tiny):
    for tokens in (1, 50):
        documents = written(tiny(), replace(SHORT, tokens=tokens))
        ids = tiny_tokenizer()(documents)["input_ids"]
        assert sum(len(each) + 1 for each in ids) >= tokens


def test_the_text_has_no_special_tokens_and_none_the_tokenizer_does_not_know(tiny):
    documents = written(tiny(), replace(SHORT, tokens=400, temperature=5.0))
    assert not any("<|endoftext|>" in document for document in documents)
    assert all(document.strip() for document in documents)


def test_a_document_ends_where_the_model_ends_it(tiny):
    class Ending:
        """A model that ends every document after three tokens."""

        def __init__(self):
            self.model, self.seen = load_model(tiny()), []
            self.forward = self.model.forward

        def __call__(self, *args, **kwargs):
            output = self.forward(*args, **kwargs)
            self.seen.append(1)
            output.logits[:, -1, END_OF_TEXT_ID] = 1e4 if len(self.seen) % 4 == 0 else -1e4
            return output

    ending = Ending()
    ending.model.forward = ending
    documents = write_documents(ending.model, tiny_tokenizer(), replace(SHORT, tokens=8, max_length=8))
    ids = tiny_tokenizer().backend_tokenizer
    assert len(documents) >= 1
    assert len(ending.seen) == 4 * (len(ending.seen) // 4), "nothing is written after the end"
    assert all(len(ids.encode(document.replace("\ufffd", "?")).ids) <= 3 for document in documents)


def test_without_start_and_end_tokens_the_first_token_is_any(tiny):
    bare = tiny_tokenizer()
    bare.bos_token = bare.eos_token = bare.pad_token = None
    model = load_model(tiny())
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    found = write_documents(model, bare, SHORT)
    slow = [slow_document(model, bare, SHORT, number) for number in range(len(found) + 2)]
    slow = [text.replace("\0", "") for text in slow]
    assert found == [text for text in slow if text.strip()][: len(found)]


def test_low_temperature_loops_and_the_metrics_show_it(tiny, tmp_path):
    kept = {"tokens": 256, "seq_len": 64}
    for name, temperature in (("usual", 1.0), ("cold", 1e-4)):
        generate(tiny(), tmp_path / name, temperature=temperature, **kept)
    usual, cold = (calibrate(tiny(), text=tmp_path / name, **kept).sources[0] for name in ("usual", "cold"))
    assert cold.aggregation > 0.6 > 2 * usual.aggregation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "0 tokens in documents of up to 9 are no text"),
        ({"max_length": 1}, "documents of up to 1 are no text"),
        ({"temperature": 0.0}, "a temperature of 0.0 draws nothing"),
        ({"temperature": -1.0}, "draws nothing"),
        ({"temperature": math.nan}, "draws nothing"),
        ({"temperature": math.inf}, "draws nothing"),
    ],
)
def test_settings_that_nothing_can_be_written_with_are_refused(tiny, changes, message):
    with pytest.raises(InputError, match=message):
        write_text(Checkpoint.open(tiny()), replace(SHORT, **changes))


def test_a_model_that_writes_nothing_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(self_text._Voice, "_text", lambda *_: " \n")
    with pytest.raises(TextError, match="documents without any text"):
        written(tiny())


def test_a_model_that_predicts_no_numbers_is_refused(tiny):
    model = load_model(tiny())
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(InputError, match="predictions are not numbers"):
        write_documents(model, tiny_tokenizer(), SHORT)


# --- does it fit --------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_with_the_way_out(tiny, monkeypatch):
    monkeypatch.setattr(self_text, "load_model", None)  # refused before anything is loaded
    checkpoint = Checkpoint.open(tiny())
    with pytest.raises(
        Infeasible, match=r"takes at most 768 MiB .* \(weights\) .*; --max-memory allows 1\.00 MiB.*--text"
    ):
        write_text(checkpoint, SHORT, limit=2**20)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Free", (), {"available": 5 * 2**20})())
    with pytest.raises(Infeasible, match=r"5\.00 MiB are free: let it write where it fits"):
        write_text(checkpoint, SHORT)


def test_what_writing_takes_is_said(tiny, caplog):
    with caplog.at_level("INFO", logger="coterie"):
        write_text(Checkpoint.open(tiny()), replace(SHORT, seed=77))
    assert any(
        record.getMessage().startswith("memory: writing text with the model in memory as a whole takes at most 768 MiB")
        for record in caplog.records
    )


def test_a_checkpoint_that_only_loads_layer_by_layer_is_refused(tiny):
    checkpoint = replace(Checkpoint.open(tiny()), pickled=True)
    with pytest.raises(InputError, match="is stored as pickles and cannot be loaded as a whole"):
        write_text(checkpoint, SHORT)


def test_a_model_that_writes_no_text_is_refused(tiny):
    with pytest.raises(InputError, match="ForTokenClassification, which writes no text; give a folder of text"):
        write_text(Checkpoint.open(tiny("openai_privacy_filter")), SHORT)


# --- as calibration text ------------------------------------------------------------------------------------------


def test_text_in_memory_is_text_from_the_file(tiny, tmp_path):
    options = {"tokens": 300, "seq_len": 16, "seed": 5}
    file = generate(tiny(), tmp_path / "deep" / "own", **options)
    assert file == tmp_path / "deep" / "own" / "self.jsonl"
    assert sorted(path.name for path in file.parent.iterdir()) == ["self.json", "self.jsonl"]
    stored = tokenize(load_tokenizer(tiny()), file.parent, **options)
    direct = CalibrationText(Checkpoint.open(tiny()), TextSettings(source="self", **options)).draw()
    assert stored.digest == direct.digest
    assert stored.num_tokens == {"self": 19 * 16}
    about = json.loads((file.parent / "self.json").read_text())
    assert about["body"]["documents"] == len(read_documents(file))
    assert about["inputs"] == {"model": Checkpoint.open(tiny()).digest}
    one = profile(tiny(), text="self", **options)
    other = profile(tiny(), text=file.parent, **options)
    assert one.digest() == other.digest()
    assert one.domains == ("self",)


def test_own_text_mixes_with_other_text(tiny, text, tmp_path):
    for file in text.glob("*.txt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    generate(tiny(), tmp_path, tokens=256, seq_len=16)
    found = profile(tiny(), text=tmp_path, tokens=256, seq_len=16, weights={"self": 3, "prose": 1})
    assert dict(zip(found.domains, found.num_tokens, strict=True)) == {"prose": 64, "self": 192}


def test_text_is_written_once_and_drawn_from_twice(tiny, monkeypatch):
    loads = []
    original = self_text.load_model
    monkeypatch.setattr(self_text, "load_model", lambda *args, **kwargs: loads.append(1) or original(*args, **kwargs))
    written = CalibrationText(Checkpoint.open(tiny()), TextSettings(source="self", tokens=120, seq_len=12, seed=123))
    assert loads == []
    whole, part = written.draw(), written.draw(60)
    assert len(loads) == 1
    assert (whole.num_tokens, part.num_tokens) == ({"self": 120}, {"self": 60})
    assert torch.equal(whole.sequences["self"][:5], part.sequences["self"])


def test_own_text_has_no_domains_to_choose(tiny):
    for options in ({"weights": {"self": 1}}, {"domains": ("self",)}):
        with pytest.raises(InputError, match="text that the model writes has no domains"):
            profile(tiny(), text="self", tokens=64, seq_len=16, **options)


def test_a_folder_of_the_same_name_has_a_path(tiny, text, tmp_path, monkeypatch):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "prose.txt").write_bytes((text / "prose.txt").read_bytes())
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint.open(tiny())
    for source, domains in (("./self", ("prose",)), ("self", ("self",))):
        settings = TextSettings(source=source, tokens=64, seq_len=16)
        assert CalibrationText(checkpoint, settings).draw().domains == domains


@pytest.mark.parametrize("name", ["self.jsonl", "self.txt"])
def test_text_that_is_there_is_kept(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setattr(calibrate_module, "write_text", None)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputExists, match=f"{name} exists; choose another place"):
        generate(tiny(), tmp_path, tokens=64, seq_len=16)
    assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(OutputExists, match="is not a folder"):
        generate(tiny(), tmp_path / name / "below", tokens=64, seq_len=16)


def test_nothing_is_left_where_writing_failed(tiny, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrate_module, "write_text", fail)
        with pytest.raises(KeyboardInterrupt):
            generate(tiny(), tmp_path / "own", tokens=64, seq_len=16)
    assert not (tmp_path / "own").exists()
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_module.json, "dumps", fail)
        with pytest.raises(KeyboardInterrupt):
            calibrate_module._write_lines(tmp_path / "own" / "self.jsonl", ["one"])
    assert not (tmp_path / "own" / "self.jsonl").exists()
    generate(tiny(), tmp_path / "own", tokens=64, seq_len=16)
    assert len(list((tmp_path / "own").iterdir())) == 2
