"""What the original predicts: the divergence against slow loops, and files that give back what was put there."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coterie.errors import CorruptArtifact
from coterie.evaluate.speed import memory_in_use, peak_memory
from coterie.train.predictions import PredictionFile, Predictions, writing_predictions

CPU = torch.device("cpu")


def drawn(sequences, tokens=5, vocabulary=19, kept=7, seed=0):
    logits = torch.randn(sequences, tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    return Predictions.of(logits, kept)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), kept=st.sampled_from([1, 3, 7]))
def test_the_divergence_equals_slow_loops(seed, kept):
    generator = torch.Generator().manual_seed(seed)
    original, found = torch.randn(2, 3, 7, generator=generator) * 3, torch.randn(2, 3, 7, generator=generator)
    predictions = Predictions.of(original, kept)
    total = 0.0
    for b in range(2):
        for s in range(3):
            p = original[b, s].double().softmax(0).tolist()
            q = found[b, s].double().softmax(0).tolist()
            best = sorted(range(7), key=lambda v: -p[v])[:kept]
            total += sum(p[v] * math.log(p[v] / q[v]) for v in best) / 6
            rest_p, rest_q = (1 - sum(each[v] for v in best) for each in (p, q))
            if kept < 7:
                total += rest_p * math.log(rest_p / rest_q) / 6
    assert float(predictions.divergence(found)) == pytest.approx(total, rel=1e-3, abs=1e-5)


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), backwards=st.booleans(), data=st.data())
def test_a_file_gives_back_what_was_put_there(tmp_path_factory, sizes, backwards, data):
    path, count = tmp_path_factory.mktemp("predictions") / "p.safetensors", sum(sizes)
    whole = drawn(count)
    places = [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]
    with writing_predictions(path, count) as writer:
        for first, size in places[::-1] if backwards else places:
            writer.put(first, whole.select(torch.arange(first, first + size)))
    file = PredictionFile(path)
    assert file.shape == (count, 5, 7)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=8)), dtype=torch.int64)
    some, expected = file.select(rows), whole.select(rows)
    assert torch.equal(some.token_BSK, expected.token_BSK)
    assert torch.equal(some.log_probability_BSK, expected.log_probability_BSK)
    assert (some.token_BSK.dtype, some.log_probability_BSK.dtype) == (torch.int32, torch.float32)
    stored = load_file(path)
    assert torch.equal(stored["token"], whole.token_BSK), "an ordinary safetensors file"
    assert torch.equal(stored["log_probability"], whole.log_probability_BSK)


def test_an_error_leaves_no_file(tmp_path):
    def stopped():
        with writing_predictions(tmp_path / "p", 4) as writer:
            writer.put(0, drawn(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("first", "sequences", "tokens"), [(3, 2, 5), (-1, 2, 5), (0, 5, 5), (0, 2, 6)])
def test_what_has_no_place_is_refused(tmp_path, first, sequences, tokens):
    with writing_predictions(tmp_path / "p", 4) as writer:
        writer.put(0, drawn(1))
        with pytest.raises(ValueError, match="have no place among 4 sequences"):
            writer.put(first, drawn(sequences, tokens=tokens))


def written(path, sequences=4):
    with writing_predictions(path, sequences) as writer:
        writer.put(0, drawn(sequences))
    return PredictionFile(path)


@pytest.mark.parametrize("row", [-1, 4])
def test_sequences_that_are_not_there_are_refused(tmp_path, row):
    with pytest.raises(IndexError, match=f"of 4 sequences; there is no number {row}"):
        written(tmp_path / "p").select(torch.tensor([0, row]))


def test_files_that_hold_something_else_are_refused(tmp_path):
    with pytest.raises(CorruptArtifact, match="holds no predictions"):
        PredictionFile(tmp_path / "missing")
    (tmp_path / "text").write_text("not a file of tensors")
    save_file({"token": torch.zeros(2, 3, 4)}, tmp_path / "one")
    save_file({"token": torch.zeros(2, 3, 4), "log_probability": torch.zeros(2, 3, 4)}, tmp_path / "floats")
    save_file({"token": torch.zeros(2, 3, 4).int(), "log_probability": torch.zeros(2, 3, 5)}, tmp_path / "shapes")
    for name in ("text", "one", "floats", "shapes"):
        with pytest.raises(CorruptArtifact, match="holds no predictions"):
            PredictionFile(tmp_path / name)


def test_a_file_that_is_cut_off_is_noticed(tmp_path):
    file = written(tmp_path / "p")
    os.truncate(file.path, file.path.stat().st_size - 8)
    with pytest.raises(CorruptArtifact, match="ends within the predictions of sequence 3"):
        file.select(torch.tensor([0, 3]))
    with pytest.raises(CorruptArtifact, match="holds no predictions"):
        PredictionFile(file.path)


def peak_of(path, count):
    """Write and read so many sequences of 64 KiB; return the bytes that this takes at most."""
    one = Predictions(token_BSK=torch.ones(1, 128, 64).int(), log_probability_BSK=torch.ones(1, 128, 64))
    with peak_memory(CPU, above=memory_in_use(CPU)) as peak:
        with writing_predictions(path, count) as writer:
            for row in range(count):
                writer.put(row, one)
        file = PredictionFile(path)
        for first in range(0, count, 4):
            file.select(torch.arange(first, first + 4))
    return peak.num_bytes


@pytest.mark.long
def test_memory_does_not_grow_with_the_text(tmp_path):
    small, large = (peak_of(tmp_path / str(count), count) for count in (4, 2048))
    assert (tmp_path / "2048").stat().st_size > 128 * 2**20
    assert large - small < 16 * 2**20
