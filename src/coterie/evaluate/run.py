"""Evaluate models on text, each next to a base: what did it cost.

    from coterie.evaluate.run import evaluate

    [card] = evaluate("small", against="original", text="text/test", tokens=65536)
    card.overall["perplexity"], card.overall["kl"], card.speed_ratio

The base stays in memory; the models come in one after another. Every batch goes through the model and the base in turn,
so only one batch's logits of each exist at a time, whatever the text's length. With more than one model, the base's
logits of the whole text are kept where they fit into `CACHE_BYTES`; otherwise it computes them anew for each model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.artifact import digest_of
from coterie.errors import InputError
from coterie.evaluate.divergence import token_divergence
from coterie.evaluate.generation import Question, count_correct, read_questions
from coterie.evaluate.likelihood import fitting_batch_size, logits_of, perplexity, token_nll
from coterie.evaluate.scorecard import Scorecard, Scores, environment
from coterie.evaluate.speed import measure_speed, memory_bytes, memory_in_use, own_memory, peak_memory
from coterie.model.checkpoint import Checkpoint
from coterie.model.load import load_model, load_tokenizer
from coterie.profile.calibration import TokenSet, tokenize
from coterie.progress import track

#: Bytes of the base's logits that are kept from one model to the next.
CACHE_BYTES = 2**30


def evaluate(
    models: Sequence[str | Path] | str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path,
    tokens: int | None = None,
    seq_len: int = 512,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    questions: int | None = None,
    dtype: torch.dtype | None = None,
    speed_seconds: float = 20.0,
) -> list[Scorecard]:
    """Measure models on a text folder: quality by domain, bytes, memory and speed.

    Args:
        models: one model or several, as folders or hub ids; the base itself may be among them.
        against: the base to compare with; without it `kl`, `agreement` and the ratios are None.
        text: a text folder: a ``*.txt`` or ``*.jsonl`` file a domain, and ``<domain>.qa.jsonl`` files of questions.
        tokens: tokens in all, shared equally by the domains; the whole text when None.
        seq_len: tokens in a sequence.
        seed: seed of the draw of sequences and questions.
        device: where the models run.
        batch_size: sequences in a batch; less is used where a batch's logits would exceed 1 GiB in float32.
        questions: questions of each domain at most; all when None, none when 0.
        dtype: float32, bfloat16 or float16 to run in; float32 on the CPU and each checkpoint's own elsewhere if None.
        speed_seconds: time to spend on each model's speed; three rounds are measured in any case.

    Returns:
        One scorecard for each of `models`, in their order.

    Raises:
        TextError: no text, empty or too short text, or a malformed question.
        InputError: no model, a base that reads the text otherwise or has another vocabulary, a device that is not
            there, a number format that no model runs in, or a model whose predictions are not numbers.
    """
    chosen = [models] if isinstance(models, str | Path) else list(models)
    target = _check_arguments(
        chosen, device=device, dtype=dtype, batch_size=batch_size, tokens=tokens, questions=questions
    )
    asked = read_questions(text, limit=questions, seed=seed)
    reader = _Reader(text=text, seq_len=seq_len, tokens=tokens, seed=seed)
    subjects = [_open(model, reader) for model in chosen]
    original = None if against is None else _open(against, reader)
    if original is not None:
        for subject in subjects:
            _check_same_text(subject, original)
    base = None
    if original is not None:
        loaded = load_model(original.checkpoint.path, dtype=dtype, device=target)
        own_memory(loaded)
        base = _Base(original, loaded, batch_size=batch_size, repeated=len(subjects) > 1)
    return [
        _evaluate_one(
            subject,
            base,
            asked,
            device=target,
            dtype=dtype,
            batch_size=batch_size,
            seed=seed,
            speed_seconds=speed_seconds,
        )
        for subject in subjects
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """A model before its weights are read."""

    name: str
    checkpoint: Checkpoint
    tokenizer: Any
    tokens: TokenSet
    vocab_size: int | None  # rows of the embedding; None when the config leaves it to the family's default


class _Reader:
    """Cuts one text for many tokenizers; equal tokenizers share the result."""

    def __init__(self, **settings: Any) -> None:
        self._text = settings.pop("text")
        self._settings = settings
        self._read: dict[tuple[str, int | None], TokenSet] = {}

    def read(self, tokenizer: Any) -> TokenSet:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return tokenize(tokenizer, self._text, **self._settings)
        key = (backend.to_str(), tokenizer.eos_token_id)
        if key not in self._read:
            self._read[key] = tokenize(tokenizer, self._text, **self._settings)
        return self._read[key]


class _Base:
    """The base model and its logits, computed when asked for and kept where that pays and they fit."""

    def __init__(self, subject: _Subject, model: PreTrainedModel, *, batch_size: int, repeated: bool) -> None:
        self.subject = subject
        self.model = model
        self.batch_size = _batch_size(model, subject.tokens, batch_size)
        elements = sum(subject.tokens.num_tokens.values()) * _num_logits(model)
        self._keeps = repeated and elements * 4 <= CACHE_BYTES  # logits are float32 at the widest
        self._kept: dict[int, Tensor] = {}

    def logits(self, batch: int, ids_BS: Tensor) -> Tensor:
        """Return the logits (B, S, V) of the text's batch of that number."""
        if batch in self._kept:
            return self._kept[batch]
        logits_BSV = logits_of(self.model, ids_BS)
        if self._keeps:
            self._kept[batch] = logits_BSV
        return logits_BSV


