"""What is known of a run before anything is loaded: the model by its headers, its experts' places, and the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from coterie.amounts import parse_bytes
from coterie.errors import InputError, UnknownName
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import checkpoint_meta_model
from coterie.model.arch.resize import resized_config
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.filled import filled_up
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.disk.quantized import dequantized
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.run.budget import RunBudget
from coterie.run.draft_choice import DraftChoice
from coterie.run.places import LayerPlaces, find_places
from coterie.run.policies import POLICIES, shape_of
from coterie.run.records import Key, Piece, Record, slot_bytes
from coterie.run.resident import resident_size
from coterie.run.sizes import buffer_bytes, cache_bytes

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
    budget: RunBudget
    draft: DraftChoice


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
    limit, choice = parse_bytes(memory), DraftChoice.parse(draft)
    stored = Checkpoint.open(model)
    manifest = Manifest.read(stored.path)
    # In full precision, whatever it is stored in, its experts in one width.
    checkpoint = filled_up(dequantized(stored), None if manifest is None else manifest.ragged)
    architecture = Architecture.of(checkpoint)
    if manifest is not None and manifest.form is ResultForm.MAPPED:  # its config counts the router's rows
        fewer = resized_config(architecture, manifest.layers[0].num_experts_after)
        architecture = Architecture.from_config(fewer, where=str(checkpoint.path))
    conversion = WeightConversion(checkpoint, checkpoint_meta_model(checkpoint, dtype=torch.float32))
    places = find_places(checkpoint, architecture, conversion)
    records = _records(checkpoint, places)
    apart = frozenset(tensor.info.name for each in places for expert in each.experts for tensor in expert)
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
    budget = RunBudget(
        limit=limit,
        program=psutil.Process().memory_info().rss,
        resident=size.num_bytes,
        reading=max(size.largest, 0 if sibling is None else sibling.reading),
        cache=batch * cache_bytes(checkpoint, meta, context),
        buffers=buffers + POLICIES[policy].num_bytes(shape_of(records)),
        slot=slot_bytes(records.values()),
        least=min(max(layer.top_k for layer in architecture.layers), most_experts or len(records)),
        most=len(records) if most_experts is None else min(len(records), most_experts),
        sequences=batch,
        draft=0 if sibling is None else sibling.num_bytes,
    )
    return Prepared(
        checkpoint=checkpoint, architecture=architecture, conversion=conversion, places=places, records=records,
        apart=apart, tokenizer=tokenizer, dtype=dtype, context=context, chunk=chunk, budget=budget,
        draft=replace(choice, sibling=sibling),
    )  # fmt: skip


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
