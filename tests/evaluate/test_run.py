import json
import math
import shutil

import pytest
import torch

from coterie.compress.apply import compress
from coterie.errors import Infeasible, InputError, NotACheckpoint, TextError
from coterie.evaluate import run, speed
from coterie.evaluate.evaluation import Evaluation
from coterie.evaluate.generation import count_correct, read_questions
from coterie.evaluate.run import evaluate
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.stream import likelihood, spill, stream
from coterie.profile.calibration import tokenize
from coterie.testing import tiny_checkpoint, tiny_text
from some import first

TEXT = {"tokens": 512, "seq_len": 32}


@pytest.fixture(scope="module")
def alone(base_path, small_path, text_path):
    """Each model's scorecard from a call of its own."""
    return {
        path: evaluate(path, against=base_path, text=text_path, questions=2, **TEXT)[0]
        for path in (base_path, small_path)
    }


def slow_sequences(model_path, base_path, text):
    """Return (nll, the base's, KL, tokens) of each sequence by domain, one position at a time, all in float64."""
    model, base = (load_model(path, dtype=torch.float64) for path in (model_path, base_path))
    model.set_experts_implementation("eager")  # the default has no float64
    base.set_experts_implementation("eager")
    found = {}
    for domain, sequences in tokenize(load_tokenizer(base_path), text, **TEXT).sequences.items():
        found[domain] = []
        for ids_S in sequences:
            with torch.no_grad():
                log_q_SV = model(ids_S[None]).logits[0].log_softmax(-1)
                log_p_SV = base(ids_S[None]).logits[0].log_softmax(-1)
            nll = base_nll = kl = 0.0
            for position in range(len(ids_S) - 1):
                p, q = log_p_SV[position].tolist(), log_q_SV[position].tolist()
                nll -= q[int(ids_S[position + 1])]
                base_nll -= p[int(ids_S[position + 1])]
                kl += math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            found[domain].append((nll, base_nll, kl, len(ids_S) - 1))
    return found


