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
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.utils import GENERATION_CONFIG_NAME

from coterie.amounts import format_bytes
from coterie.errors import Cancelled, InputError, UnknownName
from coterie.model.arch.seam import install
from coterie.model.quiet import quiet
from coterie.model.stream.memory import free_bytes, peak_bytes
from coterie.run.arena import Arena
from coterie.run.chunks import Reading, new_cache
from coterie.run.experts import StreamedExperts
from coterie.run.lookahead import Lookahead
from coterie.run.policies import POLICIES
from coterie.run.prepare import CHUNK, CONTEXT, prepare
from coterie.run.reader import Reader
from coterie.run.records import slot_bytes
from coterie.run.residency import Residency
from coterie.run.resident import load_resident
from coterie.run.reuse import Growing, KeptSequences
from coterie.run.session_store import SIZE, SessionStore, check_folder, session_key

log = logging.getLogger(__name__)

#: Threads that read experts.
LANES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen; None leaves what the model's generation_config.json says.

    Attributes:
        temperature: what scores are divided by; 0 for the likeliest token each time.
        top_k: how many of the likeliest tokens are drawn from.
        top_p: the share of probability of the likeliest tokens that are drawn from.
        min_p: the share of the likeliest token's probability that others need.
        repetition_penalty: what scores of tokens that were there are divided by.
        seed: seed of the draws.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raise InputError for what is out of range."""
        ranges = {
            "temperature": (self.temperature, 0.0, 100.0), "top-k": (self.top_k, 1, 2**31),
            "top-p": (self.top_p, 0.0, 1.0), "min-p": (self.min_p, 0.0, 1.0),
            "repetition-penalty": (self.repetition_penalty, 0.01, 100.0),
        }  # fmt: skip
        for name, (value, least, most) in ranges.items():
            if value is not None and not least <= value <= most:
                raise InputError(f"--{name} {value:g} is out of range: {least:g} to {most:g}")

    def settings(self) -> dict[str, Any]:
        """Return them as transformers has them."""
        given = {
            name: value
            for name in ("top_k", "top_p", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if self.temperature == 0:
            return {"do_sample": False, "repetition_penalty": given.get("repetition_penalty")}
        if self.temperature is not None:
            given |= {"temperature": self.temperature, "do_sample": True}
        return given


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
    """

    text: str
    prompt_tokens: int
    reused: int
    tokens: int
    first_seconds: float
    seconds: float
    hits: float
    bytes_read: int

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
        policy: str = "decay",
        lanes: int = LANES,
        lookahead: int = 0,
        chunk: int = CHUNK,
        most_experts: int | None = None,
        dtype: torch.dtype | None = None,
        direct: bool = True,
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
        if policy not in POLICIES or policy == "belady":
            raise UnknownName("policy", policy, sorted(POLICIES.keys() - {"belady"}))
        if sessions is not None:
            check_folder(sessions, sessions_size)  # before minutes of loading
        prepared = prepare(
            model, memory=memory, context=context, chunk=chunk, most_experts=most_experts, dtype=dtype, kv=kv
        )
        prepared.budget.check()
        log.info("memory: %s", prepared.budget)
        if prepared.budget.num_slots < prepared.budget.most // 20:
            log.warning(
                "there is room for %d of %d experts: nearly every one has to be read again when it is needed",
                prepared.budget.num_slots, prepared.budget.most,
            )  # fmt: skip
        self.budget, self.tokenizer, self.context = prepared.budget, prepared.tokenizer, prepared.context
        self.path = prepared.checkpoint.path
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
        self.lookahead = Lookahead(self.model, prepared.architecture.layers, self.residency, lookahead)
        streamed = StreamedExperts(
            self.model, prepared.places, self.residency, num_slots=self.budget.num_slots, dtype=prepared.dtype,
            check=self._check, lookahead=self.lookahead if lookahead else None,
        )  # fmt: skip
        install(self.model, streamed.compute)
        self.reused = 0
        cache = partial(new_cache, self.model, prepared.kv, prepared.plain)
        store = None if sessions is None else SessionStore(
            sessions, sessions_size, key=session_key(self.model, self.digest, cache(), self.budget.kv),
            context=self.context, new_cache=cache,
        )  # fmt: skip
        self._kept = KeptSequences(prepared.cache, prepared.context, cache, store)

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
        streamer = _Streamer(self.tokenizer, on_text)
        before = self.residency.counters
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
        if max_tokens < 1:
            raise InputError(f"--max-tokens {max_tokens} must be 1 or more")
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        model, steps = cast(Any, self.model), None if on_token is None else _Steps(on_token)
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
                    **sampling.settings(),
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


class _Streamer(TextStreamer):
    """Hands on text as it is made, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first: float | None = None
        self._on_text = on_text
        self._calls = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        self._calls += 1
        if self._calls == 2:
            self.first = time.perf_counter()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on text that no later token changes."""
        if self._on_text is not None and text:
            self._on_text(text)


class _Steps(StoppingCriteria):
    """Hands on each token with the scores that it was chosen by, and ends where that says so."""

    def __init__(self, on_token: Callable[[int, Tensor], bool]) -> None:
        self._on_token = on_token
        self._scores_V: Tensor | None = None

    def note(self, model: object, arguments: object, output: Any) -> None:
        """Keep the scores of the last token of a forward pass; a hook."""
        self._scores_V = output.logits[0, -1].float().clone()

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Say whether the token that was chosen last is the last one."""
        assert self._scores_V is not None
        return torch.tensor([self._on_token(int(input_ids[0, -1]), self._scores_V)], device=input_ids.device)


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
    policy: str = "decay",
    lanes: int = LANES,
    lookahead: int = 0,
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
        kv: how keys and values are kept, see `Runtime`.
        sessions: folder of keys and values for another time, see `Runtime`.
        sessions_size: bytes that it may take.
        on_text: gets the text piece by piece, as it comes.

    Raises:
        NotEnoughMemory, InputError, ArchitectureMismatch, CorruptCheckpoint: see `Runtime` and `Runtime.generate`.
    """
    limit = default_memory() if memory is None else memory
    with Runtime(
        model, memory=limit, context=context, policy=policy, lanes=lanes, lookahead=lookahead, kv=kv,
        sessions=sessions, sessions_size=sessions_size,
    ) as runtime:  # fmt: skip
        return runtime.generate(prompt, max_tokens=max_tokens, sampling=sampling, template=template, on_text=on_text)
