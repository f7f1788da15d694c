"""Divergence: how far what a model predicts is from what the base model predicts.

Legend: B sequences of a batch, S tokens of a sequence, V vocabulary, T = B (S - 1) predicted tokens in row order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.errors import InputError
from coterie.model.stream.likelihood import kl_of, row_slices, token_kl, widened


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
            divergences.append(token_kl(base_TV, logits_TV))
            agreements.append(base_TV.argmax(-1) == logits_TV.argmax(-1))
    return torch.cat(divergences), torch.cat(agreements)


def compare(
    log_p_BTV: Tensor, likeliest_BT: Tensor, logits_BSV: Tensor, ids_BS: Tensor, *, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare a model's predictions with a base's that are there already; `token_nll` and `token_divergence` in one.

    Args:
        log_p_BTV: the base's log-probabilities at every position but the last of each sequence, T = S - 1.
        likeliest_BT: the base's likeliest tokens there.
        logits_BSV: logits of the model on the same text.
        ids_BS: the text.
        masked: whether any of the log-probabilities may be -inf.

    Returns:
        Negative log-likelihood, that of the base, KL(base || model), all in nats, and whether both have the same
        likeliest token; each (B T,).
    """
    if log_p_BTV.shape[-1] != logits_BSV.shape[-1]:
        raise InputError(
            f"the base scores {log_p_BTV.shape[-1]} tokens, the model {logits_BSV.shape[-1]}; "
            "only models with the same vocabulary can be compared"
        )
    nll, base_nll, divergences, agreements = [], [], [], []
    for log_p_TV, likeliest_T, logits_SV, ids_S in zip(log_p_BTV, likeliest_BT, logits_BSV, ids_BS, strict=True):
        for rows in row_slices(len(ids_S) - 1, logits_SV.shape[-1]):
            part_TV = logits_SV[:-1][rows]
            log_q_TV = widened(part_TV).log_softmax(-1)
            next_T1 = ids_S[1:][rows, None]
            nll.append(-log_q_TV.gather(-1, next_T1.to(log_q_TV.device))[:, 0])
            base_nll.append(-log_p_TV[rows].gather(-1, next_T1.to(log_p_TV.device))[:, 0])
            agreements.append(part_TV.argmax(-1) == likeliest_T[rows].to(part_TV.device))
            divergences.append(kl_of(log_p_TV[rows].to(log_q_TV.device), log_q_TV, masked=masked))
    return torch.cat(nll), torch.cat(base_nll), torch.cat(divergences), torch.cat(agreements)
