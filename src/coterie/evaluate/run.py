"""Evaluate models on text, each next to a base: what did it cost.

    from coterie.evaluate.run import evaluate

    [card] = evaluate("small", against="original", text="text/test", tokens=65536)
    card.overall["perplexity"], card.overall["kl"], card.overall["accuracy"]

Every model runs with one of its units in memory at a time, in one pass over its weights for text and questions
together. What the base makes of the text is computed once and kept in files; then, model by model, both heads turn it
into logits part by part, so that neither the models' size nor the text's length decides how much memory is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from coterie.artifact import digest_of
from coterie.errors import InputError
from coterie.evaluate.answers import Attempt, attempt_batches, attempts, right_in_batch
from coterie.evaluate.divergence import token_divergence
from coterie.evaluate.generation import Question, end_ids, read_questions
from coterie.evaluate.likelihood import perplexity, token_nll
from coterie.evaluate.reading import Head, logits_at, predictions, read
from coterie.evaluate.scorecard import Scorecard, Scores, environment
from coterie.evaluate.speed import Cost, check_whole, measure_cost
from coterie.model.checkpoint import Checkpoint
from coterie.model.load import load_tokenizer, open_checkpoint
from coterie.model.memory import fitting_batch, forecast, peak_bytes
from coterie.model.stream import Stream
from coterie.model.units import format_bytes, parse_bytes
from coterie.profile.calibration import TokenSet, tokenize
from coterie.progress import track

log = logging.getLogger(__name__)


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
    speed_seconds: float | None = None,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
) -> list[Scorecard]:
    """Measure models on a text folder: quality by domain and bytes and, when asked for, speed and memory.

    Args:
        models: one model or several, as folders or hub ids; the base itself may be among them.
        against: the base to compare with; without it `kl`, `agreement` and the ratios are None.
        text: a text folder: a ``*.txt`` or ``*.jsonl`` file a domain, and ``<domain>.qa.jsonl`` files of questions.
        tokens: tokens in all, shared equally by the domains; the whole text when None.
        seq_len: tokens in a sequence.
        seed: seed of the draw of sequences and questions.
        device: where the models run.
        batch_size: sequences in a batch at most; the scores do not depend on it beyond rounding.
        questions: questions of each domain at most; all when None, none when 0.
        dtype: float32, bfloat16 or float16 to run in; see `coterie.model.stream.working_dtype` if None.
        speed_seconds: load each model (and the base) into memory as a whole, and time it for so long, three rounds in
            any case. When None, nothing is loaded as a whole, and speed and memory are not measured.
        max_memory: bytes, or an amount like "8GiB", that the run may take.
        allow_pickle: read weights that are stored as pickles.

    Returns:
        One scorecard for each of `models`, in their order.

    Raises:
        TextError: no text, empty or too short text, or a malformed question.
        InputError: no model, a base that reads the text otherwise or has another vocabulary, a device that is not
            there, a number format that no model runs in, or a model whose predictions are not numbers.
        Infeasible: `max_memory`, or what is free for a whole model, is too little.
    """
    chosen = [models] if isinstance(models, str | Path) else list(models)
    target = _check_arguments(
        chosen, device=device, dtype=dtype, batch_size=batch_size, tokens=tokens, questions=questions
    )
    limit = None if max_memory is None else parse_bytes(max_memory)
    asked = read_questions(text, limit=questions, seed=seed)
    reader = _Reader(text=text, seq_len=seq_len, tokens=tokens, seed=seed)
    subjects = [_open(model, reader, allow_pickle=allow_pickle) for model in chosen]
    base = None if against is None else _open(against, reader, allow_pickle=allow_pickle)
    if base is not None:
        for subject in subjects:
            _check_same_text(subject, base)
    streams = {
        subject.path: Stream(subject.checkpoint, dtype=dtype, device=target)
        for subject in (*subjects, *([] if base is None else [base]))
    }
    if base is not None:
        for subject in subjects:
            _check_same_vocabulary(subject, streams[subject.path], base, streams[base.path])
    max((forecast(stream) for stream in streams.values()), key=lambda found: found.num_bytes).check(limit)
    if speed_seconds is not None:
        for subject in subjects:
            check_whole([streams[each.path] for each in (subject, base) if each is not None], limit=limit)
    # One size for all, so that models are compared on equal batches.
    size = min(fitting_batch(batch_size, seq_len=seq_len, hidden_size=_width(stream)) for stream in streams.values())
    job = _Job(streams=streams, base=base, asked=asked, batch_size=size)
    measured = job.measure(subjects)
    log.info("memory: the peak was %s", format_bytes(peak_bytes()))
    costs: Sequence[Cost | None] = [None] * len(subjects)
    if speed_seconds is not None:
        costs = measure_cost(
            [(subject.path, _mixed_batch(subject.tokens, size)) for subject in subjects],
            base=None if base is None else base.path,
            dtype=dtype,
            device=target,
            seconds=speed_seconds,
        )
    return [
        job.scorecard(subject, sums, cost, seed=seed)
        for subject, sums, cost in zip(subjects, measured, costs, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """A model before its weights are read."""

    name: str
    path: Path
    num_bytes: int
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """What a model made of the text and, where it was asked, of the questions.

    Attributes:
        texts: what its base model returned for each batch of text.
        attempts: batches of questions with answers, and their token ids (B, S).
        answers: what its base model returned for each of these.
    """

    texts: list[Any]
    attempts: list[tuple[list[Attempt], Tensor]]
    answers: list[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One evaluation of several models."""

    streams: Mapping[Path, Stream]
    base: _Subject | None
    asked: Mapping[str, Sequence[Question]]
    batch_size: int

    def measure(self, subjects: Sequence[_Subject]) -> list[dict[str, _Sums]]:
        """Return each model's sums by domain."""
        base, outcome = self.base, None
        with ExitStack() as stack:
            if base is not None:
                stack.enter_context(self.streams[base.path])
                # Where the base is to be scored too, it is read once for both.
                outcome = self._read(base, asking=any(subject.path == base.path for subject in subjects))
            return [self._measure_one(subject, outcome) for subject in subjects]

    def _measure_one(self, subject: _Subject, base_outcome: _Outcome | None) -> dict[str, _Sums]:
        stream = self.streams[subject.path]
        if base_outcome is not None and self.base is not None and subject.path == self.base.path:
            with stream.head() as head:
                return self._sums(subject, base_outcome, head, base_outcome, head)
        with ExitStack() as stack:
            stack.enter_context(stream)
            outcome = self._read(subject, asking=True)
            head = stack.enter_context(stream.head())
            base_head = None
            if self.base is not None:
                base_head = stack.enter_context(self.streams[self.base.path].head())
            return self._sums(subject, outcome, head, base_outcome, base_head)

    def _read(self, subject: _Subject, *, asking: bool) -> _Outcome:
        texts = [ids_BS for _, ids_BS in subject.tokens.batches(self.batch_size)]
        tried = attempts(subject.tokenizer, self._questions()) if asking else []
        asked = attempt_batches(tried, tokens=self.batch_size * subject.tokens.seq_len)
        batches = [*texts, *(ids_BS for _, ids_BS in asked)]
        outputs = read(self.streams[subject.path], batches, description=f"{subject.name}: layers")
        return _Outcome(texts=outputs[: len(texts)], attempts=asked, answers=outputs[len(texts) :])

    def _sums(
        self,
        subject: _Subject,
        outcome: _Outcome,
        head: Head,
        base_outcome: _Outcome | None,
        base_head: Head | None,
    ) -> dict[str, _Sums]:
        sums = {domain: _Sums() for domain in subject.tokens.domains}
        batches = list(subject.tokens.batches(self.batch_size))
        base_texts = [None] * len(batches) if base_outcome is None else base_outcome.texts
        rows = zip(batches, outcome.texts, base_texts, strict=True)
        for (domain, ids_BS), output, base_output in track(rows, f"{subject.name}: text", total=len(batches)):
            name = subject.tokens.domains[domain]
            self._add_text(sums[name], name, subject, (ids_BS, output, base_output), head, base_head)
            for stream in self.streams.values():
                stream.release()
        self._add_answers(sums, subject, outcome, head)
        return sums

    def _add_text(
        self,
        held: _Sums,
        domain: str,
        subject: _Subject,
        batch: tuple[Tensor, Any, Any],
        head: Head,
        base_head: Head | None,
    ) -> None:
        """Add one batch of text: its tokens, and what the model and the base made of it."""
        ids_BS, output, base_output = batch
        stream = self.streams[subject.path]
        for positions, ids_BP in predictions(ids_BS, _num_logits(stream)):
            logits_BPV = logits_at(head, ids_BS, output, positions)
            if logits_BPV.shape[-1] != _num_logits(stream):
                raise InputError(
                    f"{subject.name} gives {logits_BPV.shape[-1]} scores a token where its vocabulary has "
                    f"{_num_logits(stream)}: it does not predict the next token, so it cannot be evaluated on text"
                )
            nll_T = token_nll(logits_BPV, ids_BP).cpu().double()
            _check_numbers(nll_T, subject, stream, domain)
            held.nll += float(nll_T.sum())
            held.tokens += len(nll_T)
            if self.base is not None and base_head is not None:
                base_BPV = logits_BPV
                if base_head is not head:
                    base_BPV = logits_at(base_head, ids_BS, base_output, positions)
                kl_T, agreeing_T = token_divergence(base_BPV, logits_BPV)
                kl_T = kl_T.cpu().double()
                _check_numbers(kl_T, self.base, self.streams[self.base.path], domain)
                held.kl += float(kl_T.sum())
                held.agreeing += int(agreeing_T.sum())

    def _add_answers(self, sums: dict[str, _Sums], subject: _Subject, outcome: _Outcome, head: Head) -> None:
        """Add the questions of all domains, which were read together."""
        stream = self.streams[subject.path]
        questions = self._questions()
        ends = end_ids(_generation_config(subject, stream), subject.tokenizer)
        right: set[int] = set()
        for (batch, ids_BS), output in zip(outcome.attempts, outcome.answers, strict=True):
            right |= right_in_batch(
                head, batch, ids_BS, output, questions,
                tokenizer=subject.tokenizer, ends=ends, vocab_size=_num_logits(stream),
            )  # fmt: skip
            stream.release()
        first = 0
        for domain, entries in self.asked.items():
            held = sums.setdefault(domain, _Sums())
            held.questions = len(entries)
            held.correct = len(right & set(range(first, first + len(entries))))
            first += len(entries)

    def _questions(self) -> list[Question]:
        return [question for entries in self.asked.values() for question in entries]

    def scorecard(self, subject: _Subject, sums: Mapping[str, _Sums], cost: Cost | None, *, seed: int) -> Scorecard:
        """Put together what is known of a model."""
        base, stream = self.base, self.streams[subject.path]
        total = _Sums()
        for held in sums.values():
            total.add(held)
        return Scorecard(
            model=subject.name,
            model_digest=subject.checkpoint.digest,
            base=None if base is None else base.name,
            base_digest=None if base is None else base.checkpoint.digest,
            text_digest=_text_digest(subject.tokens, self.asked),
            seq_len=subject.tokens.seq_len,
            seed=seed,
            domains={domain: held.scores(compared=base is not None) for domain, held in sorted(sums.items())},
            overall=total.scores(compared=base is not None),
            num_bytes=subject.num_bytes,
            bytes_ratio=None if base is None else subject.num_bytes / base.num_bytes,
            memory_bytes=None if cost is None else cost.memory_bytes,
            peak_memory_bytes=None if cost is None else cost.peak_memory_bytes,
            tokens_per_second=None if cost is None else cost.tokens_per_second,
            speed_ratio=None if cost is None else cost.speed_ratio,
            environment=environment(stream.device, stream.dtype),
        )


