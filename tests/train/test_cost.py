"""What training takes: against a count by hand, and said before anything is computed."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coterie.compress.apply import compress
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint
from coterie.testing import tiny_checkpoint
from coterie.train.cost import active_weights, say_cost, training_cost
from coterie.train.distill import EPOCHS


@pytest.fixture(scope="module")
def olmoe(tiny: Callable[..., Path]) -> Path:
    return tiny()


def by_hand(architecture: Architecture, top_k: int) -> float:
    """By this family's own names: all but the embedding, and of the experts the chosen ones."""
    total = 0.0
    for name, tensor in architecture.model.state_dict().items():
        if "embed_tokens" in name:
            continue
        total += tensor.numel() * (top_k / 8 if ".experts." in name else 1)
    return total


def test_weights_that_a_token_meets_are_counted(olmoe: Path) -> None:
    architecture = Architecture.of(Checkpoint.open(olmoe))
    assert active_weights(architecture.model, architecture.layers, [2, 2]) == by_hand(architecture, 2)
    assert active_weights(architecture.model, architecture.layers, [4, 4]) == by_hand(architecture, 4)


def test_a_head_that_is_the_embedding_is_a_product(tmp_path: Path) -> None:
    tied = Architecture.of(Checkpoint.open(tiny_checkpoint(tmp_path / "tied", "qwen3_moe", tie_word_embeddings=True)))
    apart = Architecture.of(
        Checkpoint.open(tiny_checkpoint(tmp_path / "apart", "qwen3_moe", tie_word_embeddings=False))
    )
    chosen = [layer.top_k for layer in tied.layers]
    assert active_weights(tied.model, tied.layers, chosen) == active_weights(apart.model, apart.layers, chosen)


def test_operations_are_those_of_one_pass_before_and_one_there_and_back(olmoe: Path) -> None:
    architecture = Architecture.of(Checkpoint.open(olmoe))
    cost = training_cost(
        architecture.model, architecture.model, architecture.layers, tokens=1000, top_k=1, device=torch.device("cpu")
    )
    assert cost.operations == 1000 * (2 * by_hand(architecture, 2) + 6 * by_hand(architecture, 1))
    assert cost.seconds > 0
    assert "training the result on 1,000 tokens" in str(cost)
    assert "some 1 minute here" in str(cost)


@pytest.mark.parametrize(("asked", "trained"), [(1000, 1000), (10**9, EPOCHS * 300)])
def test_text_is_seen_a_few_times_at_most(
    olmoe: Path, asked: int, trained: int, caplog: pytest.LogCaptureFixture
) -> None:
    architecture = Architecture.of(Checkpoint.open(olmoe))
    with caplog.at_level(logging.INFO, logger="coterie"):
        cost = say_cost(
            architecture.model, architecture.model, architecture.layers, text_tokens=300, tokens=asked, top_k=1,
            device=torch.device("cpu"),
        )  # fmt: skip
    assert cost.tokens == trained
    assert 0 < cost.training_seconds < cost.seconds
    assert f"cost: training the result on {trained:,} tokens" in caplog.text


def test_it_is_said_before_anything_is_computed(
    olmoe: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coterie.compress.apply.open_run", begin)
    with caplog.at_level(logging.INFO, logger="coterie"), pytest.raises(KeyboardInterrupt):
        compress(olmoe, tmp_path / "out", keep=0.5, text=text, tokens=256, seq_len=32, train_tokens=256)
    assert re.search(r"cost: training the result on 256 tokens, .* operations: some 1 minute here", caplog.text)
