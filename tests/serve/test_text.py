from typing import Any

import pytest

from coterie.serve.text import Text
from coterie.testing import tiny_tokenizer

SENTENCE = "So — 你好, naïve 🙂 world.\nEnd of it"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def pieces(text: Text, tokens: list[int]) -> list[str]:
    return [*(text.add(token) for token in tokens), text.rest()]


def test_pieces_are_whole_characters_and_together_the_text(tokenizer):
    tokens = tokenizer(SENTENCE).input_ids
    assert len(tokens) > len(SENTENCE)  # bytes
    parts = pieces(Text(tokenizer), tokens)
    assert "".join(parts) == SENTENCE
    assert not any("\ufffd" in part for part in parts)


def test_bytes_that_are_no_character_come_with_the_end(tokenizer):
    tokens = tokenizer("a🙂").input_ids
    assert pieces(Text(tokenizer), tokens[:-1]) == ["a", "", "", "", "\ufffd"]


@pytest.mark.parametrize(
    "stops", [["world"], ["End", "world.\n"], ["xyz", "ld.", "world.!"], ["🙂 wo"], ["S"], ["never"]]
)
def test_nothing_comes_from_a_stop_string_on(tokenizer, stops):
    begins = [SENTENCE.find(stop) for stop in stops if stop in SENTENCE]
    text = Text(tokenizer, stops)
    assert "".join(pieces(text, tokenizer(SENTENCE).input_ids)) == SENTENCE[: min(begins, default=None)]
    assert text.is_stopped == bool(begins)


def test_what_may_begin_a_stop_string_is_kept_back(tokenizer):
    text = Text(tokenizer, ["abc"])
    assert pieces(text, tokenizer("xababd").input_ids) == ["x", "", "", "ab", "", "abd", ""]
    assert pieces(Text(tokenizer, ["abc"]), tokenizer("xab").input_ids) == ["x", "", "", "ab"]


def test_special_tokens_are_no_text_unless_asked_for(tokenizer):
    tokens = [*tokenizer("a").input_ids, tokenizer.eos_token_id, *tokenizer("b").input_ids]
    assert "".join(pieces(Text(tokenizer), tokens)) == "ab"
    assert "".join(pieces(Text(tokenizer, special=True), tokens)) == "a<|endoftext|>b"
