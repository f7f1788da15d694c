"""Subjects: models before their weights are read, the text as they read it, and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from coterie.artifact import digest_of
from coterie.errors import InputError
from coterie.evaluate.answers import Attempt, attempts
from coterie.evaluate.generation import Question
from coterie.model.device import check_device
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.files import name_of_model
from coterie.model.disk.open import open_checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.model.stream.reading import num_logits
from coterie.model.stream.stream import Stream
from coterie.profile.calibration import TokenSet, tokenize
from coterie.profile.data_sets import is_data_set_name
from coterie.profile.documents import log_unread


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model before its weights are read.

    Attributes:
        name: its folder's name, or its hub id.
        path: its folder.
        num_bytes: bytes of its tensors as they are stored.
        checkpoint: the same as plain numbers.
        tokenizer: its tokenizer.
        tokens: the text as it reads it.
        vocab_size: rows of its embedding; None when the config leaves it to the family's default.
    """

    name: str
    path: Path
    num_bytes: int
    checkpoint: Checkpoint
    tokenizer: Any
    tokens: TokenSet
    vocab_size: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutputs:
    """What a model made of the text and, where it was asked, of the questions.

    Attributes:
        texts: what its base model returned for each batch of text.
        attempts: batches of questions with answers, and their token ids (B, S).
        answers: what its base model returned for each of these.
        with_answers: whether it read questions at all.
    """

    texts: list[Any]
    attempts: list[tuple[list[Attempt], Tensor]]
    answers: list[Any]
    with_answers: bool


class TextReader:
    """Cuts one text and its questions for many tokenizers; equal tokenizers share the result."""

    def __init__(self, text: str | Path, by_domain: Mapping[str, Sequence[Question]], **settings: Any) -> None:
        """Take the text folder, the questions by domain, and the settings of `tokenize`."""
        self.questions_by_domain = by_domain
        self._text = text
        self._settings = settings
        if not is_data_set_name(text):
            log_unread(text)
        self._tokens: dict[object, TokenSet] = {}
        self._attempts: dict[object, list[Attempt]] = {}

    def tokens(self, tokenizer: Any) -> TokenSet:
        """Return the text's tokens."""
        key = _identity(tokenizer)
        if key not in self._tokens:
            self._tokens[key] = tokenize(tokenizer, self._text, **self._settings)
        return self._tokens[key]

    def attempts(self, tokenizer: Any) -> list[Attempt]:
        """Return the questions' tokens, each with its answer."""
        key = _identity(tokenizer)
        if key not in self._attempts:
            self._attempts[key] = attempts(tokenizer, self.questions())
        return self._attempts[key]

    def questions(self) -> list[Question]:
        """Return the questions of all domains."""
        return [question for entries in self.questions_by_domain.values() for question in entries]


