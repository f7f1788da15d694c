"""The forecast of memory: its lines by hand, the largest stage, and the refusal with the way out."""

import logging

import pytest
import torch

from coterie.errors import Infeasible
from coterie.model.arch.layers import Architecture
from coterie.model.disk.open import open_checkpoint
from coterie.model.stream import memory
from coterie.model.stream.loss import logits_bytes
from coterie.model.stream.memory import (
    FIXED_BYTES,
    Forecast,
    Stage,
    batch_lines,
    head_lines,
    sample_lines,
    text_lines,
    unit_lines,
    whole_lines,
)
from coterie.model.stream.stream import Stream
from coterie.testing import tiny_checkpoint

GIB, MIB = 2**30, 2**20


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return Stream(open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("olmoe") / "model")))


def test_lines_by_hand(olmoe):
    layers = Architecture.of(olmoe.checkpoint).layers
    # A decoder layer: experts of 18,432 numbers, a router of 256, attention of 3,072, norms of 112; four bytes each.
    unit, reading = ("model.layers.0", 87_488), "reading and converting model.layers.0"
    assert unit_lines(olmoe) == (unit, (reading, 87_488))
    assert unit_lines(olmoe, copies=2.5) == (unit, (reading, 131_232))
    assert unit_lines(olmoe, [("less", 87_000)]) == (unit, (reading, 87_488))
    assert unit_lines(olmoe, [("more", 80_000), ("still more", 8_000)]) == (
        unit,
        ("more", 80_000),
        ("still more", 8_000),
    )
    assert head_lines(olmoe) == (("head, read and converted", 2 * 4 * 272 * 32),)
    # For a token two vectors of 32, the scores of 8 experts, 64 numbers beside.
    assert sample_lines(layers, 100) == (("token sample", 54_400),)
    assert text_lines(100) == (("text", 800),)
    assert whole_lines([("a", 3), ("b", 4)]) == (("weights of a", 3), ("weights of b", 4))
    # 12 sequences of 7 tokens; two experts of width 24 are 208 numbers of each token.
    options = {"batch_size": 12, "seq_len": 7, "tokens": 1000}
    assert batch_lines(olmoe, layers, **options) == (("activations of a batch", 4 * 84 * (8 * 32 + 2 * 208)),)
    backward = (("activations of a batch", 4 * 84 * (16 * 32 + 2 * 208)),)
    assert batch_lines(olmoe, layers, **options, gradients=True) == backward


def test_masks_that_are_written_out_count_for_every_token(tmp_path):
    stream = Stream(open_checkpoint(tiny_checkpoint(tmp_path / "model", "gpt_oss")))
    layers = Architecture.of(stream.checkpoint).layers
    lines = dict(batch_lines(stream, layers, batch_size=2, seq_len=7, tokens=1000))
    assert lines["masks"] == 4 * 7 * 1000  # those of the layers that come second


def test_logits_are_held_for_a_slice_of_positions_at_most():
    assert logits_bytes(batch_size=2, seq_len=8, vocab_size=100) == 3 * 4 * 2 * 8 * 100
    assert logits_bytes(batch_size=8, seq_len=512, vocab_size=150_000) == 3 * 4 * 2**25
    assert logits_bytes(batch_size=8, seq_len=512, vocab_size=2**22) == 3 * 4 * 2 * 8 * 2**22  # two positions at least


def test_the_largest_stage_counts_and_all_are_said(caplog):
    small, large = Stage(name="one", lines=(("x", MIB),)), Stage(name="two", lines=(("x", GIB), ("y", 0), ("z", MIB)))
    forecast = Forecast(stages=(small, large))
    assert (small.num_bytes, forecast.num_bytes) == (MIB + FIXED_BYTES, GIB + MIB + FIXED_BYTES)
    with caplog.at_level(logging.INFO, logger="coterie"):
        forecast.check(None)
        forecast.check(forecast.num_bytes)
    assert [record.getMessage() for record in caplog.records][:3] == [
        "memory: at most 1.75 GiB",
        "memory: one takes at most 769 MiB of memory: 1.00 MiB (x) + 768 MiB (the rest)",
        "memory: two takes at most 1.75 GiB of memory: 1.00 GiB (x) + 1.00 MiB (z) + 768 MiB (the rest)",
    ]
    with pytest.raises(Infeasible, match=r"^two takes at most 1\.75 GiB .*; --max-memory allows 1\.75 GiB: no setting"):
        forecast.check(forecast.num_bytes - 1)


@pytest.mark.parametrize(
    ("lines", "limit", "way"),
    [
        (
            (("layer", GIB), ("token sample", GIB)),
            2 * GIB,
            r"with a smaller --sample-tokens 1\.75 GiB .*\(token sample\)",
        ),
        ((("layer", GIB), ("token sample", MIB), ("text", GIB)), 2 * GIB, r"with a smaller --tokens 1\.75 GiB"),
        ((("layer", 2 * GIB), ("token sample", GIB)), 2 * GIB, "no setting makes it smaller, since one layer must fit"),
    ],
)
def test_the_way_out_is_the_largest_line_that_can_be_made_smaller(lines, limit, way):
    with pytest.raises(Infeasible, match=rf"--max-memory allows 2\.00 GiB: {way}"):
        Stage(name="this", lines=lines).check(limit)


def test_whole_models_must_fit_into_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: GIB)
    stage = Stage(name="this", lines=(("weights", GIB),), way_out="leave it out", device=torch.device("cpu"))
    with pytest.raises(Infeasible, match=r"1\.00 GiB are free: leave it out"):
        stage.check(None)
    stage.check(2 * GIB)
    Stage(name="this", lines=(("weights", GIB),)).check(None)
