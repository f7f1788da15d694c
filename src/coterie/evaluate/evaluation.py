"""Measure models on one text against one base, one unit in memory at a time.

    with Evaluation(against="original", text="text/test", tokens=65536, cache="run/cache") as evaluation:
        cards = [evaluation.score(model) for model in results]

Every model runs with one of its units in memory at a time, in one pass over its weights for text and questions
together. What the base makes of the text is computed once and kept in files; then, model by model, both heads turn it
into logits part by part, so that neither the models' size nor the text's length decides how much memory is needed.
With a cache, what the base predicts is kept there for later calls too, see `coterie.evaluate.kept_predictions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from coterie.amounts import check_seed
from coterie.errors import InputError
from coterie.evaluate.answers import Attempt, attempt_batches, first_attempts, right_in_batch, second_attempts
from coterie.evaluate.divergence import compare, token_divergence
from coterie.evaluate.generation import end_ids, read_questions
from coterie.evaluate.kept_predictions import (
    KEPT_BYTES,
    KeptPredictions,
    PredictionShape,
    keep_predictions,
    open_predictions,
)
from coterie.evaluate.scorecard import Scorecard, environment
from coterie.evaluate.speed import RunningCost
from coterie.evaluate.subjects import (
    ModelOutputs,
    Subject,
    TextReader,
    check_arguments,
    check_numbers,
    check_same_text,
    check_same_vocabulary,
    generation_config,
    hidden_size,
    open_subject,
    text_digest,
)
from coterie.evaluate.sums import Sums, add_answers, base_scores, total_of
from coterie.evaluate.times import layers_of, text_of
from coterie.model.arch.layers import Architecture
from coterie.model.stream.likelihood import counted, counted_lengths, token_nll
from coterie.model.stream.memory import fitting_batch
from coterie.model.stream.reading import Head, logits_at, num_logits, predictions, read
from coterie.model.stream.stream import Stream
from coterie.paths import user_path
from coterie.profile.sources import On, check_on
from coterie.progress import track
from coterie.route.apply import Spent, routed
from coterie.route.policy import RoutePolicy

#: Models of at most this many bytes are read a second time for the few answers that need it; in larger ones all that
#: may be needed is computed in the one pass over their weights.
READ_AGAIN_BYTES = 2**30


class Evaluation(AbstractContextManager["Evaluation"]):
    """One text and one base, for models that are evaluated together or one after another.

    Attributes:
        base: the model to compare with, or None.
        device: where models run.
        batch_size: sequences in a batch.
    """

    def __init__(
        self,
        *,
        against: str | Path | None,
        text: str | Path,
        tokens: int | None = None,
        seq_len: int = 512,
        seed: int = 0,
        device: str | torch.device = "cpu",
        batch_size: int = 8,
        questions: int | None = None,
        dtype: torch.dtype | None = None,
        allow_pickle: bool = False,
        cache: str | Path | None = None,
        on: On = "all",
        ask_base: bool = True,
        route: RoutePolicy | None = None,
    ) -> None:
        """Read the questions and open the base; see `evaluate` for the arguments and what is raised.

        With `ask_base` the base is asked the questions too; without it its exact answers are not known. With `route`
        models compute what that policy leaves of their routing, and the base all of it.
        """
        self.device = check_arguments(
            device=device, dtype=dtype, batch_size=batch_size, tokens=tokens, questions=questions
        )
        check_seed(seed)
        check_on(on)
        by_domain = read_questions(text, limit=questions, seed=seed)
        self.batch_size = batch_size
        self.base: Subject | None = None
        self._reader = TextReader(text, by_domain, seq_len=seq_len, tokens=tokens, seed=seed, on=on)
        self._seed = seed
        self._dtype = dtype
        self._allow_pickle = allow_pickle
        self._cache = None if cache is None else user_path(cache)
        self._streams: dict[Path, Stream] = {}
        self._stack = ExitStack()
        self._ask_base = ask_base
        self._route = route
        self._spent: dict[Path, Spent] = {}
        self._base_right: set[int] | None = None
        self._base_is_open = False
        self._base_outputs: ModelOutputs | None = None
        self._predictions: KeptPredictions | None = None
        if against is not None:
            base = self._subject(against)
            self._add_stream(base)
            self.base = base

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def open(self, model: str | Path) -> Subject:
        """Open a model by its headers, and check that it can be compared with the base."""
        subject = self._subject(model)
        base = self.base
        if base is not None:
            check_same_text(subject, base)
        if subject.path not in self._streams:
            self._add_stream(subject)
        if base is not None:
            check_same_vocabulary(subject, self._streams[subject.path], base, self._streams[base.path])
        return subject

    def streams(self, subject: Subject | None = None) -> list[Stream]:
        """Return the streams of all models, or of one and the base."""
        if subject is None:
            return list(self._streams.values())
        return [self._streams[each.path] for each in (subject, self.base) if each is not None]

    def score(self, model: str | Path) -> Scorecard:
        """Evaluate one model and let go of it."""
        subject = self.open(model)
        [sums] = self.measure([subject])
        card = self.scorecard(subject, sums)
        if self.base is None or subject.path != self.base.path:
            del self._streams[subject.path]
        return card

    def keep_predictions(self) -> None:
        """Compute what the base predicts and keep it in the cache, unless it is there or too large."""
        self._base_predictions(asking=False)

    def measure(self, subjects: Sequence[Subject]) -> list[dict[str, Sums]]:
        """Return each model's sums by domain."""
        base = self.base
        if base is None:
            return [self._measure_one(subject) for subject in subjects]
        asks_base = self._ask_base and self._base_right is None and bool(self._reader.questions())
        # Where the base is to be scored too, it is read once for both.
        self._base_predictions(asking=asks_base or any(subject.path == base.path for subject in subjects))
        measured = [self._measure_one(subject) for subject in subjects]
        if asks_base and self._base_right is None:
            self._base_right = self._base_answers(base)
        return measured

    def _subject(self, model: str | Path) -> Subject:
        return open_subject(model, self._reader, allow_pickle=self._allow_pickle)

    def _add_stream(self, subject: Subject) -> None:
        stream = Stream(subject.checkpoint, dtype=self._dtype, device=self.device)
        self._streams[subject.path] = stream
        seq_len = subject.tokens.seq_len
        # One size for all, so that models are compared on equal batches.
        size = fitting_batch(self.batch_size, seq_len=seq_len, hidden_size=hidden_size(stream))
        if size < self.batch_size:
            self.batch_size, self._base_outputs = size, None

    def _base_predictions(self, *, asking: bool) -> None:
        """See to it that what the base makes of the text is there: in the cache, or as what its base model returns."""
        base = self.base
        if base is None or self._predictions is not None:
            return
        stream = self._streams[base.path]
        if not self._base_is_open:
            self._stack.enter_context(stream)
            self._base_is_open = True
        shape = PredictionShape(
            sequences=sum(len(ids) for ids in base.tokens.sequences.values()),
            tokens=base.tokens.seq_len - 1,
            vocabulary=num_logits(stream),
        )
        keeping = self._cache is not None and shape.num_bytes <= KEPT_BYTES
        inputs = {
            "base": base.checkpoint.digest,
            "tokens": base.tokens.digest,
            "number format": str(stream.dtype),
            "device": stream.device.type,
            "versions": f"{version('torch')} {version('transformers')}",
        }
        if keeping and self._cache is not None:
            self._predictions = open_predictions(self._cache, inputs, shape)
        if self._predictions is None and (
            self._base_outputs is None or (asking and not self._base_outputs.with_answers)
        ):
            self._base_outputs = self._read(base, self._questions(base) if asking else None)
        if self._predictions is None and keeping and self._cache is not None and self._base_outputs is not None:
            with keep_predictions(self._cache, inputs, shape) as writer, stream.head() as head:
                for first, _, ids_BS, output in self._texts(base, self._base_outputs):
                    for positions, _ in predictions(ids_BS, num_logits(stream)):
                        logits_BPV = logits_at(head, ids_BS, output, positions)
                        writer.put(first, positions, logits_BPV)
            self._predictions = open_predictions(self._cache, inputs, shape)
        if self._predictions is not None:
            self._stack.enter_context(self._predictions)

    def _measure_one(self, subject: Subject) -> dict[str, Sums]:
        stream, base = self._streams[subject.path], self.base
        is_base = base is not None and subject.path == base.path
        is_as_base = is_base and self._route is None
        with ExitStack() as stack:
            if not is_base:  # which is open
                stack.enter_context(stream)
            outputs = self._base_outputs
            if outputs is None or not is_as_base or not outputs.with_answers:
                outputs = self._read_routed(subject, self._questions(subject))
            with ExitStack() as heads:
                head = heads.enter_context(stream.head())
                base_head = None
                if base is not None and self._predictions is None:
                    base_head = head if is_base else heads.enter_context(self._streams[base.path].head())
                sums = self._sums(subject, outputs, head, base_head)
                begun: dict[int, int] = {}
                right = self._right(subject, outputs, head, begun)
            if self._in_turns(subject):
                right |= self._right_again(subject, begun, right)
        add_answers(sums, right, self._reader.questions_by_domain)
        if is_as_base:
            self._base_right = right
        return sums

    def _base_answers(self, base: Subject) -> set[int]:
        """Return the numbers of the questions that the base answers exactly."""
        outputs = self._base_outputs
        if outputs is None or not outputs.with_answers:
            outputs = self._read(base, self._questions(base), text=False)
        begun: dict[int, int] = {}
        with self._streams[base.path].head() as head:
            right = self._right(base, outputs, head, begun)
        return right | self._right_again(base, begun, right, is_base=True) if self._in_turns(base) else right

    def _in_turns(self, subject: Subject) -> bool:
        """Tell whether second attempts at answers are read only once the first ones are known."""
        return subject.num_bytes <= READ_AGAIN_BYTES

    def _questions(self, subject: Subject) -> list[Attempt]:
        tried = self._reader.attempts(subject.tokenizer)
        return first_attempts(tried) if self._in_turns(subject) else tried

    def _read(self, subject: Subject, attempts: Sequence[Attempt] | None, *, text: bool = True) -> ModelOutputs:
        """Run text and questions through the base model of an open stream."""
        texts = [ids_BS for _, ids_BS in subject.tokens.batches(self.batch_size)] if text else []
        grouped = attempt_batches(attempts or (), tokens=self.batch_size * subject.tokens.seq_len)
        batches = [*texts, *(ids_BS for _, ids_BS in grouped)]
        outputs = read(self._streams[subject.path], batches, description=layers_of(subject))
        return ModelOutputs(
            texts=outputs[: len(texts)],
            attempts=grouped,
            answers=outputs[len(texts) :],
            with_answers=attempts is not None,
        )

    def _read_routed(self, subject: Subject, attempts: Sequence[Attempt] | None, *, text: bool = True) -> ModelOutputs:
        """Do the same with what the policy leaves of the model's routing, if there is one."""
        if self._route is None:
            return self._read(subject, attempts, text=text)
        layers = Architecture.of(subject.checkpoint).layers
        with routed(self._streams[subject.path].model, layers, self._route) as spent:
            outputs = self._read(subject, attempts, text=text)
        if text:  # the tokens of the text and first attempts at answers
            self._spent[subject.path] = spent
        return outputs

    def _texts(self, subject: Subject, outputs: ModelOutputs) -> Iterator[tuple[int, str, Tensor, Any]]:
        """Yield of each batch the number of its first sequence, its domain, its tokens and the base model's output."""
        batches, first = list(subject.tokens.batches(self.batch_size)), 0
        rows = zip(batches, outputs.texts, strict=True)
        for (domain, ids_BS), output in track(rows, text_of(subject), total=len(batches)):
            yield first, subject.tokens.domains[domain], ids_BS, output
            first += len(ids_BS)
            for stream in self._streams.values():
                stream.release()

    def _sums(self, subject: Subject, outputs: ModelOutputs, head: Head, base_head: Head | None) -> dict[str, Sums]:
        sums = {domain: Sums() for domain in subject.tokens.domains}
        counts = list(subject.tokens.batch_counts(self.batch_size))
        for number, (first, domain, ids_BS, output) in enumerate(self._texts(subject, outputs)):
            base_output = None
            if base_head is not None and self._base_outputs is not None:
                base_output = self._base_outputs.texts[number]
            batch = (first, ids_BS, output, base_output)
            self._add_text(sums[domain], domain, subject, batch, counts[number], head, base_head)
        return sums

    def _add_text(
        self,
        domain_sums: Sums,
        domain: str,
        subject: Subject,
        batch: tuple[int, Tensor, Any, Any],
        counts_BS: Tensor | None,
        head: Head,
        base_head: Head | None,
    ) -> None:
        """Add one batch of text: its tokens, what the model and the base made of it, and which of them count."""
        first, ids_BS, output, base_output = batch
        stream = self._streams[subject.path]
        for positions, ids_BP in predictions(ids_BS, num_logits(stream)):
            logits_BPV = logits_at(head, ids_BS, output, positions)
            if logits_BPV.shape[-1] != num_logits(stream):
                raise InputError(
                    f"{subject.name} gives {logits_BPV.shape[-1]} scores a token where its vocabulary has "
                    f"{num_logits(stream)}: it does not predict the next token, so it cannot be evaluated on text"
                )
            base_nll_T = kl_T = agreeing_T = None
            if self._predictions is not None:
                log_p_BTV, likeliest_BT = self._predictions.read(first, len(ids_BS), positions)
                nll_T, base_nll_T, kl_T, agreeing_T = compare(
                    log_p_BTV, likeliest_BT, logits_BPV, ids_BP, masked=self._predictions.masked
                )
            else:
                nll_T = token_nll(logits_BPV, ids_BP)
            scored_T = counted(nll_T, counts_BS, positions).cpu().double()
            check_numbers(scored_T, subject, stream, domain)
            if base_head is not None:
                base_BPV, base_nll_T = logits_BPV, nll_T
                if base_head is not head or self._route is not None:
                    base_BPV = logits_at(base_head, ids_BS, base_output, positions)
                    base_nll_T = token_nll(base_BPV, ids_BP)
                kl_T, agreeing_T = token_divergence(base_BPV, logits_BPV)
            lengths = counted_lengths(ids_BP, counts_BS, positions)
            if self.base is None or base_nll_T is None or kl_T is None or agreeing_T is None:
                domain_sums.add_tokens(first, lengths, scored_T)
                continue
            compared = [counted(values_T, counts_BS, positions).cpu().double() for values_T in (base_nll_T, kl_T)]
            for values_T in compared:
                check_numbers(values_T, self.base, self._streams[self.base.path], domain)
            domain_sums.add_tokens(first, lengths, scored_T, *compared)
            domain_sums.agreeing += int(counted(agreeing_T, counts_BS, positions).sum())

    def _right(self, subject: Subject, outputs: ModelOutputs, head: Head, begun: dict[int, int]) -> set[int]:
        """Return the numbers of the questions, of all domains, that are answered exactly in what was read."""
        stream = self._streams[subject.path]
        ends = end_ids(generation_config(subject, stream), subject.tokenizer)
        right: set[int] = set()
        for (batch, ids_BS), output in zip(outputs.attempts, outputs.answers, strict=True):
            right |= right_in_batch(
                head, batch, ids_BS, output, self._reader.questions(),
                tokenizer=subject.tokenizer, ends=ends, vocab_size=num_logits(stream), begun=begun,
            )  # fmt: skip
            stream.release()
        return right

    def _right_again(
        self, subject: Subject, begun: Mapping[int, int], right: set[int], *, is_base: bool = False
    ) -> set[int]:
        """Return the questions that second attempts answer, which a second pass over the weights reads."""
        second = second_attempts(self._reader.attempts(subject.tokenizer), begun, right)
        if not second:
            return set()
        outputs = (self._read if is_base else self._read_routed)(subject, second, text=False)
        with self._streams[subject.path].head() as head:
            return self._right(subject, outputs, head, {})

    def scorecard(self, subject: Subject, sums: Mapping[str, Sums], cost: RunningCost | None = None) -> Scorecard:
        """Put together what is known of a model."""
        base, stream = self.base, self._streams[subject.path]
        base_domains, base_overall = (
            ({}, None) if base is None else base_scores(sums, self._base_right, self._reader.questions_by_domain)
        )
        return Scorecard(
            model=subject.name,
            model_digest=subject.checkpoint.digest,
            base=None if base is None else base.name,
            base_digest=None if base is None else base.checkpoint.digest,
            text_digest=text_digest(subject.tokens, self._reader.questions_by_domain),
            seq_len=subject.tokens.seq_len,
            seed=self._seed,
            on=subject.tokens.on,
            domains={domain: summed.scores(compared=base is not None) for domain, summed in sorted(sums.items())},
            overall=total_of(sums).scores(compared=base is not None),
            num_bytes=subject.num_bytes,
            bytes_ratio=None if base is None else subject.num_bytes / base.num_bytes,
            memory_bytes=None if cost is None else cost.memory_bytes,
            peak_memory_bytes=None if cost is None else cost.peak_memory_bytes,
            tokens_per_second=None if cost is None else cost.tokens_per_second,
            speed_ratio=None if cost is None else cost.speed_ratio,
            environment=environment(stream.device, stream.dtype),
            base_domains=base_domains,
            base_overall=base_overall,
            route="" if self._route is None else self._route.origin,
            experts_per_token=None if subject.path not in self._spent else self._spent[subject.path].experts_per_token,
        )
