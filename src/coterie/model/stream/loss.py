"""The loss of a text and its gradient at the last hidden states, without logits of the whole text.

What a head says about one position depends on the hidden state there alone. So head and loss are taken in slices of
positions, each of which is gone before the next is computed.

Legend: B sequences of a batch, S tokens of a sequence, P positions of a slice, D model width, V vocabulary, T rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coterie.model.stream.likelihood import position_slices, row_slices, widened

#: Elements of the logits of a slice (128 MiB in float32).
LOSS_ELEMENTS = 2**25

#: Stands for a token whose loss does not count.
_NO_LABEL = -100

#: Copies of them that exist at a time: the logits, their gradient, and one that a head may make on its way.
LOGITS_COPIES = 3


def loss_and_gradient(
    head: Callable[[Tensor, Any], Tensor],
    ids_BS: Tensor,
    output: Any,
    *,
    vocab_size: int,
    counts_BS: Tensor | None = None,
) -> tuple[float, Tensor]:
    """Return the summed next-token loss of a batch, and its gradient.

    Args:
        head: gives logits (B, P, V) with a graph from token ids and what the base model returned, see `Stream.head`.
        ids_BS: the batch.
        output: what the base model returned for it.
        vocab_size: V.
        counts_BS: the loss of which tokens counts, bool; None for all.

    Returns:
        Nats; and the gradient with respect to the last hidden states, (B, S, D).
    """
    hidden_BSD = output.last_hidden_state
    labels_BS = ids_BS if counts_BS is None else ids_BS.masked_fill(~counts_BS, _NO_LABEL)
    gradient_BSD, total = None, 0.0
    for piece in position_slices(ids_BS.shape[1] - 1, len(ids_BS), vocab_size, elements=LOSS_ELEMENTS):
        # The last position of a slice is the first of the next: what is said there does not count here.
        here = slice(piece.start, piece.stop + 1)
        hidden_BPD = hidden_BSD[:, here].detach().requires_grad_()
        with torch.enable_grad():
            logits_BPV = head(ids_BS[:, here], type(output)(last_hidden_state=hidden_BPD))
        loss, gradient_BPV = _at_logits(logits_BPV.detach(), labels_BS[:, here])
        gradient_BPD = torch.autograd.grad(logits_BPV, hidden_BPD, gradient_BPV)[0]
        del logits_BPV, gradient_BPV
        total += loss
        if gradient_BPD.shape == hidden_BSD.shape:
            return total, gradient_BPD
        if gradient_BSD is None:
            gradient_BSD = torch.zeros_like(hidden_BSD)
        gradient_BSD[:, here] += gradient_BPD
    assert gradient_BSD is not None, "one token predicts nothing"
    return total, gradient_BSD


def logits_bytes(*, batch_size: int, seq_len: int, vocab_size: int) -> int:
    """Return the bytes that logits and their gradients take at most, in float32."""
    return 4 * LOGITS_COPIES * min(batch_size * seq_len * vocab_size, max(LOSS_ELEMENTS, 2 * batch_size * vocab_size))


def _at_logits(logits_BPV: Tensor, labels_BP: Tensor) -> tuple[float, Tensor]:
    """Return the summed loss of all tokens but the first of each row, and its gradient at the logits (B, P, V)."""
    labels_BP = labels_BP.to(logits_BPV.device)
    gradient_BPV = torch.zeros_like(logits_BPV)
    total = 0.0
    for logits_PV, gradient_PV, labels_P in zip(logits_BPV, gradient_BPV, labels_BP, strict=True):
        for rows in row_slices(len(labels_P) - 1, logits_PV.shape[-1]):
            with torch.enable_grad():
                logits_TV = widened(logits_PV[:-1][rows]).detach().requires_grad_()
                loss = functional.cross_entropy(logits_TV, labels_P[1:][rows], ignore_index=_NO_LABEL, reduction="sum")
            gradient_PV[:-1][rows] = torch.autograd.grad(loss, logits_TV)[0]
            total += float(loss.detach())
    return total, gradient_BPV