def slow_error(values, slopes=1.0):
    """Return the standard error of the mean of equally many tokens' sums, each a mean over a sequence."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return slopes * math.sqrt(variance / len(values))


def check_errors(scores, base, rows):
    """Check scores against sequences of equal length."""
    nll, base_nll, kl = ([row[column] / row[3] for row in rows] for column in range(3))
    mine, other = (math.exp(math.fsum(values) / len(values)) for values in (nll, base_nll))
    close = {"rel": 1e-3}
    assert scores["sequences"] == base["sequences"] == len(rows)
    assert scores["kl_error"] == pytest.approx(slow_error(kl), **close)
    assert scores["perplexity_error"] == pytest.approx(slow_error(nll, mine), **close)
    assert base["perplexity"] == pytest.approx(other, rel=1e-4)
    assert base["perplexity_error"] == pytest.approx(slow_error(base_nll, other), **close)
    assert scores["perplexity_rise"] == pytest.approx(mine - other, **close)
    moved = [mine * a - other * b for a, b in zip(nll, base_nll, strict=True)]
    assert scores["perplexity_rise_error"] == pytest.approx(slow_error(moved), **close)
    assert scores["perplexity_ratio"] == pytest.approx(mine / other, **close)
    apart = [a - b for a, b in zip(nll, base_nll, strict=True)]
    assert scores["perplexity_ratio_error"] == pytest.approx(slow_error(apart, mine / other), **close)


@pytest.mark.parametrize("cached", [False, True])
def test_errors_are_those_of_slow_loops_over_sequences_in_float64(base_path, small_path, text_path, tmp_path, cached):
    cache = tmp_path / "cache" if cached else None
    [card] = evaluate(small_path, against=base_path, text=text_path, questions=0, cache=cache, **TEXT)
    rows = slow_sequences(small_path, base_path, text_path)
    for domain in ("code", "prose"):
        check_errors(card.domains[domain], card.base_domains[domain], rows[domain])
    check_errors(card.overall, card.base_overall, [*rows["code"], *rows["prose"]])
    assert card.overall["kl_error"] > 0


@pytest.mark.parametrize("cached", [False, True])
def test_the_original_has_a_row_of_its_own(base_path, small_path, text_path, alone, tmp_path, cached):
    cache = tmp_path / "cache" if cached else None
    [card] = evaluate(small_path, against=base_path, text=text_path, questions=2, cache=cache, **TEXT)
    own = alone[base_path]
    for domain, scores in {**card.base_domains, "all": card.base_overall}.items():
        expected = own.overall if domain == "all" else own.domains[domain]
        for key in ("perplexity", "perplexity_error"):
            assert scores[key] == pytest.approx(expected[key], rel=1e-9)
        for key in ("accuracy", "tokens", "sequences", "questions"):
            assert scores[key] == expected[key]
        assert scores["kl"] is scores["kl_error"] is scores["agreement"] is scores["perplexity_rise"] is None
    assert own.base_overall["perplexity"] == own.overall["perplexity"]
    assert (own.overall["perplexity_rise"], own.overall["perplexity_ratio"]) == (0, 1)


def test_a_base_that_is_not_asked_has_no_answers(base_path, small_path, text_path):
    settings = {"against": base_path, "text": text_path, "questions": 2, **TEXT}
    with Evaluation(ask_base=False, **settings) as evaluation:
        card = evaluation.score(small_path)
    assert card.overall["questions"] == 2
    assert (card.base_overall["questions"], card.base_overall["accuracy"]) == (0, None)
    assert card.base_overall["perplexity"] > 1


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


def test_a_copy_of_the_base_does_not_differ_from_it(base_path, text_path, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base_path, copy)
    [card] = evaluate(copy, against=base_path, text=text_path, **TEXT)
    assert card.overall["kl"] == 0
    assert card.overall["agreement"] == 1


def test_the_card_says_what_was_measured(base_path, small_path, text_path, tmp_path):
    [card] = evaluate(small_path, against=base_path, text=text_path, seed=3, **TEXT)
    small, base = Checkpoint.open(small_path), Checkpoint.open(base_path)
    assert (card.model, card.base) == ("small", "original")
    assert (card.model_digest, card.base_digest) == (small.digest, base.digest)
    assert card.num_bytes == small.num_bytes
    assert card.bytes_ratio == pytest.approx(small.num_bytes / base.num_bytes)
    assert card.memory_bytes is card.peak_memory_bytes is card.tokens_per_second is card.speed_ratio is None
    assert (card.seq_len, card.seed) == (32, 3)
    assert card.environment["dtype"] == "float32"
    assert card.domains["prose"]["questions"] == 6
    assert card.domains["code"]["questions"] == 0
    assert card.domains["code"]["accuracy"] is None
    right = count_correct(load_model(small_path), load_tokenizer(small_path), read_questions(text_path)["prose"])
    assert card.overall["accuracy"] == right / 6
    assert run.Scorecard.load(card.save(tmp_path / "card.json")) == card


def test_speed_and_memory_are_measured_on_request(base_path, small_path, text_path, monkeypatch):
    monkeypatch.setattr(speed, "_release_free_memory", lambda: None)
    [card] = evaluate(small_path, against=base_path, text=text_path, questions=0, speed_seconds=0, **TEXT)
    assert card.memory_bytes >= Checkpoint.open(small_path).num_bytes  # float32 on disk and in memory, and buffers
    assert card.peak_memory_bytes >= 0
    assert card.tokens_per_second > 0
    assert card.speed_ratio > 0
    [bare] = evaluate(small_path, text=text_path, questions=0, speed_seconds=0, dtype=torch.bfloat16, **TEXT)
    assert bare.speed_ratio is None
    assert bare.memory_bytes < 0.6 * card.memory_bytes


def test_models_that_do_not_fit_as_a_whole_are_refused_beforehand(base_path, small_path, text_path, monkeypatch):
    monkeypatch.setattr("coterie.evaluate.evaluation.read", None)
    arguments = {"against": base_path, "text": text_path, "speed_seconds": 0} | TEXT
    stage = speed.whole_stage({"small": stream.Stream(Checkpoint.open(small_path))})
    stage.check(stage.num_bytes)
    says = r"--speed with models in memory as a whole takes .* \(the rest\); --max-memory allows 768 MiB: leave --speed"
    with pytest.raises(Infeasible, match=says):
        stage.check(stage.num_bytes - 1)
    monkeypatch.setattr(speed.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**29}))
    says = r"\d+ KiB \(weights of the base\) \+ 768 MiB \(the rest\); 512 MiB are free: leave --speed"
    with pytest.raises(Infeasible, match=says):
        evaluate(small_path, **arguments)


def test_memory_that_one_unit_needs_is_checked_beforehand(base_path, text_path, monkeypatch):
    monkeypatch.setattr("coterie.evaluate.evaluation.read", None)
    with pytest.raises(Infeasible, match=r"--max-memory allows 512 MiB"):
        evaluate(base_path, text=text_path, max_memory="512MiB", **TEXT)


def test_nothing_is_loaded_as_a_whole_unless_speed_is_asked_for(base_path, small_path, text_path, monkeypatch):
    held = {}

    def count(self, loaded, fill=stream.Stream._fill):
        fill(self, loaded)
        units = [unit for unit in self.units if not self.model.get_parameter(unit.names[0]).is_meta]
        held.setdefault(self.checkpoint.path.name, set()).add(len(units))

    monkeypatch.setattr(stream.Stream, "_fill", count)
    monkeypatch.setattr(speed, "load_model", None)
    evaluate([small_path, base_path], against=base_path, text=text_path, **TEXT)
    assert held == {"small": {1}, "original": {1}}


def test_every_model_is_read_once(base_path, small_path, text_path, monkeypatch):
    read = []

    def note(self, unit, keep, load=stream.Stream._load_unit):
        read.append((self.checkpoint.path.name, unit.name))
        return load(self, unit, keep)

    monkeypatch.setattr(stream.Stream, "_load_unit", note)
    evaluate([small_path, base_path], against=base_path, text=text_path, **TEXT)
    counts = {entry: read.count(entry) for entry in read}
    heads = {("original", "lm_head"): 2, ("small", "lm_head"): 1}
    assert len(counts) == 10
    assert {entry: count for entry, count in counts.items() if entry[1] == "lm_head"} == heads
    assert {count for entry, count in counts.items() if entry not in heads} == {1}


def test_without_a_base_there_is_nothing_to_compare(base_path, text_path):
    [card] = evaluate(str(base_path), text=text_path, questions=0, **TEXT)
    assert card.base is card.base_digest is card.bytes_ratio is card.speed_ratio is card.base_overall is None
    assert card.base_domains == {}
    assert card.overall["perplexity_rise"] is card.overall["kl_error"] is None
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


@pytest.mark.parametrize("positions", [1, 2, 5, 31])
def test_logits_of_a_part_of_a_batch_exist_at_a_time(base_path, small_path, text_path, alone, monkeypatch, positions):
    monkeypatch.setattr(likelihood, "BATCH_ELEMENTS", (positions + 1) * 8 * 272)
    sizes, nll = [], likelihood.token_nll

    def measured(logits, ids):
        sizes.append(logits.numel())
        return nll(logits, ids)

    monkeypatch.setattr("coterie.evaluate.evaluation.token_nll", measured)
    [card] = evaluate(small_path, against=base_path, text=text_path, questions=2, **TEXT)
    assert max(sizes) == (positions + 1) * 8 * 272
    assert_same_quality(alone[small_path], card, rel=1e-5)


def test_outcomes_in_files_are_those_in_memory(base_path, small_path, text_path, alone, monkeypatch):
    monkeypatch.setattr(spill, "SPILL_BYTES", 0)
    monkeypatch.setattr(spill, "SMALL_BYTES", 0)
    [card] = evaluate(small_path, against=base_path, text=text_path, questions=2, **TEXT)
    assert_same_quality(alone[small_path], card, rel=0)


def test_several_models_score_as_each_alone(base_path, small_path, text_path, alone):
    cards = evaluate([small_path, base_path], against=base_path, text=text_path, questions=2, **TEXT)
    assert_same_quality(alone[small_path], cards[0], rel=1e-9)
    assert_same_quality(alone[base_path], cards[1], rel=1e-9)


def test_a_domain_with_questions_only_has_no_perplexity(base_path, text_path, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(text_path, text)
    (text / "prose.qa.jsonl").rename(text / "sums.qa.jsonl")
    [card] = evaluate(base_path, against=base_path, text=text, questions=2, **TEXT)
    assert list(card.domains) == ["code", "prose", "sums"]
    assert card.domains["sums"] | {"accuracy": 0} == {
        "perplexity": None, "perplexity_error": None, "perplexity_rise": None, "perplexity_rise_error": None,
        "perplexity_ratio": None, "perplexity_ratio_error": None, "kl": None, "kl_error": None, "agreement": None,
        "accuracy": 0, "tokens": 0, "sequences": 0, "questions": 2,
    }  # fmt: skip
    assert card.overall["questions"] == 2


def test_questions_are_part_of_the_text(base_path, text_path):
    cards = [evaluate(base_path, text=text_path, questions=number, **TEXT)[0] for number in (1, 2)]
    assert cards[0].text_digest != cards[1].text_digest
    assert cards[0].overall["perplexity"] == cards[1].overall["perplexity"]


@pytest.mark.long
def test_a_model_runs_in_the_number_format_asked_for(base_path, text_path):
    [card] = evaluate(base_path, text=text_path, questions=0, dtype=torch.bfloat16, **TEXT)
    [wide] = evaluate(base_path, text=text_path, questions=0, **TEXT)
    assert card.environment["dtype"] == "bfloat16"
    assert card.overall["perplexity"] == pytest.approx(wide.overall["perplexity"], rel=0.1)
    assert card.overall["perplexity"] != wide.overall["perplexity"]


def whole_scores(path, base_path, text, **cut):
    """Score with whole models and whole logits."""
    model, base = load_model(path), load_model(base_path)
    nll, kl, agreeing, count = 0.0, 0.0, 0, 0
    for ids_BS in tokenize(load_tokenizer(base_path), text, **cut).sequences.values():
        with torch.no_grad():
            log_q_BSV = model(input_ids=ids_BS, use_cache=False).logits.double().log_softmax(-1)[:, :-1]
            log_p_BSV = base(input_ids=ids_BS, use_cache=False).logits.double().log_softmax(-1)[:, :-1]
        nll -= float(log_q_BSV.gather(-1, ids_BS[:, 1:, None]).sum())
        kl += float((log_p_BSV.exp() * (log_p_BSV - log_q_BSV)).sum())
        agreeing += int((log_p_BSV.argmax(-1) == log_q_BSV.argmax(-1)).sum())
        count += ids_BS[:, 1:].numel()
    return nll, kl, agreeing, count


# Plain, tied heads, scaled logits, soft caps, dense layers first, recurrent layers.
@pytest.mark.parametrize(
    ("model_type", "changes"),
    first(
        2,
        [
            ("qwen3_moe", {"tie_word_embeddings": True}),
            ("gemma4_text", {"final_logit_softcapping": 2.0}),
            ("granitemoe", {"logits_scaling": 3.0}),
            ("mixtral", {}),
            ("deepseek_v3", {}),
            ("jamba", {}),
            ("gpt_oss", {}),
        ],
    ),
)
def test_other_families_score_as_their_whole_models(model_type, changes, text_path, tmp_path):
    cut = {"tokens": 128, "seq_len": 32}
    path = tiny_checkpoint(tmp_path / "model", model_type, **changes)
    other = tiny_checkpoint(tmp_path / "other", model_type, seed=1, **changes)
    card, same = evaluate([other, path], against=path, text=text_path, questions=1, **cut)
    check_scores(card.overall, *whole_scores(other, path, text_path, **cut))
    assert card.overall["kl"] > 0.001
    assert same.overall["kl"] == 0
    assert same.overall["agreement"] == 1


@pytest.mark.long
def test_a_mapped_result_scores_as_its_whole_model(base_path, text_path, tmp_path):
    out = compress(base_path, tmp_path / "mapped", keep=0.5, recipe="hc-smoe", router="map", text=text_path, **TEXT).out
    [card] = evaluate(out, against=base_path, text=text_path, **TEXT)
    check_scores(card.overall, *whole_scores(out, base_path, text_path, **TEXT))
    tokenizer = load_tokenizer(out)
    right = count_correct(load_model(out), tokenizer, read_questions(text_path)["prose"])
    assert card.domains["prose"]["accuracy"] == right / 6


def test_another_vocabulary_is_refused_with_both_sizes(base_path, text_path, tmp_path):
    wider = tiny_checkpoint(tmp_path / "wider", vocab_size=280)
    with pytest.raises(InputError, match=r"wider has a vocabulary of 280, original of 272"):
        evaluate([base_path, wider], against=base_path, text=text_path, **TEXT)
    assert evaluate(wider, text=text_path, questions=0, **TEXT)[0].overall["perplexity"] > 1


def test_a_model_that_predicts_no_tokens_is_refused(text_path, tmp_path):
    path = tiny_checkpoint(tmp_path / "labels", "openai_privacy_filter")
    with pytest.raises(InputError, match=r"labels gives \d+ scores a token where its vocabulary has 272"):
        evaluate(path, text=text_path, **TEXT)


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
    tensors["lm_head.weight"][5] = 3e38  # a number, but what it makes of any input is none
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"broken predicts \d+ of \d+ tokens of a batch in code .* float32"):
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
    monkeypatch.setattr(run, "Stream", None)
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
    monkeypatch.setattr(run, "Stream", None)
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
        speed_seconds=0,
        **TEXT,
    )
    for path, card in zip((small_path, base_path), cards, strict=True):
        assert card.overall["perplexity"] == pytest.approx(alone[path].overall["perplexity"], rel=1e-2)
        assert card.overall["kl"] == pytest.approx(alone[path].overall["kl"], rel=1e-2, abs=1e-5)
        assert card.peak_memory_bytes > card.memory_bytes
        assert card.environment["device"] == "cuda:0"
