"""What is known of a run before anything is loaded: the model by its headers, its experts' places, and the memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie.amounts import parse_bytes
from coterie.errors import InputError, UnknownName
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import checkpoint_meta_model
from coterie.model.arch.resize import resized_config
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.kernel_matrix import this_isa
from coterie.model.disk.filled import filled_up
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.disk.quantized import dequantized
from coterie.model.disk.quantized_records import pack_settings
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.run.budget import RunBudget
from coterie.run.draft_choice import DraftChoice
from coterie.run.kv import Heads, KVFormat, layer_size, plain_layers
from coterie.run.places import LayerPlaces, find_places
from coterie.run.policies import POLICIES, shape_of
from coterie.run.records import Key, Piece, Record, slot_bytes
from coterie.run.resident import resident_size
from coterie.run.sizes import CacheSize, buffer_bytes, cache_size

log = logging.getLogger(__name__)

#: Tokens of prompt and answer together, and of a prompt that pass the model at once.
CONTEXT, CHUNK = 4096, 256

#: Sequences at once at most.
MOST_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can begin.

    Attributes:
        checkpoint: the model, as a view in full precision.
        architecture: what it computes.
        conversion: between its names on disk and in memory.
        places: where the matrices of its experts lie.
        records: the same as ranges of bytes.
        apart: names on disk of those matrices.
        tokenizer: the model's.
        dtype: number format that is computed in.
        context: tokens of prompt and answer together, at most.
        chunk: tokens of a prompt that pass the model at once.
        kv: how keys and values are kept.
        plain: layers of the cache that keep them so.
        cache: what they take.
        budget: what memory is for.
        draft: who guesses tokens.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    conversion: WeightConversion
    places: Sequence[LayerPlaces]
    records: Mapping[Key, Record]
    apart: frozenset[str]
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    context: int
    chunk: int
    kv: KVFormat
    plain: tuple[int, ...]
    cache: CacheSize
    budget: RunBudget
    draft: DraftChoice


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model by its headers, and where its experts lie.

    Attributes:
        stored: the model as it is stored.
        checkpoint: the model, as a view in full precision, its experts in one width.
        architecture: what it computes.
        conversion: between its names on disk and in memory.
        places: where the matrices of its experts lie.
    """

    stored: Checkpoint
    checkpoint: Checkpoint
    architecture: Architecture
    conversion: WeightConversion
    places: Sequence[LayerPlaces]

    @property
    def apart(self) -> frozenset[str]:
        """Names on disk of those matrices."""
        return frozenset(tensor.info.name for each in self.places for expert in each.experts for tensor in expert)


def open_places(model: str | Path, *, output_dtype: str = "bfloat16") -> Opened:
    """Look at a model, whatever it is stored in.

    Args:
        model: a model folder, a GGUF file, a hub id, or a result of Coterie.
        output_dtype: number format that quantised tensors are read in.

    Raises:
        NotACheckpoint, CorruptCheckpoint, ArchitectureMismatch, NotAMoE: the model is not usable.
    """
    stored = Checkpoint.open(model)
    manifest = Manifest.read(stored.path)
    checkpoint = filled_up(dequantized(stored, output_dtype), None if manifest is None else manifest.ragged)
    architecture = Architecture.of(checkpoint)
    if manifest is not None and manifest.form is ResultForm.MAPPED:  # its config counts the router's rows
        fewer = resized_config(architecture, manifest.layers[0].num_experts_after)
        architecture = Architecture.from_config(fewer, where=str(checkpoint.path))
    conversion = WeightConversion(checkpoint, checkpoint_meta_model(checkpoint, dtype=torch.float32))
    places = find_places(checkpoint, architecture, conversion)
    return Opened(stored=stored, checkpoint=checkpoint, architecture=architecture, conversion=conversion, places=places)


def check_isa(stored: Checkpoint) -> None:
    """Raise InputError where a model was packed for processors of another kind.

    Args:
        stored: the model as it is stored.
    """
    settings = pack_settings(stored.config)
    isa = None if settings is None else settings.get("isa")
    if isa is not None and isa != this_isa():
        raise InputError(
            f"{stored.path} was packed for processors with {isa}, whose kernels want 4-bit numbers in their own order, "
            f"and this one computes with {this_isa()}: pack the model that it was made from again on this machine "
            "(coterie pack MODEL OUT), or with --bits 8, which any processor reads"
        )