@dataclass(slots=True)
class _Sums:
    """Sums over the predicted tokens and the questions of one domain."""

    nll: float = 0.0
    kl: float = 0.0
    agreeing: int = 0
    tokens: int = 0
    correct: int = 0
    questions: int = 0

    def add(self, other: _Sums) -> None:
        for name in _Sums.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def scores(self, *, compared: bool) -> Scores:
        compared = compared and self.tokens > 0
        return Scores(
            perplexity=perplexity(self.nll, self.tokens) if self.tokens else None,
            kl=self.kl / self.tokens if compared else None,
            agreement=self.agreeing / self.tokens if compared else None,
            accuracy=self.correct / self.questions if self.questions else None,
            tokens=self.tokens,
            questions=self.questions,
        )


def _evaluate_one(
    subject: _Subject,
    base: _Base | None,
    asked: Mapping[str, Sequence[Question]],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    batch_size: int,
    seed: int,
    speed_seconds: float,
) -> Scorecard:
    """Load one model, measure everything, let go of it."""
    before = memory_in_use(device)
    model = load_model(subject.checkpoint.path, dtype=dtype, device=device)
    if base is not None and _num_logits(model) != _num_logits(base.model):
        raise _other_vocabulary(subject, _num_logits(model), base.subject, _num_logits(base.model))
    own_memory(model)
    ids_BS = _mixed_batch(subject.tokens, _batch_size(model, subject.tokens, batch_size))
    with peak_memory(device, above=before) as peak:
        logits_of(model, ids_BS)
    speed = measure_speed(model, ids_BS, base=None if base is None else base.model, seconds=speed_seconds)
    sums = _measure_text(subject, model, base, batch_size=batch_size)
    for domain, questions in asked.items():
        held = sums.setdefault(domain, _Sums())
        held.questions = len(questions)
        held.correct = count_correct(
            model,
            subject.tokenizer,
            questions,
            batch_size=batch_size,
            description=f"{subject.name}: {domain} questions",
        )
    total = _Sums()
    for held in sums.values():
        total.add(held)
    num_bytes = subject.checkpoint.num_bytes
    return Scorecard(
        model=subject.name,
        model_digest=subject.checkpoint.digest,
        base=None if base is None else base.subject.name,
        base_digest=None if base is None else base.subject.checkpoint.digest,
        text_digest=_text_digest(subject.tokens, asked),
        seq_len=subject.tokens.seq_len,
        seed=seed,
        domains={domain: held.scores(compared=base is not None) for domain, held in sorted(sums.items())},
        overall=total.scores(compared=base is not None),
        num_bytes=num_bytes,
        bytes_ratio=None if base is None else num_bytes / base.subject.checkpoint.num_bytes,
        memory_bytes=memory_bytes(model),
        peak_memory_bytes=peak.num_bytes,
        tokens_per_second=speed.tokens_per_second,
        speed_ratio=speed.ratio,
        environment=environment(model.device, model.dtype),
    )