def _identity(tokenizer: Any) -> object:
    """Return what makes a tokenizer equal to another one; for those that are not known so well, itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return tokenizer if backend is None else (backend.to_str(), *special, repr(tokenizer.chat_template))


def open_subject(model: str | Path, reader: TextReader, *, allow_pickle: bool) -> Subject:
    """Read a model's headers and tokenizer, and cut the text with it.

    Raises:
        InputError: the tokenizer belongs to another model.
    """
    stored = Checkpoint.open(model, allow_pickle=allow_pickle)
    checkpoint = open_checkpoint(stored.path, allow_pickle=allow_pickle)
    tokenizer = load_tokenizer(checkpoint.path)
    tokens = reader.tokens(tokenizer)
    name = name_of_model(model)
    text_config = checkpoint.config.get("text_config") or checkpoint.config
    vocab_size = text_config.get("vocab_size", checkpoint.config.get("vocab_size"))
    largest = max(int(ids.max()) for ids in tokens.sequences.values())
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(
            f"{name}: its tokenizer gives token id {largest}, but the model has a vocabulary of {vocab_size}; "
            "the tokenizer belongs to another model"
        )
    return Subject(
        name=name, path=stored.path.resolve(), num_bytes=stored.num_bytes, checkpoint=checkpoint,
        tokenizer=tokenizer, tokens=tokens, vocab_size=vocab_size,
    )  # fmt: skip


def check_same_text(subject: Subject, base: Subject) -> None:
    """Raise InputError unless both read the text as the same tokens and have a vocabulary of the same size."""
    if None not in (subject.vocab_size, base.vocab_size) and subject.vocab_size != base.vocab_size:
        raise _other_vocabulary(subject, subject.vocab_size, base, base.vocab_size)
    if subject.tokens.digest != base.tokens.digest:
        counts = [sum(each.tokens.num_tokens.values()) for each in (subject, base)]
        raise InputError(
            f"{subject.name} and {base.name} read this text as other tokens: their tokenizers know "
            f"{len(subject.tokenizer)} and {len(base.tokenizer)} tokens, and cut it into {counts[0]} and {counts[1]}; "
            "compare it with the model that it was made from, or leave the base out"
        )


def check_same_vocabulary(subject: Subject, stream: Stream, base: Subject, base_stream: Stream) -> None:
    """Raise InputError unless both models give logits of the same tokens, as their families' defaults have it too."""
    if num_logits(stream) != num_logits(base_stream):
        raise _other_vocabulary(subject, num_logits(stream), base, num_logits(base_stream))


def _other_vocabulary(subject: Subject, size: int | None, base: Subject, base_size: int | None) -> InputError:
    return InputError(
        f"{subject.name} has a vocabulary of {size}, {base.name} of {base_size}; their predictions cannot be compared: "
        "choose the model that it was made from, or leave the base out"
    )


def check_numbers(values_T: Tensor, subject: Subject, stream: Stream, domain: str) -> None:
    """Raise InputError when a model's predictions are not numbers; infinite values are."""
    count = int(values_T.isnan().sum())
    if count:
        raise InputError(
            f"{subject.name} predicts {count} of {len(values_T)} tokens of a batch in {domain} with values that are "
            f"not numbers, computing in {str(stream.dtype).removeprefix('torch.')}; its weights are damaged, or it "
            "needs a number format with more range, such as bfloat16 or float32"
        )


def text_digest(tokens: TokenSet, by_domain: Mapping[str, Sequence[Question]]) -> str:
    """Digest everything that scores depend on: the sequences and the questions."""
    questions = {domain: [[entry.question, entry.answer] for entry in entries] for domain, entries in by_domain.items()}
    return digest_of({"tokens": tokens.digest, "questions": questions})


def generation_config(subject: Subject, stream: Stream) -> GenerationConfig | None:
    """Return the generation config that came with a model, or the one that its own config amounts to."""
    try:
        return GenerationConfig.from_pretrained(subject.path, local_files_only=True)
    except (OSError, ValueError):
        return stream.model.generation_config


def hidden_size(stream: Stream) -> int:
    """Return the width of a model's embedding."""
    embedding: Any = stream.model.get_input_embeddings()
    return int(embedding.weight.shape[-1])


def mixed_batch(tokens: TokenSet, size: int) -> Tensor:
    """Return up to `size` sequences (B, S) taken in turns from all domains."""
    longest = max(len(ids) for ids in tokens.sequences.values())
    turns = [ids[row] for row in range(longest) for ids in tokens.sequences.values() if row < len(ids)]
    return torch.stack(turns[:size])


def check_arguments(
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    batch_size: int,
    tokens: int | None,
    questions: int | None,
) -> torch.device:
    """Return the device that models run on; raise InputError for numbers, or a number format, that cannot be."""
    for name, value, least in (("batch size", batch_size, 1), ("tokens", tokens, 1), ("questions", questions, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"models do not run in {str(dtype).removeprefix('torch.')}; use float32, bfloat16 or float16")
    return check_device(device)
