"""A model that runs within a budget of memory: what is resident, a cache of experts, and generation of text."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer
from transformers.utils import GENERATION_CONFIG_NAME

from coterie.amounts import format_bytes
from coterie.artifact import digest_of
from coterie.errors import Cancelled, InputError
from coterie.model.arch.seam import install
from coterie.model.quiet import quiet
from coterie.model.stream.memory import free_bytes, peak_bytes
from coterie.route.policy import RoutePolicy
from coterie.run.arena import Arena
from coterie.run.batch import Batch, Outcome, Wanted
from coterie.run.chunks import Reading, new_cache
from coterie.run.experts import StreamedExperts
from coterie.run.listeners import Steps, Streamer
from coterie.run.lookahead import Lookahead
from coterie.run.prepare import CHUNK, CONTEXT, prepare
from coterie.run.reader import Reader
from coterie.run.records import slot_bytes
from coterie.run.residency import Residency
from coterie.run.resident import load_resident
from coterie.run.reuse import Growing, KeptSequences
from coterie.run.sampling import Sampling as Sampling
from coterie.run.sampling import check_tokens
from coterie.run.session_store import SIZE, SessionStore, check_folder, session_key
from coterie.run.speculation import Drafted, speculation_of

log = logging.getLogger(__name__)

#: Threads that read experts.
LANES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """What came out.

    Attributes:
        text: the text, without the prompt.
        prompt_tokens: tokens of the prompt.
        reused: tokens of the prompt whose keys and values were there already.
        tokens: tokens that were made.
        first_seconds: time to the first one.
        seconds: time to the last one.
        hits: share of the experts that were wanted that were in memory.
        bytes_read: bytes of experts that were read.
        drafted: what guesses brought, where there are some.
    """

    text: str
    prompt_tokens: int
    reused: int
    tokens: int
    first_seconds: float
    seconds: float
    hits: float
    bytes_read: int
    drafted: Drafted | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / max(self.seconds - self.first_seconds, 1e-9) if self.tokens > 1 else 0.0

    def __str__(self) -> str:
        each = format_bytes(self.bytes_read // max(self.tokens, 1))
        known = f" ({self.reused} of them were known)" if self.reused else ""
        return (
            f"{self.prompt_tokens} tokens read{known} in {self.first_seconds:.1f} s, {self.tokens} made at "
            f"{self.tokens_per_second:.1f} a second; {self.hits:.0%} of experts were in memory, "
            f"{format_bytes(self.bytes_read)} were read ({each} a token)"
            f"{'' if self.drafted is None else f'; {self.drafted}'}"
        )


class Runtime:
    """A model within a budget of memory, ready to generate. Close it, or use it as a context.

    Keys and values stay when a generation is over, and a prompt that begins in the same way reuses them, as far as the
    memory for one context goes (`coterie.run.reuse`).

    Attributes:
        reused: tokens of the last prompt whose keys and values were there already.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        memory: int | str,
        context: int = CONTEXT,
        policy: str = "follow",
        lanes: int = LANES,
        lookahead: int = 0,
        chunk: int = CHUNK,
        most_experts: int | None = None,
        dtype: torch.dtype | None = None,
        direct: bool = True,
        batch: int = 1,
        draft: str = "off",
        route: RoutePolicy | str | Path | None = None,
        only_misses: bool = False,
        kv: str = "auto",
        sessions: str | Path | None = None,
        sessions_size: int | str = SIZE,
    ) -> None:
        """Load what stays in memory, and take all the memory that the run may have.

        Args:
            model: a model folder, a GGUF file, a hub id, or a result of Coterie.
            memory: bytes, or an amount like "6GiB", that this process may take.
            context: tokens of prompt and answer together, at most.
            policy: which experts stay, a key of `coterie.run.policies.POLICIES`.
            lanes: threads that read.
            lookahead: experts of the next layer that are guessed and read ahead when lanes are idle; 0 for none.
            chunk: tokens of a prompt that pass the model at once.
            most_experts: how many experts are in memory at most, also where there is room for more.
            dtype: number format that is computed in; that of the checkpoint when None.
            direct: read past the page cache, where the file system can.
            batch: sequences of the whole context at once, at most; see `generate_batch`.
            draft: who guesses tokens of an answer that is alone, for one pass to check, as long as it is worth its
                time: nobody ("off"), the text so far ("lookup"), the model itself with the experts in memory
                ("resident", or "resident:0.5" with half of a token's), or another model with the same tokenizer.
            route: a policy, or the file of one that `coterie route` wrote: experts that it leaves out are neither read
                nor computed, which changes what the model says.
            only_misses: leave out of them only those that are not in memory.
            kv: how keys and values are kept: "full", "int8", "int4" or "window:N" (`coterie.run.kv`); "auto" for full
                where all experts, or twice as many as a token chooses in all layers, are in memory beside them, and
                for int8 where not.
            sessions: folder where keys and values go that there is no memory for, and all of them at the end; what is
                there serves the next runtime of the same model. It holds what was asked and answered.
            sessions_size: bytes that this folder may take; what was used longest ago goes.

        Raises:
            NotEnoughMemory: the budget is too small; names the smallest that works.
            InputError: no such policy, a number out of range, or a folder that nothing can be written to.
            NotACheckpoint, CorruptCheckpoint, ArchitectureMismatch, NotAMoE: the model is not usable.
        """
        if lanes < 1 or lookahead < 0:
            raise InputError(f"--lanes {lanes} must be 1 or more, and --lookahead {lookahead} 0 or more")
        leaves = RoutePolicy.of(route)
        if only_misses and (leaves is None or any(rule.renormalise for rule in leaves.rules)):
            raise InputError(
                "--only-misses is about what a policy leaves out: name one with --route, and one that does not scale "
                "the weights of the others up"
            )
        if sessions is not None:
            check_folder(sessions, sessions_size)  # before minutes of loading
        prepared = prepare(
            model, memory=memory, context=context, chunk=chunk, most_experts=most_experts, dtype=dtype, policy=policy,
            batch=batch, draft=draft, kv=kv,
        )  # fmt: skip
        prepared.budget.check()
        # oneDNN keeps a kernel for each shape that it has met, 1024 of them, which no budget counts.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        log.info("memory: %s", prepared.budget)
        if prepared.budget.num_slots < prepared.budget.most // 20:
            log.warning(
                "there is room for %d of %d experts: nearly every one has to be read again when it is needed",
                prepared.budget.num_slots, prepared.budget.most,
            )  # fmt: skip
        self.budget, self.tokenizer, self.context = prepared.budget, prepared.tokenizer, prepared.context
        self.path, self._chunk, self.batch = prepared.checkpoint.path, prepared.chunk, batch
        self.digest, self.layers = prepared.checkpoint.digest, prepared.architecture.layers
        self.model = load_resident(prepared.checkpoint, prepared.conversion, prepared.dtype, prepared.apart)
        if (self.path / GENERATION_CONFIG_NAME).is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self.path)
            # Another cache would take other memory than the budget counts.
            cast(Any, self.model.generation_config).cache_implementation = None
        self._reading = Reading(self.model, prepared.chunk)
        _give_back()
        records = prepared.records
        self._arena = Arena(self.budget.num_slots, slot_bytes(records.values()))
        self._reader = Reader(lanes=lanes, direct=direct)
        self.residency = Residency(self._arena, self._reader, records, policy)
        self._cancelled: Callable[[], bool] | None = None
        if leaves is not None:
            leaves.check([layer.top_k for layer in self.layers], where=str(self.path))
            log.info("not all experts are computed: %s%s", leaves, " at most" if only_misses else "")
        self.lookahead = Lookahead(self.model, prepared.architecture.layers, self.residency, lookahead)
        self.experts = StreamedExperts(
            self.model, prepared.places, self.residency, num_slots=self.budget.num_slots, dtype=prepared.dtype,
            check=self._check, lookahead=self.lookahead if lookahead else None, route=leaves, only_misses=only_misses,
        )  # fmt: skip
        install(self.model, self.experts.compute)
        self.speculation = speculation_of(
            prepared.draft, self.model, self.layers, self.residency, self.experts, chunk=self._chunk
        )
        self._told_one_by_one = False
        self.reused = 0
        self._new_cache = partial(new_cache, self.model, prepared.kv, prepared.plain)
        told = digest_of([self.budget.kv, repr(leaves), only_misses])  # what keys and values hang on beside the model
        store = None if sessions is None else SessionStore(
            sessions, sessions_size, key=session_key(self.model, self.digest, self._new_cache(), told),
            context=self.context, new_cache=self._new_cache,
        )  # fmt: skip
        self._kept = KeptSequences(prepared.cache, prepared.context, self._new_cache, store)

    def ids(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        template: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor:
        """Return the ids (1, S) of a prompt, as the chat template has it, or of the text as it is.

        Args:
            prompt: text, or messages.
            template: write the prompt as the model's chat template has it, if it has one.
            tools: functions that the model may call, for the template; JSON content as transformers has it.

        Raises:
            InputError: nothing is left of it, or it is longer than the context.
        """
        tokenizer: Any = self.tokenizer
        if template and tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            written = tokenizer.apply_chat_template(
                messages, tools=None if tools is None else list(tools), add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(written, add_special_tokens=False, return_tensors="pt").input_ids
        elif isinstance(prompt, str):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
        else:
            raise InputError(f"{self.path} has no chat template: give text instead of messages")
        if not ids.numel():
            raise InputError("the prompt is empty")
        if ids.shape[1] >= self.context:
            raise InputError(
                f"the prompt has {ids.shape[1]} tokens, which leaves none of --context {self.context} for an answer"
            )
        return ids  # type: ignore[no-any-return]

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        template: bool = True,
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generated:
        """Go on with a prompt.

        Args:
            prompt: text, or messages with role and content.
            max_tokens: tokens that are made at most; the context ends it too.
            sampling: how tokens are chosen.
            template: write the prompt as the model's chat template has it, if it has one.
            on_text: gets the text piece by piece, as it comes.
            cancelled: asked before every layer; ends the generation where it says so.

        Raises:
            InputError: a prompt or a setting that cannot be.
            Cancelled: it was.
            CorruptCheckpoint: a file cannot be read any more, or is another; the next generation may pass.
        """
        ids_1S = self.ids(prompt, template=template)
        streamer = Streamer(self.tokenizer, on_text)
        before = self.residency.counters
        drafted = None if self.speculation is None else self.speculation.drafted
        started = time.perf_counter()
        new = self.generate_ids(
            ids_1S, max_tokens=max_tokens, sampling=sampling, streamer=streamer, cancelled=cancelled
        )
        seconds = time.perf_counter() - started
        after = self.residency.counters
        hits, misses = after.hits - before.hits, after.misses - before.misses
        return Generated(
            text=str(self.tokenizer.decode(new, skip_special_tokens=True)), prompt_tokens=ids_1S.shape[1],
            reused=self.reused, tokens=len(new), first_seconds=(streamer.first or started) - started, seconds=seconds,
            hits=hits / max(hits + misses, 1), bytes_read=after.num_bytes - before.num_bytes,
            drafted=None if self.speculation is None or drafted is None else self.speculation.drafted.since(drafted),
        )  # fmt: skip

    def generate_ids(
        self,
        ids_1S: Tensor,
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        on_token: Callable[[int, Tensor], bool] | None = None,
        streamer: TextStreamer | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[int]:
        """Go on with the ids of a prompt, and return those that were made.

        Args:
            ids_1S: the prompt, shorter than the context; see `ids`.
            max_tokens: tokens that are made at most; the context ends it too.
            sampling: how tokens are chosen.
            on_token: gets each token with the scores (V) that the model gave to all, before anything changed them;
                True ends the generation after it.
            streamer: what transformers hands tokens to.
            cancelled: asked before every layer; ends the generation where it says so.

        Raises:
            InputError, Cancelled, CorruptCheckpoint, ReadError: see `generate`.
        """
        sampling = sampling or Sampling()
        sampling.check()
        check_tokens(max_tokens)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        model, steps = cast(Any, self.model), None if on_token is None else Steps(on_token)
        drafts: dict[str, Any] = {}
        if self.speculation is not None:
            drafts["custom_generate"] = self.speculation.decoder(streamer, None if steps is None else steps.see)
        running = self._kept.begin(ids_1S[0]) if self._reading.has_cache else None
        self.reused = 0 if running is None else running.reused
        hook = None if steps is None else self.model.register_forward_hook(steps.note)
        self._cancelled, whole = cancelled, False
        watching = [each for each in (None if running is None else Growing(running), steps) if each is not None]
        try:
            with quiet(), torch.no_grad():
                output = model.generate(
                    ids_1S, attention_mask=torch.ones_like(ids_1S), streamer=streamer,
                    stopping_criteria=StoppingCriteriaList(watching),
                    max_new_tokens=min(max_tokens, self.context - ids_1S.shape[1]),
                    prefill_chunk_size=self._reading.begin(ids_1S, running),
                    pad_token_id=self._pad(), **({} if running is None else {"past_key_values": running.cache}),
                    **drafts, **sampling.settings(),
                )  # fmt: skip
            whole = True
        finally:
            self._cancelled = None
            if running is not None:
                running.end(whole=whole)
            if hook is not None:
                hook.remove()
        new: list[int] = output[0, ids_1S.shape[1] :].tolist()
        return new

    def generate_batch(self, wanted: Sequence[Wanted]) -> list[Outcome]:
        """Make several answers at once, each as it would be alone: a step reads an expert once for all of them.

        Where a family keeps more of a sequence than keys and values, they are made one after the other, which is said.
        One answer alone is made as `generate_ids` makes it.

        Args:
            wanted: the answers, as many as `batch` at most.

        Returns:
            What became of each. What ends one ends no other, but for a disk that fails, which ends those under way; the
            next ones may pass.

        Raises:
            InputError: they are too many, or a setting cannot be.
        """
        if len(wanted) > self.batch:
            raise InputError(f"{len(wanted)} answers at once are more than a batch of {self.batch}")
        if len(wanted) < 2:
            return [self._alone(each) for each in wanted]
        cache = self._new_cache() if self._reading.has_cache else None
        batch = Batch(self.model, self.experts, wanted, context=self.context, pad=self._pad(), cache=cache)
        if not batch.is_possible:
            if not self._told_one_by_one:
                log.warning("answers are made one by one: this model keeps more of a text than keys and values")
            self._told_one_by_one = True
            return [self._alone(each) for each in wanted]
        self.reused = 0
        self._kept.make_room(self.context)  # whose memory is that of the first of these answers
        self._cancelled = lambda: batch.is_cancelled
        try:
            batch.run(self._chunk)
        finally:
            self._cancelled = None
        return [answer.outcome for answer in batch.answers]

    def _alone(self, wanted: Wanted) -> Outcome:
        """Make one answer."""
        outcome = Outcome()

        def take(token: int, scores_V: Tensor) -> bool:
            outcome.ids.append(token)
            return wanted.on_token is not None and wanted.on_token(token, scores_V)

        try:
            self.generate_ids(
                wanted.ids_1S, max_tokens=wanted.max_tokens, sampling=wanted.sampling, on_token=take,
                cancelled=wanted.cancelled,
            )  # fmt: skip
        except Exception as error:
            outcome.error = error
        if wanted.on_end is not None:
            wanted.on_end(outcome)
        return outcome

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        ends = cast(Any, self.model).generation_config.eos_token_id
        return () if ends is None else tuple(ends) if isinstance(ends, list) else (int(ends),)

    def peak(self) -> str:
        """Say how much memory this process took at most, beside what it may take."""
        return f"memory: {format_bytes(peak_bytes())} at most, of {format_bytes(self.budget.limit)}"

    def forget(self) -> None:
        """Forget the keys and values that were kept, so that the next prompt is computed from its beginning."""
        self._kept.close()

    def close(self) -> None:
        """Let reads that are under way end, and give the memory back."""
        self._kept.close()
        self.residency.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("the generation was cancelled")

    def _pad(self) -> int | None:
        """Return the token that stands for none, which transformers asks for."""
        settings: Any = self.model.generation_config
        if settings.pad_token_id is not None:
            return int(settings.pad_token_id)
        return self.ends[0] if self.ends else None


def default_memory() -> int:
    """Return the budget that is taken where none is named: three quarters of the memory that is free, in bytes."""
    return 3 * free_bytes(torch.device("cpu")) // 4


def _give_back() -> None:
    """Give memory that is free inside this process back to the system."""
    gc.collect()
    if os.name == "posix":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def run(
    model: str | Path,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    memory: int | str | None = None,
    context: int = CONTEXT,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    template: bool = True,
    policy: str = "follow",
    lanes: int = LANES,
    lookahead: int = 0,
    draft: str = "off",
    route: RoutePolicy | str | Path | None = None,
    only_misses: bool = False,
    kv: str = "auto",
    sessions: str | Path | None = None,
    sessions_size: int | str = SIZE,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Go on with a prompt within a budget of memory; for several prompts, keep a `Runtime`.

    Args:
        model: a model folder, a GGUF file, a hub id, or a result of Coterie.
        prompt: text, or messages with role and content.
        memory: bytes, or an amount like "6GiB", that this process may take; three quarters of what is free when None.
        context: tokens of prompt and answer together, at most.
        max_tokens: tokens that are made at most.
        sampling: how tokens are chosen.
        template: write the prompt as the model's chat template has it, if it has one.
        policy: which experts stay in memory, see `Runtime`.
        lanes: threads that read.
        lookahead: experts of the next layer that are guessed and read ahead; 0 for none.
        draft: who guesses tokens, see `Runtime`.
        route: how many experts a token gets, see `Runtime`.
        only_misses: leave out only experts that are not in memory.
        kv: how keys and values are kept, see `Runtime`.
        sessions: folder of keys and values for another time, see `Runtime`.
        sessions_size: bytes that it may take.
        on_text: gets the text piece by piece, as it comes.

    Raises:
        NotEnoughMemory, InputError, ArchitectureMismatch, CorruptCheckpoint: see `Runtime` and `Runtime.generate`.
    """
    limit = default_memory() if memory is None else memory
    with Runtime(
        model, memory=limit, context=context, policy=policy, lanes=lanes, lookahead=lookahead, draft=draft, route=route,
        only_misses=only_misses, kv=kv, sessions=sessions, sessions_size=sessions_size,
    ) as runtime:  # fmt: skip
        return runtime.generate(prompt, max_tokens=max_tokens, sampling=sampling, template=template, on_text=on_text)