def prepare(
    model: str | Path,
    *,
    memory: int | str,
    context: int = CONTEXT,
    chunk: int = CHUNK,
    most_experts: int | None = None,
    dtype: torch.dtype | None = None,
    policy: str = "follow",
    batch: int = 1,
    draft: str = "off",
    kv: str = "auto",
) -> Prepared:
    """Look at a model; see `coterie.run.engine.Runtime` for arguments and errors. The budget is not checked."""
    if context < 1 or chunk < 1:
        raise InputError(f"--context {context} and a chunk of {chunk} tokens must be 1 or more")
    if not 1 <= batch <= MOST_BATCH:
        raise InputError(f"a batch of {batch} sequences is out of range: 1 to {MOST_BATCH}")
    if most_experts is not None and most_experts < 1:
        raise InputError(f"{most_experts} experts in memory at most is none; it must be 1 or more")
    if policy not in POLICIES or policy == "belady":
        raise UnknownName("policy", policy, sorted(POLICIES.keys() - {"belady"}))
    limit, choice, how = parse_bytes(memory), DraftChoice.parse(draft), KVFormat.parse(kv)
    opened = open_places(model)
    checkpoint, architecture, conversion, places = (
        opened.checkpoint, opened.architecture, opened.conversion, opened.places,
    )  # fmt: skip
    check_isa(opened.stored)
    records, apart = _records(checkpoint, places), opened.apart
    tokenizer = load_tokenizer(checkpoint.path)
    dtype = dtype or _dtype_of(checkpoint)
    meta: Any = checkpoint_meta_model(checkpoint, dtype=dtype)
    size = resident_size(checkpoint, conversion, meta, apart)
    chunk = min(chunk, context)
    sibling = choice.prepare(tokenizer, dtype=dtype, context=context, chunk=chunk)
    buffers = buffer_bytes(
        meta, architecture.layers, chunk=max(chunk, batch), context=context, scored=max(batch, choice.scored)
    )
    buffers += 0 if sibling is None else sibling.buffers  # what one gives back the other may not get
    cache = cache_size(checkpoint, meta)
    budget = RunBudget(
        limit=limit,
        program=psutil.Process().memory_info().rss,
        resident=size.num_bytes,
        reading=max(size.largest, 0 if sibling is None else sibling.reading),
        cache=batch * cache.planned(context, chunk),
        buffers=buffers + POLICIES[policy].num_bytes(shape_of(records)),
        slot=slot_bytes(records.values()),
        least=min(max(layer.top_k for layer in architecture.layers), most_experts or len(records)),
        most=len(records) if most_experts is None else min(len(records), most_experts),
        sequences=batch,
        draft=0 if sibling is None else sibling.num_bytes,
    )
    short = budget.num_slots < min(budget.most, 2 * sum(layer.top_k for layer in architecture.layers))
    kv_format = how or KVFormat(name="int8" if short else "full")
    plain: dict[int, Heads] = {}
    if kv_format.name != "full":
        plain = _plain_layers(meta)
        smaller = cache.with_layers(
            {number: layer_size(kv_format, heads, dtype.itemsize) for number, heads in plain.items()}
        )
        smaller_budget = replace(budget, cache=batch * smaller.planned(context, chunk), kv=str(kv_format))
        if how is None and smaller_budget.cache >= budget.cache:
            kv_format, plain = KVFormat(), {}
        else:
            cache, budget = smaller, smaller_budget
            _tell(kv_format, len(plain), len(cache.layers))
    return Prepared(
        checkpoint=checkpoint, architecture=architecture, conversion=conversion, places=places, records=records,
        apart=apart, tokenizer=tokenizer, dtype=dtype, context=context, chunk=chunk, kv=kv_format,
        plain=tuple(plain), cache=cache, budget=budget, draft=replace(choice, sibling=sibling),
    )  # fmt: skip


def _plain_layers(meta: PreTrainedModel) -> dict[int, Heads]:
    try:
        return plain_layers(meta)
    except Exception:  # whatever code of a family does not run without numbers
        log.debug("a token does not pass this model without its weights", exc_info=True)
        return {}


def _tell(how: KVFormat, plain: int, layers: int) -> None:
    """Say how many layers keep keys and values in the way that was asked for."""
    if not plain:
        log.warning("no layer of this model keeps keys and values of all tokens alone: --kv %s changes nothing", how)
    elif plain < layers:
        log.info("keys and values: %s in %d of %d layers; the others keep what they keep", how, plain, layers)


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """Return the number format that most of a checkpoint's numbers have."""
    counts: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if (dtype := TORCH_DTYPES.get(info.dtype)) is not None:
            counts[dtype] = counts.get(dtype, 0) + info.num_elements
    return max(counts, key=lambda dtype: counts[dtype], default=torch.bfloat16)


def _records(checkpoint: Checkpoint, places: Sequence[LayerPlaces]) -> dict[Key, Record]:
    """Return where the bytes of every expert lie."""
    return {
        (each.layer.index, expert): Record(
            pieces=tuple(
                Piece(file=checkpoint.path / info.shard, begin=info.begin, num_bytes=info.num_bytes)
                for tensor in tensors
                for info in tensor.stored()
            )
        )
        for each in places
        for expert, tensors in enumerate(each.experts)
    }
