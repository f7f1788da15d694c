"""A smaller model with the same tokenizer that guesses for another: all of it in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie.errors import InputError, NotAMoE
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.experts import canonical_experts, is_experts
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import checkpoint_meta_model
from coterie.model.arch.seam import install, routed_output
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.filled import filled_up
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.disk.quantized import dequantized
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.run.resident import load_resident, resident_size
from coterie.run.sizes import buffer_bytes, cache_size


@dataclass(frozen=True, kw_only=True)
class PreparedSibling:
    """A model that can be loaded.

    Attributes:
        checkpoint: it, as a view in full precision.
        conversion: between its names on disk and in memory.
        dtype: number format in memory.
        num_bytes: bytes of its weights, and of its keys and values of a whole context.
        reading: bytes on top while it is read.
        buffers: bytes of what a chunk of the prompt has in memory while it passes.
    """

    checkpoint: Checkpoint
    conversion: WeightConversion
    dtype: torch.dtype
    num_bytes: int
    reading: int
    buffers: int

    def load(self) -> PreTrainedModel:
        """Return it, in memory; it computes one expert at a time, and copies none."""
        model = load_resident(self.checkpoint, self.conversion, self.dtype, frozenset())
        if any(is_experts(module) for module in model.modules()):
            install(model, _compute)
        return model


def prepare_sibling(
    model: str | Path, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, context: int, chunk: int
) -> PreparedSibling:
    """Look at a model that is to guess.

    Args:
        model: a model folder, a GGUF file, a hub id, or a result of Coterie with experts of its own.
        tokenizer: of the model that it guesses for.
        dtype: number format in memory.
        context: tokens of a text at most.
        chunk: tokens of a prompt that pass it at once.

    Raises:
        InputError: its tokens are others, or its router names experts that it does not have.
        NotACheckpoint, CorruptCheckpoint, ArchitectureMismatch: it is not usable.
    """
    stored = Checkpoint.open(model)
    manifest = Manifest.read(stored.path)
    if manifest is not None and manifest.form is ResultForm.MAPPED:
        raise InputError(f"--draft {model} has a router that names other experts (--router map); give another result")
    checkpoint = filled_up(dequantized(stored), None if manifest is None else manifest.ragged)
    if load_tokenizer(checkpoint.path).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--draft {model} has other tokens than the model that it is to guess for")
    conversion = WeightConversion(checkpoint, checkpoint_meta_model(checkpoint, dtype=torch.float32))
    meta: Any = checkpoint_meta_model(checkpoint, dtype=dtype)
    size = resident_size(checkpoint, conversion, meta, frozenset())
    try:
        layers = Architecture.of(checkpoint).layers
    except NotAMoE:
        layers = ()
    return PreparedSibling(
        checkpoint=checkpoint, conversion=conversion, dtype=dtype, reading=size.largest,
        num_bytes=size.num_bytes + cache_size(checkpoint, meta).planned(context, chunk),
        buffers=buffer_bytes(meta, layers, chunk=chunk, context=context),
    )  # fmt: skip


def _compute(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return routed_output(canonical_experts(module), hidden_TD, index_TK, weight_TK)
