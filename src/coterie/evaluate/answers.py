"""Answers: which questions a model answers exactly, found by reading instead of writing.

Greedy generation reads a model's weights once for each token that it writes. But whether it would write a certain
answer shows in one pass over question and answer together: it does exactly when, at every position of the answer, the
model's likeliest token is the answer's next one, and after it one that ends the line or the text. Up to the first
position where that fails, what would have been written is known too, so an answer that ends there otherwise than
expected (a token that holds its last letter and the newline) is judged by its text, as written ones are
(`coterie.evaluate.generation`).

What this takes for granted: a model writes text in the tokens that its tokenizer makes of it. A right answer in odd
pieces counts as wrong here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.evaluate.generation import Question, batches_of_one_length, finished_line, prompt_ids
from coterie.model.stream.reading import Head, likeliest


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One way to write the answer after its question.

    Attributes:
        question: number of the question.
        ids: tokens of question and answer.
        prompt_length: how many of them are the question's.
    """

    question: int
    ids: tuple[int, ...]
    prompt_length: int


def attempts(tokenizer: Any, questions: Sequence[Question]) -> list[Attempt]:
    """Tokenize questions with their answers: each answer with one space before it and with none."""
    tried: list[Attempt] = []
    for number, question in enumerate(questions):
        prompt = prompt_ids(tokenizer, question.question)
        answer = question.answer.strip()
        for text in (f" {answer}", answer):
            ids = prompt_ids(tokenizer, question.question + text)
            if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
                # The question's last token and the answer's first would be one: no model that has read the question
                # writes that.
                ids = prompt + list(tokenizer(text, add_special_tokens=False)["input_ids"])
            attempt = Attempt(question=number, ids=tuple(ids), prompt_length=len(prompt))
            if attempt not in tried[-1:]:
                tried.append(attempt)
    return tried


def first_attempts(tried: Sequence[Attempt]) -> list[Attempt]:
    """Return the first attempt of each question."""
    return [attempt for before, attempt in zip((None, *tried), tried, strict=False) if not _same(before, attempt)]


def second_attempts(tried: Sequence[Attempt], begun: Mapping[int, int], right: Set[int]) -> list[Attempt]:
    """Return the other attempts that can still succeed.

    All attempts at a question share its tokens, so the first token that the model writes after it is known from one
    of them: an attempt that begins otherwise would be judged by that token alone, as the first one was.

    Args:
        tried: what `attempts` returned.
        begun: first token that the model writes after each question, see `right_in_batch`.
        right: questions that were answered exactly.
    """
    return [
        attempt
        for before, attempt in zip((None, *tried), tried, strict=False)
        if _same(before, attempt)
        and attempt.question not in right
        and attempt.ids[attempt.prompt_length] == begun[attempt.question]
    ]


def _same(before: Attempt | None, attempt: Attempt) -> bool:
    return before is not None and before.question == attempt.question


def attempt_batches(tried: Sequence[Attempt], *, tokens: int) -> list[tuple[list[Attempt], Tensor]]:
    """Return batches of attempts of one length each, so that nothing is padded, and their ids (B, S).

    Args:
        tried: what `attempts` returned.
        tokens: tokens in a batch at most (one attempt at least).
    """
    rows = batches_of_one_length([attempt.ids for attempt in tried], lambda length: max(1, tokens // length))
    grouped = [[tried[row] for row in batch] for batch in rows]
    return [(batch, torch.tensor([attempt.ids for attempt in batch], dtype=torch.int64)) for batch in grouped]


def right_in_batch(
    head: Head,
    batch: Sequence[Attempt],
    ids_BS: Tensor,
    output: Any,
    questions: Sequence[Question],
    *,
    tokenizer: Any,
    ends: Set[int],
    vocab_size: int,
    begun: dict[int, int] | None = None,
) -> set[int]:
    """Return the numbers of the questions that a model answers exactly in one of a batch's attempts.

    Args:
        head: gives the model's logits, see `coterie.model.stream.reading`.
        batch: attempts of one length.
        ids_BS: their tokens.
        output: what the base model returned for them.
        questions: all questions.
        tokenizer: the model's.
        ends: tokens that end a text.
        vocab_size: V.
        begun: receives the first token that the model writes after each question, by its number.
    """
    start = min(attempt.prompt_length for attempt in batch) - 1
    predicted_BP = likeliest(head, ids_BS, output, start=start, vocab_size=vocab_size)
    right = set()
    for attempt, predicted_P in zip(batch, predicted_BP.tolist(), strict=True):
        written = written_ids(attempt.ids[attempt.prompt_length :], predicted_P[attempt.prompt_length - 1 - start :])
        if begun is not None:
            begun[attempt.question] = written[0]
        line = finished_line(tokenizer, written, ends)
        if line == questions[attempt.question].answer.strip():
            right.add(attempt.question)
    return right


def written_ids(answer: Sequence[int], predicted: Sequence[int]) -> list[int]:
    """Return the tokens that greedy generation writes until it leaves the answer, the leaving one included.

    Args:
        answer: tokens of the answer.
        predicted: the likeliest token at each of its places and at the one after it.
    """
    same = 0
    while same < len(answer) and predicted[same] == answer[same]:
        same += 1
    return [*answer[:same], predicted[same]]
