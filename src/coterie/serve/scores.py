"""Tokens with the logarithms of their probabilities, as the model gave them: before temperature and all else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredToken:
    """A token.

    Attributes:
        text: what it stands for by itself, which may be less than a character.
        logprob: the natural logarithm of its probability.
        top: the likeliest tokens in its place, the likeliest first.
    """

    text: str
    logprob: float
    top: Sequence[ScoredToken] = ()

    @property
    def utf8(self) -> list[int] | None:
        """The bytes of its text in UTF-8; None where they are not those of the token."""
        return None if "\ufffd" in self.text else list(self.text.encode())


def score_token(tokenizer: Any, token: int, scores_V: Tensor, *, top: int) -> ScoredToken:
    """Return a token that was chosen, given the scores of all, beside so many of the likeliest."""
    logprob_V = scores_V.log_softmax(-1)
    values, tokens = logprob_V.topk(min(top, len(logprob_V)))
    likeliest = [
        ScoredToken(text=_text_of(tokenizer, each), logprob=value)
        for value, each in zip(values.tolist(), tokens.tolist(), strict=True)
    ]
    return ScoredToken(text=_text_of(tokenizer, token), logprob=float(logprob_V[token]), top=likeliest)


def _text_of(tokenizer: Any, token: int) -> str:
    """Return the text of a token, also of a space that would be left out at the beginning of a text."""
    before = tokenizer("a", add_special_tokens=False).input_ids
    return str(tokenizer.decode([*before, token]))[len(str(tokenizer.decode(before))) :]
