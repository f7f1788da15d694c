"""What training a result takes, said before it begins: operations, and seconds at this machine's speed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from coterie.model.arch.layers import MoELayer
from coterie.model.stream.work import speed_of
from coterie.train.distill import EPOCHS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """What training takes.

    Attributes:
        tokens: tokens that the result is trained on.
        operations: floating-point operations, the original's predictions included.
        seconds: about how long that is.
        training_seconds: about how long training alone is.
    """

    tokens: int
    operations: float
    seconds: float
    training_seconds: float

    def __str__(self) -> str:
        minutes = max(1, round(self.seconds / 60))
        return (
            f"training the result on {self.tokens:,} tokens, and the original's predictions of them, are "
            f"{self.operations:.1e} operations: some {minutes:,} minute{'s' if minutes > 1 else ''} here"
        )


def training_cost(
    original: PreTrainedModel,
    result: PreTrainedModel,
    layers: Sequence[MoELayer],
    *,
    tokens: int,
    top_k: int,
    device: torch.device,
) -> TrainingCost:
    """Estimate what training takes; meta models will do.

    A weight takes two operations a token forward, and four more backward. Of the experts only the chosen ones count.

    Args:
        original: whose predictions are the target.
        result: what is trained.
        layers: MoE layers of the original; the result's have the same names.
        tokens: tokens to train on.
        top_k: experts that a token chooses in the result.
        device: where.
    """
    before = active_weights(original, layers, [layer.top_k for layer in layers])
    after = active_weights(result, layers, [top_k] * len(layers))
    operations, speed = float(tokens) * (2 * before + 6 * after), speed_of(device.type)
    return TrainingCost(
        tokens=tokens, operations=operations, seconds=operations / speed, training_seconds=6.0 * tokens * after / speed
    )


def say_cost(
    original: PreTrainedModel,
    result: PreTrainedModel,
    layers: Sequence[MoELayer],
    *,
    text_tokens: int,
    tokens: int,
    top_k: int,
    device: torch.device,
) -> TrainingCost:
    """Log what training takes on `tokens`, or on as many as the text has when it is seen `EPOCHS` times.

    Args:
        original: see `training_cost`, as for the others.
        result: what is trained.
        layers: MoE layers.
        text_tokens: tokens of text that there are.
        tokens: tokens that were asked for.
        top_k: experts that a token chooses in the result.
        device: where.

    Returns:
        What it takes, on as many tokens as it is trained on.
    """
    tokens = min(tokens, EPOCHS * text_tokens)
    cost = training_cost(original, result, layers, tokens=tokens, top_k=top_k, device=device)
    log.info("cost: %s", cost)
    return cost


def active_weights(model: PreTrainedModel, layers: Sequence[MoELayer], top_k: Sequence[int]) -> float:
    """Return how many weights a token is multiplied with: embeddings are looked up, and experts chosen."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None:  # may be the same tensor as the embedding, and is a product then
        looked_up.discard(id(head.weight))
    share = {f"{layer.experts}.": chosen for layer, chosen in zip(layers, top_k, strict=True)}
    total = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in looked_up:
            continue
        chosen = next((count for prefix, count in share.items() if name.startswith(prefix)), None)
        total += parameter.numel() * (1.0 if chosen is None else min(1.0, chosen / parameter.shape[0]))
    return total
