"""Likelihood: how well a model predicts the next token of a text.

Legend: B sequences of a batch, S tokens of a sequence, V vocabulary, T = B (S - 1) predicted tokens in row order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: Elements of the largest float32 temporary that likelihoods and divergences are computed in (8 MiB: on a CPU the many
#: passes over it then mostly stay in its cache).
CHUNK_ELEMENTS = 2**21

#: Elements of the logits of one model that exist at a time (64 MiB in float32). A head may need a few copies of them
#: (number formats, soft caps), and the base has its own.
BATCH_ELEMENTS = 2**24


def logits_of(model: Any, ids_BS: Tensor) -> Tensor:
    """Run a model over whole sequences and return its logits (B, S, V), in the model's dtype and on its device."""
    with torch.no_grad():
        logits_BSV: Tensor = model(input_ids=ids_BS.to(model.device), use_cache=False).logits
    return logits_BSV


def position_slices(
    num_positions: int, batch_size: int, vocab_size: int, *, elements: int | None = None
) -> Iterator[slice]:
    """Yield slices that cover so many positions of a batch, the logits of each within `elements` (`BATCH_ELEMENTS`).

    With one more position, which a caller may need for the last prediction, they still are.
    """
    limit = BATCH_ELEMENTS if elements is None else elements
    step = max(1, limit // (batch_size * vocab_size) - 1)
    for start in range(0, num_positions, step):
        yield slice(start, min(start + step, num_positions))


def token_nll(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Return the negative log-likelihood of every token but the first of each sequence, in nats.

    Args:
        logits_BSV: what the model said at every position; position s predicts token s + 1.
        ids_BS: the sequences that it read.

    Returns:
        (T,), float32 (float64 for float64 logits), from the full softmax in that precision.
    """
    ids_BS = ids_BS.to(logits_BSV.device)
    parts = []
    for logits_SV, ids_S in zip(logits_BSV, ids_BS, strict=True):
        for rows in row_slices(len(ids_S) - 1, logits_SV.shape[-1]):
            logits_TV, next_T = widened(logits_SV[:-1][rows]), ids_S[1:][rows]
            parts.append(functional.cross_entropy(logits_TV, next_T, reduction="none"))
    return torch.cat(parts)


def counted(values_T: Tensor, counts_BS: Tensor | None, positions: slice) -> Tensor:
    """Return the values of those predicted tokens that count.

    Args:
        values_T: of every token but the first at some positions of each sequence, as `token_nll` gives them.
        counts_BS: which tokens of whole sequences count, bool; None for all.
        positions: which positions.
    """
    return values_T if counts_BS is None else values_T[counts_BS[:, positions][:, 1:].flatten().to(values_T.device)]


def counted_lengths(ids_BP: Tensor, counts_BS: Tensor | None, positions: slice) -> list[int]:
    """Return how many values of each sequence are among those that `counted` returns.

    Args:
        ids_BP: the tokens at these positions, of which the first is not predicted.
        counts_BS: which tokens of whole sequences count, bool; None for all.
        positions: which positions.
    """
    if counts_BS is None:
        return [ids_BP.shape[1] - 1] * len(ids_BP)
    return [int(count) for count in counts_BS[:, positions][:, 1:].sum(dim=1)]


def perplexity(nll: float, tokens: int) -> float:
    """Return ``exp(nll / tokens)`` for a sum of negative log-likelihoods; infinite where that exceeds a float."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def row_slices(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Yield slices that cover `num_rows` rows in pieces of at most `CHUNK_ELEMENTS` elements, one row at least."""
    step = max(1, CHUNK_ELEMENTS // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def widened(logits: Tensor) -> Tensor:
    """Return the logits in float32, or as they are when wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_kl(base_TV: Tensor, logits_TV: Tensor) -> Tensor:
    """Return KL(base || model) in nats (T,), at least 0, of logits of both; in float32 or wider."""
    return kl_of(widened(base_TV).log_softmax(-1), widened(logits_TV).log_softmax(-1), masked=True)


def kl_of(log_p_TV: Tensor, log_q_TV: Tensor, *, masked: bool) -> Tensor:
    """Return KL(p || q) in nats (T,), at least 0.

    Args:
        log_p_TV: logarithms of p.
        log_q_TV: those of q.
        masked: whether any of p may be 0.
    """
    p_TV = log_p_TV.exp()
    difference_TV = log_p_TV - log_q_TV
    if masked:
        # A token that the base masks out (log p = -inf) adds nothing, whatever the model says of it.
        difference_TV.masked_fill_(p_TV == 0, 0)
    # Rounding can push the sum a hair below zero where the two are nearly equal.
    return p_TV.mul_(difference_TV).sum(-1).clamp_min(0)