def _measure_text(
    subject: _Subject, model: PreTrainedModel, base: _Base | None, *, batch_size: int
) -> dict[str, _Sums]:
    """Run the text through the model (and the base) once; return the sums by domain."""
    tokens = subject.tokens
    sums = {domain: _Sums() for domain in tokens.domains}
    # Kept logits are found again by the number of their batch, so with a base all models are cut as it is.
    size = base.batch_size if base is not None else _batch_size(model, tokens, batch_size)
    batches = list(tokens.batches(size))
    for number, (domain_index, ids_BS) in enumerate(track(batches, f"{subject.name}: text")):
        domain = tokens.domains[domain_index]
        held = sums[domain]
        logits_BSV = logits_of(model, ids_BS)
        nll_T = token_nll(logits_BSV, ids_BS).cpu().double()
        _check_numbers(nll_T, subject, model, domain)
        held.nll += float(nll_T.sum())
        held.tokens += len(nll_T)
        if base is not None:
            kl_T, agreeing_T = token_divergence(base.logits(number, ids_BS), logits_BSV)
            kl_T = kl_T.cpu().double()
            _check_numbers(kl_T, base.subject, base.model, domain)
            held.kl += float(kl_T.sum())
            held.agreeing += int(agreeing_T.sum())
    return sums


def _open(model: str | Path, reader: _Reader) -> _Subject:
    """Read a model's headers and tokenizer, and cut the text with it."""
    checkpoint = Checkpoint.open(model)
    tokenizer = load_tokenizer(checkpoint.path)
    tokens = reader.read(tokenizer)
    local = Path(model).expanduser()
    name = local.resolve().name if local.is_dir() else str(model)
    text_config = checkpoint.config.get("text_config") or checkpoint.config
    vocab_size = text_config.get("vocab_size", checkpoint.config.get("vocab_size"))
    largest = max(int(ids.max()) for ids in tokens.sequences.values())
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(
            f"{name}: its tokenizer gives token id {largest}, but the model has a vocabulary of {vocab_size}; "
            "the tokenizer belongs to another model"
        )
    return _Subject(name=name, checkpoint=checkpoint, tokenizer=tokenizer, tokens=tokens, vocab_size=vocab_size)


def _check_arguments(
    models: Sequence[str | Path],
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    batch_size: int,
    tokens: int | None,
    questions: int | None,
) -> torch.device:
    if not models:
        raise InputError("there is no model to evaluate; pass one or more")
    for name, value, least in (("batch size", batch_size, 1), ("tokens", tokens, 1), ("questions", questions, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"models do not run in {str(dtype).removeprefix('torch.')}; use float32, bfloat16 or float16")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{device!r} is no device ({str(error).splitlines()[0]}); use cpu, cuda or cuda:1") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {target} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return target


def _check_same_text(subject: _Subject, base: _Subject) -> None:
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


def _other_vocabulary(subject: _Subject, size: int | None, base: _Subject, base_size: int | None) -> InputError:
    return InputError(
        f"{subject.name} has a vocabulary of {size}, {base.name} of {base_size}; their predictions cannot be compared: "
        "choose the model that it was made from, or leave the base out"
    )


def _check_numbers(values_T: Tensor, subject: _Subject, model: PreTrainedModel, domain: str) -> None:
    """Raise InputError when a model's predictions are not numbers; infinite values are."""
    count = int(values_T.isnan().sum())
    if count:
        raise InputError(
            f"{subject.name} predicts {count} of {len(values_T)} tokens in {domain} with values that are not numbers, "
            f"computing in {str(model.dtype).removeprefix('torch.')}; its weights are damaged, or it needs a number "
            "format with more range, such as bfloat16 or float32"
        )


def _text_digest(tokens: TokenSet, asked: Mapping[str, Sequence[Question]]) -> str:
    """Digest everything that scores depend on: the sequences and the questions."""
    questions = {domain: [[entry.question, entry.answer] for entry in entries] for domain, entries in asked.items()}
    return digest_of({"tokens": tokens.digest, "questions": questions})


def _num_logits(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _batch_size(model: PreTrainedModel, tokens: TokenSet, wanted: int) -> int:
    return fitting_batch_size(wanted, tokens.seq_len, _num_logits(model))


def _mixed_batch(tokens: TokenSet, size: int) -> Tensor:
    """Return up to `size` sequences (B, S) taken in turns from all domains."""
    longest = max(len(ids) for ids in tokens.sequences.values())
    turns = [ids[row] for row in range(longest) for ids in tokens.sequences.values() if row < len(ids)]
    return torch.stack(turns[:size])
