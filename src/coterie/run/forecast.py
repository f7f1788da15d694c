"""What a run within a budget of memory is about to be like: fits or not, hits, tokens a second, time to the first one.

    coterie inspect MODEL --run --memory 6GiB

Headers say how many experts there is room for. Traces of routing say how many of those that tokens choose are then
among them: the model's own trace, or those of three small models that come with the package, at the same share of all
experts. Short probes say how fast this machine reads experts and computes.

A token takes at least the time of the slower of the two, reading and computing, and at most the sum; what is expected
lies between: within a layer, what is in memory is computed while the rest is read.

Legend: E experts of a layer, K of them a token chooses.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from coterie.errors import InputError
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.run.prepare import CONTEXT, Prepared, prepare
from coterie.run.probe import DISK_SECONDS, ComputeSpeed, DiskSpeed, Stopwatch, probe_compute, probe_disk
from coterie.run.records import Record
from coterie.run.rehearsal import Rehearsal, rehearse
from coterie.run.replay import replay, replay_each
from coterie.run.trace import RoutingTrace, bundled_traces, mask_of, sch, srp

log = logging.getLogger(__name__)

#: Tokens of the prompt that the time to the first token is for.
PROMPT_TOKENS = 512

#: Tokens of a segment of which it is said how alike they choose.
SEGMENT = 16

#: The type of the sibling in fewer bits, and the multiple of columns that its blocks want.
_TYPE, _COLUMNS = "Q4_K", 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """A number that is not known exactly.

    Attributes:
        low: at least.
        expected: what is likely.
        high: at most.
    """

    low: float
    expected: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """How many of the experts that tokens choose are in memory, and how alike tokens choose.

    Attributes:
        rate: with the policy of the run; low and high are those of single traces.
        lru: with the least recently used going first.
        belady: with who knows the future, which no policy passes.
        srp: segment routing best performance of 16 tokens (`coterie.run.trace.srp`).
        sch: segment cache best hit rate, with twice as many experts a layer as a token chooses.
        traces: whose routing it was.
        is_own: it was the model's own.
    """

    rate: Band
    lru: float
    belady: float
    srp: float
    sch: float
    traces: tuple[str, ...]
    is_own: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What a model would be like in this memory.

    Attributes:
        name: which one.
        num_slots: how many experts there is room for.
        most: how many there are.
        hit_rate: share of what tokens choose that is in memory.
        token_bytes: bytes of experts that a token reads.
        tokens_per_second: how fast it goes on.
    """

    name: str
    num_slots: int
    most: int
    hit_rate: float
    token_bytes: int
    tokens_per_second: Band


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run is about to be like.

    Attributes:
        model: the model.
        memory: the budget, in bytes.
        smallest: the smallest that works.
        fits: whether there is enough; all below is None or empty where there is not.
        context: tokens of prompt and answer together, at most.
        prompt_tokens: tokens of the prompt that the time to the first token is for.
        hits: how many experts are in memory when they are wanted.
        disk: how fast they are read.
        compute: how fast is computed.
        seconds: expected seconds of a token by what takes them; some of it happens at the same time.
        alone: the same where nothing else is done meanwhile.
        first_token: seconds to the first token of a prompt, with nothing read yet.
        outlooks: the model as it is, then what compressed ones would give.
    """

    model: Path
    memory: int
    smallest: int
    fits: bool
    context: int
    prompt_tokens: int
    hits: Hits | None = None
    disk: DiskSpeed | None = None
    compute: ComputeSpeed | None = None
    seconds: Mapping[str, float] | None = None
    alone: Mapping[str, float] | None = None
    first_token: Band | None = None
    outlooks: tuple[Outlook, ...] = ()

    @property
    def own(self) -> Outlook | None:
        """The model as it is."""
        return self.outlooks[0] if self.outlooks else None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        content = asdict(self) | {"model": str(self.model)}
        if self.disk is not None and self.compute is not None:
            content |= {"disk": self.disk.to_json(), "compute": self.compute.to_json()}
        return content


def forecast(
    model: str | Path,
    *,
    memory: int | str,
    context: int = CONTEXT,
    prompt_tokens: int | None = None,
    trace: RoutingTrace | Path | None = None,
    policy: str = "follow",
    lanes: int = 2,
    most_experts: int | None = None,
    direct: bool = True,
    kv: str = "auto",
    disk_seconds: float = DISK_SECONDS,
) -> Forecast:
    """Say what a run is about to be like; takes some seconds, in which the disk is read and products are computed.

    Args:
        model: a model folder, a GGUF file, a hub id, or a result of Coterie.
        memory: bytes, or an amount like "6GiB", that the run may take.
        context: tokens of prompt and answer together, at most.
        prompt_tokens: tokens of the prompt that the time to the first token is for; 512 when None, or half of a context
            that is shorter.
        trace: what the model's own router chose, or that of another of the same experts; bundled ones when None.
        policy: which experts stay in memory.
        lanes: threads that read.
        most_experts: how many experts are in memory at most, also where there is room for more.
        direct: read past the page cache, where the file system can.
        kv: how keys and values are kept, see `coterie.run.engine.Runtime`.
        disk_seconds: how long the disk is read for, at most.

    Raises:
        InputError: a trace of a model with other experts, or a number out of range.
        NotACheckpoint, CorruptCheckpoint, ArchitectureMismatch, NotAMoE: the model is not usable.
        CorruptArtifact: the trace is not readable.
    """
    if prompt_tokens is None:
        prompt_tokens = min(PROMPT_TOKENS, max(1, context // 2))
    if not 1 <= prompt_tokens < context:
        raise InputError(f"a prompt of {prompt_tokens} tokens does not fit into a context of {context} with an answer")
    own = RoutingTrace.load(trace) if isinstance(trace, Path) else trace
    prepared = prepare(model, memory=memory, context=context, most_experts=most_experts, policy=policy, kv=kv)
    budget, layers = prepared.budget, prepared.architecture.layers
    facts: dict[str, Any] = {
        "model": prepared.checkpoint.path, "memory": budget.limit, "smallest": budget.smallest, "context": context,
        "prompt_tokens": prompt_tokens,
    }  # fmt: skip
    traces, is_own = _traces_for(prepared, own)
    if budget.limit < budget.smallest:
        return Forecast(**facts, fits=False)
    log.info("replaying traces, reading experts, computing products; that takes some seconds")
    share = budget.num_slots / len(prepared.records)
    hits = _hits(traces, share, policy, prepared.chunk, is_own=is_own)
    most = max(layer.top_k for layer in layers)
    how: dict[str, Any] = {"lanes": lanes, "policy": policy, "direct": direct}
    disk = probe_disk(prepared.records, most=max(most, 8), seconds=0.8 * disk_seconds, **how)
    num_chunks = -(-prompt_tokens // prepared.chunk)
    chunk = -(-prompt_tokens // num_chunks)
    compute = probe_compute(prepared, chunk=chunk, room=max(2**24, budget.num_slots * budget.slot))
    shares = [chunk_shares(trace, share, chunk, policy) for trace in traces]
    asked, missed = (fmean(each) for each in zip(*shares, strict=True))
    played = rehearse(prepared, rate=hits.rate.expected, chunk=chunk, asked=asked, seconds=disk_seconds, **how)
    parts = token_parts(disk, compute, layers, hits.rate.expected)
    beside = played.token / token_seconds(parts).expected
    siblings = _siblings(prepared, traces, policy, disk, compute, beside, 0.2 * disk_seconds, how)
    return Forecast(
        **facts, fits=True, hits=hits, disk=disk, compute=compute,
        seconds={name: beside * each for name, each in parts.items()}, alone=parts,
        first_token=first_token(played, num_chunks, missed / asked),
        outlooks=(_outlook("as it is", prepared, hits.rate, disk, compute, beside), *siblings),
    )  # fmt: skip


def _traces_for(prepared: Prepared, given: RoutingTrace | None) -> tuple[Sequence[RoutingTrace], bool]:
    """Return the traces that say most of a model, and whether they are its own."""
    num_experts = tuple(layer.num_experts for layer in prepared.architecture.layers)
    if given is not None:
        if given.num_experts != num_experts:
            raise InputError(
                f"the trace is of {given.name}, which has {sum(given.num_experts)} experts in {len(given.layers)} "
                f"layers; {prepared.checkpoint.path} has {sum(num_experts)} in {len(num_experts)}: record one of it, "
                "with coterie run --save-trace"
            )
        return [given], True
    bundled = bundled_traces()
    for trace in bundled.values():
        if trace.model == prepared.checkpoint.digest:
            return [trace], True
    return list(bundled.values()), False


def hit_rate(trace: RoutingTrace, share: float, policy: str, *, chunk: int) -> float:
    """Return the share of what tokens choose behind a prompt that is in memory.

    Args:
        trace: what they choose; the first half of each text is the prompt.
        share: of all experts there is room for.
        policy: which experts stay, a key of `coterie.run.policies.POLICIES`.
        chunk: tokens of a prompt that pass the model at once.
    """
    if share >= 1:
        return 1.0
    steps, behind = trace.run_steps(chunk)
    hits = asked = 0
    for is_behind, entry, count in zip(behind, steps, replay_each(steps, _slots(trace, share), policy), strict=True):
        if is_behind:
            asked, hits = asked + len(entry.experts), hits + count
    return hits / max(asked, 1)


def _slots(trace: RoutingTrace, share: float) -> int:
    """Return how many experts are in memory, at least what a token chooses of a layer."""
    top_k = max(int(chosen_TLK.shape[2]) for chosen_TLK in trace.chosen.values())
    return max(round(share * trace.most), top_k)


def _hits(traces: Sequence[RoutingTrace], share: float, policy: str, chunk: int, *, is_own: bool) -> Hits:
    rates = {
        name: [hit_rate(trace, share, name, chunk=chunk) for trace in traces] for name in (policy, "lru", "belady")
    }
    alike, cached = [], []
    for trace in traces:
        chosen_TLK = trace.joined()
        masks = [mask_of(chosen_TLK[:, place], count) for place, count in enumerate(trace.num_experts)]
        alike.append(srp(masks, min(SEGMENT, len(chosen_TLK))))
        cached += [sch(mask_TE, 2 * int(mask_TE.sum(1).max()), SEGMENT) for mask_TE in masks]
    low, high = min(rates[policy]), max(rates[policy])
    return Hits(
        rate=Band(low=low, expected=fmean(rates[policy]), high=high), lru=fmean(rates["lru"]),
        belady=fmean(rates["belady"]), srp=fmean(alike), sch=fmean(cached),
        traces=tuple(trace.name for trace in traces), is_own=is_own,
    )  # fmt: skip


def token_parts(disk: DiskSpeed, compute: ComputeSpeed, layers: Sequence[MoELayer], rate: float) -> dict[str, float]:
    """Return the seconds of a token: of reading, of computing experts, of the rest, and how much of them is at once.

    How many of K experts a layer misses is taken as binomial, as a read of many at once is not as long as many reads.
    """
    read = experts = at_once = 0.0
    for layer in layers:
        chances = [
            comb(layer.top_k, count) * (1 - rate) ** count * rate ** (layer.top_k - count)
            for count in range(layer.top_k + 1)
        ]
        own = compute.layer * layer.top_k / compute.top_k
        for count, chance in enumerate(chances):
            waiting = disk.seconds(count)
            read += chance * waiting
            at_once += chance * min(waiting, own * (1 - count / layer.top_k))
        experts += own
    return {"reading": read, "experts": experts, "rest": compute.dense + compute.rest, "at once": at_once}


def token_seconds(parts: Mapping[str, float]) -> Band:
    """Return the seconds of a token from those of its parts."""
    computing = parts["experts"] + parts["rest"]
    total = parts["reading"] + computing
    return Band(low=max(parts["reading"], computing), expected=total - parts["at once"], high=total)


def _outlook(
    name: str, prepared: Prepared, rate: Band, disk: DiskSpeed, compute: ComputeSpeed, beside: float
) -> Outlook:
    budget, layers = prepared.budget, prepared.architecture.layers
    slow, usual, fast = (
        token_seconds(token_parts(disk, compute, layers, each)) for each in (rate.low, rate.expected, rate.high)
    )
    return Outlook(
        name=name, num_slots=budget.num_slots, most=len(prepared.records), hit_rate=rate.expected,
        token_bytes=round(sum(layer.top_k for layer in layers) * (1 - rate.expected) * disk.record_bytes),
        tokens_per_second=Band(
            low=1 / (beside * slow.high), expected=1 / (beside * usual.expected), high=1 / (beside * fast.low)
        ),
    )  # fmt: skip


def _siblings(
    prepared: Prepared, traces: Sequence[RoutingTrace], policy: str, disk: DiskSpeed, compute: ComputeSpeed,
    beside: float, disk_seconds: float, how: Mapping[str, Any],
) -> list[Outlook]:  # fmt: skip
    """Return what the model would be like with half of its experts, and with experts in fewer bits."""
    budget, layers = prepared.budget, prepared.architecture.layers

    def outlook(name: str, changed: Prepared, disk: DiskSpeed, compute: ComputeSpeed) -> Outlook:
        share = changed.budget.num_slots / len(changed.records)
        rates = [hit_rate(trace, share, policy, chunk=changed.chunk) for trace in traces]
        band = Band(low=min(rates), expected=fmean(rates), high=max(rates))
        return _outlook(name, changed, band, disk, compute, beside)

    few = {key: record for key, record in prepared.records.items() if key[1] < layers[0].num_experts // 2}
    half = replace(prepared, records=few, budget=replace(budget, most=min(budget.most, len(few))))
    siblings = [outlook("half of the experts", half, disk, compute)]
    layer = layers[0]
    shapes = [(layer.width, layer.hidden_size)] * 2 + [(layer.hidden_size, layer.width)]
    packed = sum(
        GgmlBlocks(type=_TYPE).num_bytes((rows, -(-columns // _COLUMNS) * _COLUMNS)) for rows, columns in shapes
    )
    scale = packed / compute.expert_bytes
    if scale < 0.8:
        small = {key: _shortened(record, scale) for key, record in prepared.records.items()}
        fewer = replace(prepared, records=small, budget=replace(budget, slot=max(4096, round(scale * budget.slot))))
        faster = probe_disk(small, most=max(disk.seconds_of), seconds=disk_seconds, **how)
        unpacking = compute.load * layer.top_k * sum(_unpack_seconds(shape) for shape in shapes)
        slower = replace(compute, layer=compute.layer + unpacking)
        siblings.append(outlook(f"experts in {_TYPE}", fewer, faster, slower))
    return siblings


def _shortened(record: Record, scale: float) -> Record:
    """Return a record of the same places with fewer bytes at each."""
    pieces = tuple(replace(piece, num_bytes=max(1, round(scale * piece.num_bytes))) for piece in record.pieces)
    return Record(pieces=pieces)


def _unpack_seconds(shape: tuple[int, int]) -> float:
    """Return the seconds of unpacking a matrix of the type of the sibling."""
    encoding = GgmlBlocks(type=_TYPE)
    padded = (shape[0], -(-shape[1] // _COLUMNS) * _COLUMNS)
    stored = {
        suffix: torch.zeros(stored_shape, dtype=torch.uint8)
        for suffix, (_, stored_shape) in encoding.stored(padded).items()
    }
    return Stopwatch().seconds(encoding.unpack, [stored]) * shape[1] / padded[1]


def first_token(played: Rehearsal, num_chunks: int, missed: float) -> Band:
    """Return the seconds that a prompt takes chunk by chunk, when nothing has been read before.

    Args:
        played: the first chunk.
        num_chunks: how many there are.
        missed: share of what a later chunk asks for that is not in memory.
    """
    later = played.chunk - (1 - missed) * played.waiting
    computed = played.chunk - played.waiting
    return Band(
        low=played.chunk + (num_chunks - 1) * computed,
        expected=played.chunk + (num_chunks - 1) * later,
        high=num_chunks * played.chunk,
    )


def chunk_shares(trace: RoutingTrace, share: float, chunk: int, policy: str) -> tuple[float, float]:
    """Return the share of a layer's experts that a chunk of a prompt asks for, and the share that a later one misses.

    Args:
        trace: what tokens choose.
        share: of all experts there is room for.
        chunk: tokens that pass the model at once.
        policy: which experts stay.
    """
    steps = trace.chunk_steps(min(chunk, max(map(len, trace.chosen.values()))))
    asked = sum(len(entry.experts) for entry in steps)
    all_of_them = trace.most * len({entry.step for entry in steps})
    return asked / all_of_them, (asked - replay(steps, _slots(trace, share), policy)) / all_of_them
