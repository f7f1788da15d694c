"""What profiling takes of memory does not grow with the text."""

import pytest
import torch

from coterie.evaluate.speed import memory_in_use, peak_memory
from coterie.profile.run import profile
from coterie.testing import tiny_checkpoint, tiny_text

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("long"), documents=120)


def peak_of(function):
    """Return the bytes that a call takes at most, above what is there before."""
    with peak_memory(CPU, above=memory_in_use(CPU)) as peak:
        function()
    return peak.num_bytes


@pytest.mark.long
def test_gradients_of_more_text_take_no_more_memory(tmp_path, long_text):
    vocab_size, few, many = 16_384, 4_096, 16_384
    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", vocab_size=vocab_size)

    def measure(tokens):
        profile(model, text=long_text, gradients=True, tokens=tokens, seq_len=256, sample_tokens=64)

    measure(256)  # what the first use of everything takes
    small, large = (peak_of(lambda tokens=tokens: measure(tokens)) for tokens in (few, many))
    assert large - small < (many - few) * vocab_size * 4 / 8, f"{small / MIB:.0f} MiB, then {large / MIB:.0f} MiB"
