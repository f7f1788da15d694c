import json
import math
import shutil

import pytest
import torch

from coterie.errors import InputError, NotACheckpoint, TextError
from coterie.evaluate import likelihood, run, speed
from coterie.evaluate.run import evaluate
from coterie.model.checkpoint import Checkpoint
from coterie.model.load import load_model, load_tokenizer
from coterie.profile.calibration import tokenize
from coterie.testing import tiny_checkpoint, tiny_text

TEXT = {"tokens": 512, "seq_len": 32}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Keep measurements of speed and memory short: they have tests of their own."""
    measure = run.measure_speed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_speed", lambda *args, **more: measure(*args, rounds=3, **more))
        patch.setattr(speed, "_release_free_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def alone(base_path, small_path, text_path):
    """Each model's scorecard from a call of its own."""
    return {
        path: evaluate(path, against=base_path, text=text_path, questions=2, **TEXT)[0]
        for path in (base_path, small_path)
    }


def slow_scores(model_path, base_path, text):
    """Score one sequence at a time, one position at a time, all in float64."""
    model, base = (load_model(path, dtype=torch.float64) for path in (model_path, base_path))
    model.set_experts_implementation("eager")  # the default has no float64
    base.set_experts_implementation("eager")
    tokens = tokenize(load_tokenizer(base_path), text, **TEXT)
    found = {}
    for domain, sequences in tokens.sequences.items():
        nll, kl, agreeing, count = 0.0, 0.0, 0, 0
        for ids_S in sequences:
            with torch.no_grad():
                log_q_SV = model(ids_S[None]).logits[0].log_softmax(-1)
                log_p_SV = base(ids_S[None]).logits[0].log_softmax(-1)
            for position in range(len(ids_S) - 1):
                p, q = log_p_SV[position].tolist(), log_q_SV[position].tolist()
                nll -= q[int(ids_S[position + 1])]
                kl += math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
                agreeing += p.index(max(p)) == q.index(max(q))
                count += 1
        found[domain] = (nll, kl, agreeing, count)
    return found


