"""What a source of text is to a model: every number against a slow loop, and the same however it is cut up."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import InputError, TextError
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.stream import likelihood
from coterie.model.stream.stream import Stream
from coterie.profile import information as information_module
from coterie.profile.calibration import TokenSet, tokenize
from coterie.profile.information import Information, distinct_share, measure_information, token_entropy

rows = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 5), min_size=width, max_size=width), min_size=1, max_size=6)
)


def slow_distinct_share(ids, length):
    seen, repeats, places = set(), 0, 0
    for row in ids:
        for start in range(len(row) - length + 1):
            gram = tuple(row[start : start + length])
            places += 1
            repeats += gram in seen
            seen.add(gram)
    return 1.0 if places == 0 else 1 - repeats / places


@given(ids=rows, length=st.integers(1, 5))
def test_different_n_grams_are_counted_within_sequences(ids, length):
    assert distinct_share(torch.tensor(ids), length) == pytest.approx(slow_distinct_share(ids, length))


def test_n_grams_of_large_token_ids_do_not_overflow():
    ids = torch.randint(2**40, 2**40 + 3, (50, 40))
    assert distinct_share(ids, 4) == pytest.approx(slow_distinct_share(ids.tolist(), 4))


@given(ids=rows)
def test_entropy_is_that_of_the_tokens(ids):
    counts = Counter(token for row in ids for token in row)
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert token_entropy(torch.tensor(ids)) == pytest.approx(entropy, abs=1e-12)


@pytest.fixture(scope="module")
def token_set(tiny, text):
    return tokenize(load_tokenizer(tiny()), text, seq_len=24, tokens=480)


def measure(path, token_set, **options):
    with Stream(Checkpoint.open(path)) as stream:
        return measure_information(stream, token_set, **options)


def slow_loss(path, ids):
    """Mean loss, token by token, from the logits of the whole model in float64."""
    model = load_model(path, dtype=torch.float64)
    model.set_experts_implementation("eager")
    total, count = 0.0, 0
    for row in ids:
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0]
        for place in range(len(row) - 1):
            scores = logits[place].tolist()
            largest = max(scores)
            normaliser = largest + math.log(sum(math.exp(score - largest) for score in scores))
            total += normaliser - scores[row[place + 1]]
            count += 1
    return total / count


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3"])
def test_the_loss_is_the_model_s(tiny, token_set, model_type):
    found = measure(tiny(model_type), token_set)
    assert [each.domain for each in found] == ["code", "prose"]
    for each in found:
        ids = token_set.sequences[each.domain]
        assert each.tokens == ids.numel()
        assert each.loss == pytest.approx(slow_loss(tiny(model_type), ids), rel=1e-5)
        assert each.perplexity == pytest.approx(math.exp(each.loss))
        assert each.aggregation == pytest.approx(1 - slow_distinct_share(ids.tolist(), 4))
        assert each.diversity == pytest.approx(slow_distinct_share(ids.tolist(), 2))


def test_how_the_text_is_cut_up_does_not_matter(tiny, token_set, monkeypatch):
    found = measure(tiny(), token_set, batch_size=8)
    for elements, batch_size in ((1, 3), (272 * 5, 1), (272 * 2 * 7, 2)):
        monkeypatch.setattr(likelihood, "BATCH_ELEMENTS", elements)
        other = measure(tiny(), token_set, batch_size=batch_size)
        assert [each.loss for each in other] == pytest.approx([each.loss for each in found], rel=1e-6)


def test_sources_are_counted_on_equally_many_tokens(tiny, token_set):
    code, prose = token_set.sequences.values()
    uneven = TokenSet(sequences={"code": code, "prose": prose[:2]}, seq_len=24, digest="")
    one, two = measure(tiny(), uneven)
    assert (one.tokens, two.tokens) == (code.numel(), 48)
    assert one.aggregation == pytest.approx(1 - slow_distinct_share(code[:2].tolist(), 4))
    assert one.entropy == pytest.approx(token_entropy(code[:2]))
    assert one.loss == pytest.approx(measure(tiny(), token_set)[0].loss, rel=1e-6), "the loss is of all tokens"


def test_where_only_answers_count_a_short_source_may_come_first(tiny, token_set):
    code, prose = token_set.sequences.values()
    short, counts = code[:2], {"code": torch.zeros(2, 24, dtype=torch.bool), "prose": torch.zeros_like(prose) > 0}
    counts["code"][:, 4:16] = True  # 24 tokens of answers
    counts["prose"][:, 8:20] = True
    answers = TokenSet(sequences={"code": short, "prose": prose}, seq_len=24, digest="", counts=counts)
    one, two = measure(tiny(), answers)
    assert (one.tokens, two.tokens) == (24, 12 * len(prose))
    assert one.entropy == pytest.approx(token_entropy(short[:, 4:16]))
    assert two.entropy == pytest.approx(token_entropy(prose[:2, 8:20])), "counted on as many tokens as the other"


def test_text_in_a_loop_shows(tiny, token_set):
    loop = torch.tensor([[1, 2, 3] * 8] * 10)
    looped = TokenSet(sequences={"loop": loop, "prose": token_set.sequences["prose"]}, seq_len=24, digest="")
    found, usual = measure(tiny(), looped)
    assert found.aggregation == pytest.approx(1 - 3 / 210)
    prose = slow_distinct_share(token_set.sequences["prose"].tolist(), 4)
    assert usual.aggregation == pytest.approx(1 - prose)
    assert usual.aggregation < 0.5 < found.aggregation
    assert found.diversity == pytest.approx(3 / 230)


def test_sequences_shorter_than_a_4_gram_are_refused(tiny, text):
    short = tokenize(load_tokenizer(tiny()), text, seq_len=3, tokens=30)
    with pytest.raises(TextError, match="sequences of 3 tokens hold no 4-grams; use --seq-len 4 or more"):
        measure(tiny(), short)


def test_a_model_that_predicts_no_numbers_is_refused(tiny, token_set, monkeypatch):
    monkeypatch.setattr(information_module, "token_nll", lambda *_: torch.tensor([math.nan]))
    with pytest.raises(InputError, match="predicts no numbers for the domain code in float32"):
        measure(tiny(), token_set)


def test_a_perplexity_beyond_all_floats_is_none_in_json():
    far = Information(domain="x", tokens=1, loss=1e4, aggregation=0.0, diversity=1.0, entropy=0.0)
    assert far.perplexity == math.inf
    assert far.to_json()["perplexity"] is None
    near = Information(domain="x", tokens=1, loss=0.0, aggregation=0.0, diversity=1.0, entropy=0.0)
    assert near.to_json() == {
        "domain": "x", "tokens": 1, "loss": 0.0, "perplexity": 1.0, "aggregation": 0.0, "diversity": 1.0,
        "entropy": 0.0,
    }  # fmt: skip