def _open(model: str | Path, reader: _Reader, *, allow_pickle: bool) -> _Subject:
    """Read a model's headers and tokenizer, and cut the text with it."""
    stored = Checkpoint.open(model, allow_pickle=allow_pickle)
    checkpoint = open_checkpoint(stored.path, allow_pickle=allow_pickle)
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
    return _Subject(
        name=name, path=stored.path.resolve(), num_bytes=stored.num_bytes, checkpoint=checkpoint,
        tokenizer=tokenizer, tokens=tokens, vocab_size=vocab_size,
    )  # fmt: skip


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
    if target.type == "cuda" and target.index is None:
        return torch.device("cuda", torch.cuda.current_device())
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


def _check_same_vocabulary(subject: _Subject, stream: Stream, base: _Subject, base_stream: Stream) -> None:
    """Raise InputError unless both models give logits of the same tokens, as their families' defaults have it too."""
    if _num_logits(stream) != _num_logits(base_stream):
        raise _other_vocabulary(subject, _num_logits(stream), base, _num_logits(base_stream))


def _other_vocabulary(subject: _Subject, size: int | None, base: _Subject, base_size: int | None) -> InputError:
    return InputError(
        f"{subject.name} has a vocabulary of {size}, {base.name} of {base_size}; their predictions cannot be compared: "
        "choose the model that it was made from, or leave the base out"
    )