def check_scores(scores, nll, kl, agreeing, count):
    assert scores["tokens"] == count
    assert scores["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert scores["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert scores["agreement"] == pytest.approx(agreeing / count, abs=1.5 / count)  # a near-tie may turn


def test_scores_are_those_of_slow_loops_in_float64(base_path, small_path, text_path):
    [card] = evaluate(small_path, against=base_path, text=text_path, questions=0, **TEXT)
    expected = slow_scores(small_path, base_path, text_path)
    assert list(card.domains) == ["code", "prose"] == list(expected)
    for domain, sums in expected.items():
        check_scores(card.domains[domain], *sums)
    check_scores(card.overall, *(sum(column) for column in zip(*expected.values(), strict=True)))
    assert card.overall["kl"] > 0.01
    assert card.overall["agreement"] < 0.99


def test_the_base_does_not_differ_from_itself(base_path, text_path):
    [card] = evaluate([base_path], against=base_path, text=text_path, **TEXT)
    for scores in (*card.domains.values(), card.overall):
        assert scores["kl"] == 0
        assert scores["agreement"] == 1
    assert card.bytes_ratio == 1
    assert card.model_digest == card.base_digest
    assert card.speed_ratio > 0


def test_the_card_says_what_was_measured(base_path, small_path, text_path, tmp_path):
    [card] = evaluate(small_path, against=base_path, text=text_path, seed=3, **TEXT)
    small, base = Checkpoint.open(small_path), Checkpoint.open(base_path)
    assert (card.model, card.base) == ("small", "original")
    assert (card.model_digest, card.base_digest) == (small.digest, base.digest)
    assert card.num_bytes == small.num_bytes
    assert card.bytes_ratio == pytest.approx(small.num_bytes / base.num_bytes)
    assert card.memory_bytes >= small.num_bytes  # float32 on disk and in memory, and buffers
    assert card.peak_memory_bytes >= 0
    assert card.tokens_per_second > 0
    assert (card.seq_len, card.seed) == (32, 3)
    assert card.environment["dtype"] == "float32"
    assert card.domains["prose"]["questions"] == 6
    assert card.domains["code"]["questions"] == 0
    assert card.domains["code"]["accuracy"] is None
    assert 0 <= card.overall["accuracy"] <= 1
    assert run.Scorecard.load(card.save(tmp_path / "card.json")) == card


def test_without_a_base_there_is_nothing_to_compare(base_path, text_path):
    [card] = evaluate(str(base_path), text=text_path, questions=0, **TEXT)
    assert card.base is card.base_digest is card.bytes_ratio is card.speed_ratio is None
    assert card.overall["kl"] is card.overall["agreement"] is card.overall["accuracy"] is None
    assert card.overall["perplexity"] > 1


def assert_same_quality(card, other, rel):
    assert card.text_digest == other.text_digest
    for domain, scores in card.domains.items():
        for key in ("perplexity", "kl"):
            assert other.domains[domain][key] == pytest.approx(scores[key], rel=rel)
        for key in ("agreement", "accuracy", "tokens", "questions"):
            assert other.domains[domain][key] == scores[key]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_change_the_scores(base_path, small_path, text_path, alone, batch_size):
    [card] = evaluate(small_path, against=base_path, text=text_path, batch_size=batch_size, questions=2, **TEXT)
    assert_same_quality(alone[small_path], card, rel=1e-4)


def test_batches_whose_logits_are_too_large_are_cut(base_path, small_path, text_path, alone, monkeypatch):
    shapes = set()
    forward = run.logits_of
    monkeypatch.setattr(run, "logits_of", lambda model, ids_BS: shapes.add(len(ids_BS)) or forward(model, ids_BS))
    monkeypatch.setattr(likelihood, "BATCH_ELEMENTS", 2 * 32 * 272)
    [card] = evaluate(small_path, against=base_path, text=text_path, questions=2, **TEXT)
    assert shapes == {2}
    assert_same_quality(alone[small_path], card, rel=1e-4)


@pytest.mark.parametrize(("cache_bytes", "base_passes"), [(2**30, 1), (512 * 272 * 4, 1), (512 * 272 * 4 - 1, 2)])
def test_several_models_score_as_each_alone(
    base_path, small_path, text_path, alone, monkeypatch, cache_bytes, base_passes
):
    asked, loaded = [], []
    forward, load = run.logits_of, run.load_model
    monkeypatch.setattr(run, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(run, "logits_of", lambda model, ids_BS: asked.append(id(model)) or forward(model, ids_BS))
    monkeypatch.setattr(run, "load_model", lambda path, **more: loaded.append(load(path, **more)) or loaded[-1])
    cards = evaluate([small_path, base_path], against=base_path, text=text_path, questions=2, **TEXT)
    assert len(loaded) == 3
    batches = 2  # of 8 sequences, one a domain
    assert asked.count(id(loaded[0])) == base_passes * batches
    assert_same_quality(alone[small_path], cards[0], rel=1e-9)
    assert_same_quality(alone[base_path], cards[1], rel=1e-9)


def test_a_domain_with_questions_only_has_no_perplexity(base_path, text_path, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(text_path, text)
    (text / "prose.qa.jsonl").rename(text / "sums.qa.jsonl")
    [card] = evaluate(base_path, against=base_path, text=text, questions=2, **TEXT)
    assert list(card.domains) == ["code", "prose", "sums"]
    assert card.domains["sums"] | {"accuracy": 0} == {
        "perplexity": None, "kl": None, "agreement": None, "accuracy": 0, "tokens": 0, "questions": 2,
    }  # fmt: skip
    assert card.overall["questions"] == 2


def test_questions_are_part_of_the_text(base_path, text_path):
    cards = [evaluate(base_path, text=text_path, questions=number, **TEXT)[0] for number in (1, 2)]
    assert cards[0].text_digest != cards[1].text_digest
    assert cards[0].overall["perplexity"] == cards[1].overall["perplexity"]


def test_a_model_runs_in_the_number_format_asked_for(base_path, text_path):
    [card] = evaluate(base_path, text=text_path, questions=0, dtype=torch.bfloat16, **TEXT)
    [wide] = evaluate(base_path, text=text_path, questions=0, **TEXT)
    assert card.environment["dtype"] == "bfloat16"
    assert card.memory_bytes < 0.6 * wide.memory_bytes
    assert card.overall["perplexity"] == pytest.approx(wide.overall["perplexity"], rel=0.1)
    assert card.overall["perplexity"] != wide.overall["perplexity"]


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_other_families_are_evaluated_the_same_way(model_type, text_path, tmp_path):
    path = tiny_checkpoint(tmp_path / "model", model_type)
    [card] = evaluate(path, against=path, text=text_path, tokens=128, seq_len=32, questions=1)
    assert card.overall["kl"] == 0
    assert card.overall["agreement"] == 1


def test_another_vocabulary_is_refused_with_both_sizes(base_path, text_path, tmp_path):
    wider = tiny_checkpoint(tmp_path / "wider", vocab_size=280)
    with pytest.raises(InputError, match=r"wider has a vocabulary of 280, original of 272"):
        evaluate([base_path, wider], against=base_path, text=text_path, **TEXT)
    assert evaluate(wider, text=text_path, questions=0, **TEXT)[0].overall["perplexity"] > 1


def test_another_tokenizer_is_refused_with_numbers(base_path, text_path, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base_path, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["in"] = 257
    content["model"]["merges"] = [["i", "n"]]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"other and original read this text as other tokens.*258 and 257 tokens"):
        evaluate(other, against=base_path, text=text_path, **TEXT)


def test_a_tokenizer_of_another_model_is_refused(text_path, tmp_path):
    path = tiny_checkpoint(tmp_path / "model", vocab_size=200, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with pytest.raises(InputError, match=r"token id 256, but the model has a vocabulary of 200"):
        evaluate(path, text=text_path, **TEXT)


def test_predictions_that_are_not_numbers_are_refused(base_path, text_path, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(base_path, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][5, 3] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"broken predicts \d+ of \d+ tokens in code .* float32"):
        evaluate(broken, against=base_path, text=text_path, questions=0, **TEXT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "no model"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"questions": -1}, "questions is -1"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": "toaster"}, "toaster"),
        ({"device": "cuda:97"}, "not there"),
    ],
)
def test_nonsense_is_refused_before_anything_is_loaded(base_path, text_path, changes, message, monkeypatch):
    monkeypatch.setattr(run, "load_model", None)
    arguments = {"models": base_path, "text": text_path} | TEXT | changes
    with pytest.raises(InputError, match=message):
        evaluate(arguments.pop("models"), **arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("code.txt", "", "code.txt is empty"),
        ("code.txt", "short", "has 6 tokens, fewer than one sequence of 32"),
        ("code.qa.jsonl", "{}\n", "line 1"),
    ],
)
def test_bad_text_is_refused_before_anything_is_loaded(base_path, tmp_path, name, content, message, monkeypatch):
    monkeypatch.setattr(run, "load_model", None)
    text = tiny_text(tmp_path / "text", documents=1)
    (text / name).write_text(content)
    with pytest.raises(TextError, match=message):
        evaluate(base_path, text=text, **TEXT)


def test_missing_folders_are_refused(base_path, text_path, tmp_path):
    with pytest.raises(TextError, match="not a folder"):
        evaluate(base_path, text=tmp_path / "none", **TEXT)
    with pytest.raises(NotACheckpoint, match="does not exist"):
        evaluate(tmp_path / "none", text=text_path, **TEXT)
    with pytest.raises(NotACheckpoint, match="does not exist"):
        evaluate(base_path, against=tmp_path / "none", text=text_path, **TEXT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_scores_as_the_cpu_does(base_path, small_path, text_path, alone):
    cards = evaluate(
        [small_path, base_path],
        against=base_path,
        text=text_path,
        questions=2,
        device="cuda",
        dtype=torch.float32,
        **TEXT,
    )
    for path, card in zip((small_path, base_path), cards, strict=True):
        assert card.overall["perplexity"] == pytest.approx(alone[path].overall["perplexity"], rel=1e-2)
        assert card.overall["kl"] == pytest.approx(alone[path].overall["kl"], rel=1e-2, abs=1e-5)
        assert card.peak_memory_bytes > card.memory_bytes
        assert card.environment["device"] == "cuda:0"
