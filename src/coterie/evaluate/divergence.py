"""Divergence: how far what a model predicts is from what the base model predicts.

Legend: B sequences of a batch, S tokens of a sequence, V vocabulary, T = B (S - 1) predicted tokens in row order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.errors import InputError
from coterie.evaluate.likelihood import row_slices, widened


def token_divergence(base_BSV: Tensor, logits_BSV: Tensor) -> tuple[Tensor, Tensor]:
    """Compare two models' predictions of every token but the first of each sequence.

    The same positions count as in `token_nll`: what is said after a sequence's last token is not compared. Nothing is
    truncated to the likeliest tokens; the sum goes over the whole vocabulary, in float32 or wider.

    Args:
        base_BSV: logits of the base.
        logits_BSV: logits of the model, on the same text.

    Returns:
        KL(base || model) in nats (T,), at least 0, and whether both have the same likeliest token (T,), bool.

    Raises:
        InputError: the two have logits of different shapes, such as another vocabulary.
    """
    if base_BSV.shape != logits_BSV.shape:
        raise InputError(
            f"the base gives logits of shape {tuple(base_BSV.shape)}, the model {tuple(logits_BSV.shape)}; "
            "only models with the same vocabulary can be compared"
        )
    divergences, agreements = [], []
    for base_SV, logits_SV in zip(base_BSV, logits_BSV, strict=True):
        for rows in row_slices(len(base_SV) - 1, base_SV.shape[-1]):
            base_TV, logits_TV = base_SV[:-1][rows], logits_SV[:-1][rows].to(base_SV.device)
            divergences.append(_kl(base_TV, logits_TV))
            agreements.append(base_TV.argmax(-1) == logits_TV.argmax(-1))
    return torch.cat(divergences), torch.cat(agreements)


def _kl(base_TV: Tensor, logits_TV: Tensor) -> Tensor:
    log_p_TV, log_q_TV = widened(base_TV).log_softmax(-1), widened(logits_TV).log_softmax(-1)
    p_TV = log_p_TV.exp()
    # A token that the base masks out (log p = -inf) adds nothing, whatever the model says of it.
    difference_TV = (log_p_TV - log_q_TV).masked_fill(p_TV == 0, 0)
    # Rounding can push the sum a hair below zero where the two are nearly equal.
    return (p_TV * difference_TV).sum(-1).clamp_min(0)