def _check_numbers(values_T: Tensor, subject: _Subject, stream: Stream, domain: str) -> None:
    """Raise InputError when a model's predictions are not numbers; infinite values are."""
    count = int(values_T.isnan().sum())
    if count:
        raise InputError(
            f"{subject.name} predicts {count} of {len(values_T)} tokens of a batch in {domain} with values that are "
            f"not numbers, computing in {str(stream.dtype).removeprefix('torch.')}; its weights are damaged, or it "
            "needs a number format with more range, such as bfloat16 or float32"
        )


def _text_digest(tokens: TokenSet, asked: Mapping[str, Sequence[Question]]) -> str:
    """Digest everything that scores depend on: the sequences and the questions."""
    questions = {domain: [[entry.question, entry.answer] for entry in entries] for domain, entries in asked.items()}
    return digest_of({"tokens": tokens.digest, "questions": questions})


def _generation_config(subject: _Subject, stream: Stream) -> GenerationConfig | None:
    """Return the generation config that came with a model, or the one that its own config amounts to."""
    try:
        return GenerationConfig.from_pretrained(subject.path, local_files_only=True)
    except (OSError, ValueError):
        return stream.model.generation_config


def _num_logits(stream: Stream) -> int:
    return int(stream.model.config.get_text_config().vocab_size)


def _width(stream: Stream) -> int:
    embedding: Any = stream.model.get_input_embeddings()
    return int(embedding.weight.shape[-1])


def _mixed_batch(tokens: TokenSet, size: int) -> Tensor:
    """Return up to `size` sequences (B, S) taken in turns from all domains."""
    longest = max(len(ids) for ids in tokens.sequences.values())
    turns = [ids[row] for row in range(longest) for ids in tokens.sequences.values() if row < len(ids)]
    return torch.stack(turns[:size])
