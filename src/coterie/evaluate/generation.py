"""Generation: questions with exact answers, answered greedily by a model that is in memory as a whole.

A file ``<domain>.qa.jsonl`` in the text folder has one JSON object a line, ``{"question": ..., "answer": ...}``. The
question is the prompt as it stands; the model's answer is what it writes up to the end of the line.
`coterie.evaluate.answers` finds the same out without writing, for models of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from coterie.errors import TextError
from coterie.paths import user_path
from coterie.profile.data_sets import is_data_set_name
from coterie.profile.documents import QUESTIONS, json_rows, no_folder
from coterie.profile.rows import check_characters
from coterie.progress import track

_EXPECTED = 'expected a JSON object with texts "question" and "answer"'

#: New tokens that are allowed beyond the longest expected answer; an answer is often split otherwise in its context.
MARGIN = 4

#: Plain greedy search, whatever the generation config that came with the model asks for.
GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and the text that must follow it; white space around the answer does not count."""

    question: str
    answer: str


def read_questions(folder: str | Path, *, limit: int | None = None, seed: int = 0) -> dict[str, list[Question]]:
    """Read the questions of a text folder by domain name, sorted.

    Args:
        folder: the text folder.
        limit: so many questions of each domain, drawn by `seed`, so a larger limit contains a smaller one; all when
            None.
        seed: seed of the draw.

    Returns:
        Questions by domain; empty when the folder has no ``*.qa.jsonl`` file or `limit` is 0.

    Raises:
        TextError: no such folder, a file without questions, or a line that is no question with a one-line answer.
    """
    if is_data_set_name(folder):
        return {}
    path = user_path(folder)
    if not path.is_dir():
        raise no_folder(path)
    if limit == 0:
        return {}
    by_domain: dict[str, list[Question]] = {}
    for file in sorted(path.glob("*.qa.jsonl*")):
        ending = next((end for end in QUESTIONS if file.name.endswith(end)), None)
        if ending is None or file.name.startswith("."):
            continue
        domain = file.name.removesuffix(ending)
        if domain in by_domain:
            raise TextError(f"{path} has two files of questions for the domain {domain!r}; leave one out")
        questions = _read_file(file)
        if limit is not None:
            order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
            questions = [questions[index] for index in order[:limit].tolist()]
        by_domain[domain] = questions
    return by_domain


def count_correct(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, batch_size: int = 8, description: str = "questions"
) -> int:
    """Return how many questions the model answers exactly.

    The answer is the first line that the model writes, stripped; it must equal the expected one, stripped.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        questions: what is asked.
        batch_size: prompts in a batch.
        description: title of the progress bar.
    """
    if not questions:
        return 0
    answers = tokenizer([f"{question.answer}\n" for question in questions], add_special_tokens=False)["input_ids"]
    lines = first_lines(
        model,
        tokenizer,
        [question.question for question in questions],
        max_new_tokens=max(len(ids) for ids in answers) + MARGIN,
        batch_size=batch_size,
        description=description,
    )
    return sum(line == question.answer.strip() for line, question in zip(lines, questions, strict=True))


def first_lines(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    description: str = "generate",
) -> list[str]:
    """Continue prompts greedily up to the end of the line, with the model's own ``generate``.

    Prompts of one length share a batch, so nothing is padded and the batch size does not change what a model reads.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: what to continue.
        max_new_tokens: tokens to write at most.
        batch_size: prompts in a batch.
        description: title of the progress bar.

    Returns:
        What was written after each prompt up to the first newline or end-of-text token, stripped.
    """
    ends = end_ids(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    lines = [""] * len(prompts)
    for rows in track(batches_of_one_length(encoded, lambda length: batch_size), description):
        ids_BS = torch.tensor([encoded[row] for row in rows], dtype=torch.int64, device=model.device)
        length = ids_BS.shape[1]
        with torch.no_grad():
            written_BS = model.generate(
                input_ids=ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([_EndOfLine(tokenizer, length)]),
                **GREEDY,
            )
        for row, ids in zip(rows, written_BS[:, length:].tolist(), strict=True):
            lines[row] = line_so_far(tokenizer, ids, ends)
    return lines


class _EndOfLine(StoppingCriteria):
    """Stops each sequence once a newline was written after its prompt of `length` tokens."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer = tokenizer
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        written = self._tokenizer.batch_decode(input_ids[:, self._length :])
        return torch.tensor(["\n" in text for text in written], device=input_ids.device)


def _read_file(file: Path) -> list[Question]:
    questions = []
    for place, entry in json_rows(file, expected=_EXPECTED):
        said = entry if isinstance(entry, dict) else {}
        question, answer = said.get("question"), said.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise TextError(f"{place}: {_EXPECTED}")
        for text in (question, answer):
            check_characters(text, place)
        if not question or not answer.strip() or "\n" in answer.strip():
            raise TextError(f"{place}: a question needs text, and an answer of exactly one line")
        questions.append(Question(question=question, answer=answer))
    if not questions:
        raise TextError(f"{file} is empty; write one question a line or remove the file")
    return questions


def batches_of_one_length(encoded: Sequence[Sequence[int]], batch_size: Callable[[int], int]) -> list[list[int]]:
    """Return the row numbers of each batch: rows of one length only, short ones first.

    Args:
        encoded: tokens of each row.
        batch_size: rows in a batch at most, from their length.
    """
    by_length: dict[int, list[int]] = {}
    for row, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(row)
    return [
        rows[start : start + batch_size(length)]
        for length, rows in sorted(by_length.items())
        for start in range(0, len(rows), batch_size(length))
    ]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Encode a prompt as the model expects it to begin (with its start token, if any), but open at its end."""
    ids = list(tokenizer(prompt)["input_ids"])
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    while len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def end_ids(config: GenerationConfig | None, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text, by a model's generation config and its tokenizer."""
    configured = None if config is None else config.eos_token_id
    ends = set(configured) if isinstance(configured, list | tuple) else {configured}
    return {int(end) for end in ends | {tokenizer.eos_token_id} if end is not None}


def finished_line(tokenizer: Any, ids: Sequence[int], ends: Set[int]) -> str | None:
    """Return what was written up to the first newline or end-of-text token, stripped; None when neither came."""
    if ends.isdisjoint(ids) and "\n" not in _text(tokenizer, ids, ends):
        return None
    return line_so_far(tokenizer, ids, ends)


def line_so_far(tokenizer: Any, ids: Sequence[int], ends: Set[int]) -> str:
    """Return what was written up to the first newline or end-of-text token, if any, stripped."""
    return _text(tokenizer, ids, ends).split("\n", 1)[0].strip()


def _text(tokenizer: Any, ids: Sequence[int], ends: Set[int]) -> str:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    text: str = tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
