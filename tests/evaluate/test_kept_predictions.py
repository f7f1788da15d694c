import json
import logging

import pytest
import torch

from coterie.evaluate import kept_predictions
from coterie.evaluate.evaluation import Evaluation
from coterie.evaluate.run import evaluate
from coterie.model.stream import likelihood, stream

TEXT = {"tokens": 512, "seq_len": 32, "questions": 2}


@pytest.fixture(scope="module")
def plain(base_path, small_path, text_path):
    """The scorecards of a small model and of the base, without a cache."""
    return evaluate([small_path, base_path], against=base_path, text=text_path, **TEXT)


def about(scores, rel=1e-6):
    return {key: value if value is None else pytest.approx(value, rel=rel, abs=1e-9) for key, value in scores.items()}


def units_read(monkeypatch):
    """Return a list that receives the name of the model of every unit that is read."""
    read = []

    def note(self, unit, keep, load=stream.Stream._load_unit):
        read.append(self.checkpoint.path.name)
        return load(self, unit, keep)

    monkeypatch.setattr(stream.Stream, "_load_unit", note)
    return read


def test_scores_do_not_change_by_the_cache(base_path, small_path, text_path, plain, tmp_path, monkeypatch, caplog):
    arguments = {"against": base_path, "text": text_path, "cache": tmp_path / "cache"} | TEXT
    with caplog.at_level(logging.INFO):
        first = evaluate([small_path, base_path], **arguments)
    assert "what the base predicts is kept in" in caplog.text
    read = units_read(monkeypatch)
    with Evaluation(ask_base=False, **arguments) as evaluation:
        second = evaluation.score(small_path)
    assert set(read) == {"small"}
    for card in (first[0], second):
        for domain, scores in plain[0].domains.items():
            assert card.domains[domain] == about(scores)
        assert card.overall == about(plain[0].overall)
        assert (card.model_digest, card.base_digest) == (plain[0].model_digest, plain[0].base_digest)
    assert first[1].overall["kl"] == pytest.approx(0, abs=1e-9)
    assert first[1].overall["agreement"] == 1
    assert first[1].overall["perplexity"] == pytest.approx(plain[1].overall["perplexity"], rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_cache_serves_any_batch_size(base_path, small_path, text_path, plain, tmp_path, batch_size, monkeypatch):
    arguments = {"against": base_path, "text": text_path, "cache": tmp_path / "cache"} | TEXT
    evaluate(small_path, batch_size=2, **arguments)
    monkeypatch.setattr(likelihood, "BATCH_ELEMENTS", 5 * 8 * 272)  # a few positions at a time
    [card] = evaluate(small_path, batch_size=batch_size, **arguments)
    assert card.overall == about(plain[0].overall, rel=1e-4)


def test_one_evaluation_scores_many_models(base_path, small_path, text_path, plain, tmp_path, monkeypatch):
    for cache in (None, tmp_path / "cache"):
        read = units_read(monkeypatch)
        with Evaluation(against=base_path, text=text_path, cache=cache, ask_base=False, **TEXT) as evaluation:
            evaluation.keep_predictions()
            cards = [evaluation.score(model) for model in (small_path, base_path, small_path)]
        assert cards[0].domains == cards[2].domains
        for card, expected in zip(cards, [*plain, plain[0]], strict=True):
            assert card.overall == about(expected.overall)
            assert card.num_bytes == expected.num_bytes
        monkeypatch.undo()
        units = 5
        assert read.count("small") == 2 * units
        # The base: to see what it predicts, and to be scored itself; without a cache its head for every model.
        assert read.count("original") == 2 * units + (0 if cache else 1)


def test_a_damaged_cache_is_made_again(base_path, small_path, text_path, plain, tmp_path, caplog):
    arguments = {"against": base_path, "text": text_path, "cache": tmp_path} | TEXT
    evaluate(small_path, **arguments)
    [values] = tmp_path.glob("*.bin")
    content = bytearray(values.read_bytes())
    content[1000] ^= 1
    values.write_bytes(content)
    [card] = evaluate(small_path, **arguments)
    assert "it is damaged; it is made again" in caplog.text
    assert card.overall == about(plain[0].overall)
    [values] = tmp_path.glob("*.json")
    values.write_text(json.dumps({"kind": "predictions"}))
    [card] = evaluate(small_path, **arguments)
    assert card.overall == about(plain[0].overall)


def test_other_text_or_another_base_has_predictions_of_its_own(base_path, small_path, text_path, tmp_path):
    evaluate(small_path, against=base_path, text=text_path, cache=tmp_path, **TEXT)
    evaluate(small_path, against=base_path, text=text_path, cache=tmp_path, **(TEXT | {"tokens": 256}))
    evaluate(small_path, against=small_path, text=text_path, cache=tmp_path, **TEXT)
    assert len(list(tmp_path.glob("*.bin"))) == 3
    evaluate(base_path, against=base_path, text=text_path, cache=tmp_path, **TEXT)
    assert len(list(tmp_path.glob("*.bin"))) == 3


def test_predictions_that_are_too_large_are_not_kept(base_path, small_path, text_path, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("coterie.evaluate.evaluation.KEPT_BYTES", 1000)
    [card] = evaluate(small_path, against=base_path, text=text_path, cache=tmp_path, **TEXT)
    assert card.overall == plain[0].overall
    assert not list(tmp_path.iterdir())


def test_without_a_base_nothing_is_kept(small_path, text_path, tmp_path):
    evaluate(small_path, text=text_path, cache=tmp_path, **TEXT)
    assert not list(tmp_path.iterdir())


def test_what_was_written_is_read_from_anywhere(tmp_path):
    shape = kept_predictions.PredictionShape(sequences=5, tokens=6, vocabulary=7)
    logits_NSV = torch.randn(5, 7, 7, generator=torch.Generator().manual_seed(0))
    with kept_predictions.keep_predictions(tmp_path, {"base": "x"}, shape) as writer:
        for first in (0, 2, 4):
            for positions in (slice(0, 3), slice(2, 7)):
                writer.put(first, positions, logits_NSV[first : first + 2, positions])
    expected = logits_NSV[:, :-1].log_softmax(-1)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.bin")) == shape.num_bytes
    found = kept_predictions.open_predictions(tmp_path, {"base": "x"}, shape)
    assert kept_predictions.open_predictions(tmp_path, {"base": "y"}, shape) is None
    with found:
        assert not found.masked
        for first, count, positions in ((0, 5, slice(0, 7)), (3, 2, slice(4, 6)), (1, 1, slice(5, 7))):
            log_p_BTV, likeliest_BT = found.read(first, count, positions)
            part = expected[first : first + count, positions.start : positions.stop - 1]
            torch.testing.assert_close(log_p_BTV, part, rtol=0, atol=1e-7)
            assert torch.equal(likeliest_BT, part.argmax(-1))


def test_masked_tokens_are_noted(tmp_path):
    shape = kept_predictions.PredictionShape(sequences=1, tokens=1, vocabulary=3)
    with kept_predictions.keep_predictions(tmp_path, {}, shape) as writer:
        writer.put(0, slice(0, 2), torch.tensor([[[0.0, -torch.inf, 1.0], [0.0, 0.0, 0.0]]]))
    with kept_predictions.open_predictions(tmp_path, {}, shape) as found:
        assert found.masked
        assert found.read(0, 1, slice(0, 2))[0][0, 0, 1] == -torch.inf
