"""How much memory distilling a result takes, said before it begins.

The result is in memory as a whole, in float32 or, where its matrices are stored in blocks, as those. It does not matter
how much text there is: predictions are read for the sequences of a step alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from coterie.amounts import format_bytes
from coterie.model.arch.layers import MoELayer
from coterie.model.stream.loss import logits_bytes
from coterie.model.stream.memory import LOGITS, Stage, batch_lines, head_lines, text_lines, unit_lines
from coterie.model.stream.stream import Stream
from coterie.model.threads import workers_on
from coterie.profile.calibration import TokenSet
from coterie.train.blocks import NUMBERS_AT_ONCE
from coterie.train.distill import KEPT, MICRO, SEQUENCES
from coterie.train.model import trainable

#: What lines of the forecast are about, as they are named there.
MOMENTS, BEST = "moments of the gradients", "the best weights"

#: Numbers of the model's width that a token leaves behind in a layer for its gradients.
_ACTIVATIONS = 24

#: Copies of a layer's tensors while their gradients are put together from those of each expert, gate and up apart.
_LAYER = 4

#: Bytes that each number passes through while it is unpacked: its code as a whole number of eight, values, products.
UNPACKING_BYTES = 64

#: Copies of the logits of a token: they, their softmax, and the gradients of both and of the chosen ones.
_LOGITS = 5


def training_bytes(
    model: PreTrainedModel, layers: Sequence[MoELayer], *, seq_len: int, workers: int
) -> tuple[tuple[str, int], ...]:
    """Say what the memory of training consists of at most.

    Args:
        model: the result; a meta model will do.
        layers: its MoE layers, or those of the original, which have the same names.
        seq_len: S, tokens of a sequence.
        workers: threads that share out a step.

    Returns:
        What, and its bytes, line by line.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    sizes = [sum(parameter.numel() for parameter in trainable(model, [layer]).values()) for layer in layers]
    micro_batches = math.ceil(SEQUENCES / MICRO)
    at_once = min(workers, micro_batches)
    # One thread adds the gradients of a micro-batch to those of all before; of several, those that end early wait.
    sets = min(micro_batches, 2) if at_once == 1 else micro_batches
    computing = sets * sum(sizes) + at_once * _LAYER * max(sizes, default=0)
    adding = (sets + 1) * sum(sizes) if at_once > 1 else 0
    return (
        ("weights", 4 * weights),
        (MOMENTS, 2 * 4 * sum(sizes)),
        ("gradients", 4 * max(computing, adding)),
        *_batch_lines(model, tokens=at_once * MICRO * seq_len),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSizes:
    """How large a result in blocks is, and what is trained of it.

    Attributes:
        stored_bytes: bytes of all matrices in blocks.
        plain: numbers of all other parameters.
        trained_plain: those of them that are trained.
        scales: float16 numbers of all blocks, each of which has a multiplier that is trained.
        outer: numbers of matrices in blocks that are no experts'.
        largest_outer: those of the largest of them.
        largest_layer: those of the experts of a layer.
        largest_file: numbers of the largest weight file.
    """

    stored_bytes: int
    plain: int
    trained_plain: int
    scales: int
    outer: int
    largest_outer: int
    largest_layer: int
    largest_file: int


def block_training_bytes(
    sizes: BlockSizes, model: PreTrainedModel, *, seq_len: int, workers: int
) -> tuple[tuple[str, int], ...]:
    """Say what the memory of training a result in blocks consists of at most, see `coterie.train.blocks`.

    Args:
        sizes: how large it is.
        model: the result; a meta model will do.
        seq_len: S, tokens of a sequence.
        workers: threads that share out a step.

    Returns:
        What, and its bytes, line by line.
    """
    micro_batches = math.ceil(SEQUENCES / MICRO)
    at_once = min(workers, micro_batches)
    trained = sizes.scales + sizes.trained_plain
    sets = min(micro_batches, 2) if at_once == 1 else micro_batches
    # Those of a layer's experts exist while it is computed; the others from the way forward until the way back is past.
    unpacked = at_once * (sizes.outer + max(_LAYER * sizes.largest_layer, 3 * sizes.largest_outer))
    return (
        ("weights", sizes.stored_bytes + 4 * (sizes.plain + sizes.scales)),
        (MOMENTS, 2 * 4 * trained),
        ("gradients", 4 * (sets + 1) * trained),
        (BEST, 4 * trained),
        ("unpacked matrices", 4 * unpacked + at_once * UNPACKING_BYTES * NUMBERS_AT_ONCE),
        *_batch_lines(model, tokens=at_once * MICRO * seq_len),
    )


def block_training_stages(
    sizes: BlockSizes, model: PreTrainedModel, *, seq_len: int, device: torch.device
) -> tuple[Stage, Stage]:
    """Say how much memory it takes at most to read a result in blocks, and to train it, see `block_training_bytes`."""
    workers = workers_on(device)
    lines = block_training_bytes(sizes, model, seq_len=seq_len, workers=workers)
    # What is read of a file is unpacked to be told apart: its plain numbers, and twice while they are converted.
    reading = (lines[0], ("a file, unpacked and converted", 4 * 3 * sizes.largest_file))
    return (
        Stage(name="reading the result to train it", lines=reading, device=device),
        Stage(name="training the result as a whole", lines=lines, device=device),
    )


def _batch_lines(model: PreTrainedModel, *, tokens: int) -> tuple[tuple[str, int], ...]:
    """Return what the tokens take that are computed at once."""
    config: Any = model.config.get_text_config()
    return (
        ("activations", 4 * _ACTIVATIONS * tokens * int(config.hidden_size) * int(config.num_hidden_layers)),
        ("logits", 4 * _LOGITS * tokens * int(config.vocab_size)),
        # Tokens as int32 and int64, log-probabilities of both models, probabilities, and gradients.
        ("predictions of a step", 8 * 4 * tokens * min(KEPT, int(config.vocab_size))),
    )


def training_stage(model: PreTrainedModel, layers: Sequence[MoELayer], *, seq_len: int, device: torch.device) -> Stage:
    """Say how much memory training takes at most on a device, see `training_bytes`."""
    workers = workers_on(device)
    lines = training_bytes(model, layers, seq_len=seq_len, workers=workers)
    return Stage(name="training the result as a whole", lines=lines, device=device)


def predicting_stages(
    stream: Stream, layers: Sequence[MoELayer], token_set: TokenSet, *, batch_size: int
) -> tuple[Stage, ...]:
    """Say how much memory the original's predictions of a text take at most."""
    vocab_size = int(stream.model.config.get_text_config().vocab_size)
    total, seq_len = sum(token_set.num_tokens.values()), token_set.seq_len
    logits = logits_bytes(batch_size=batch_size, seq_len=seq_len, vocab_size=vocab_size)
    batch = batch_lines(stream, layers, batch_size=batch_size, seq_len=seq_len, tokens=total)
    text = text_lines(2 * total)  # and its sequences one after another
    return (
        Stage(name="reading text to train on", lines=(*unit_lines(stream, batch), *text)),
        Stage(name="the original's predictions", lines=(*head_lines(stream), (LOGITS, logits), *text)),
    )


def too_large(stage: Stage, *, limit: int | None) -> str | None:
    """Say why a result cannot be trained in the memory that is allowed or, without a limit, free; None where it can.

    The reason is the same at any other moment at which the answer is the same: it does not say how much was free.

    Args:
        stage: see `training_stage`.
        limit: bytes that may be used, or None.
    """
    allowed = stage.allowed(limit)
    if allowed is None or stage.num_bytes <= allowed:
        return None
    bound = "was free" if limit is None else "--max-memory allowed"
    return f"{stage.name} takes at most {format_bytes(stage.num_bytes)} of memory, more than {bound}"
