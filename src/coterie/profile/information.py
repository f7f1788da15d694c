"""Information: what a source of calibration text is to a model, in numbers, before anything is measured on it.

After IGSP [arXiv 2606.03328], whose finding is that no single source keeps all abilities of a model: the perplexity of
calibration text decides which ones it keeps, and repeated n-grams waste it.

Legend: N sequences, S tokens of a sequence, B sequences of a batch, P positions of a part.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.errors import InputError, TextError
from coterie.model.stream.likelihood import BATCH_ELEMENTS, counted, perplexity, token_nll
from coterie.model.stream.memory import (
    LOGITS,
    Forecast,
    Stage,
    batch_lines,
    fitting_batch,
    head_lines,
    text_lines,
    unit_lines,
)
from coterie.model.stream.reading import logits_at, predictions, read
from coterie.model.stream.stream import Stream
from coterie.profile.calibration import TokenSet
from coterie.progress import track

#: Length of the n-grams whose aggregation is measured.
NGRAM = 4

#: Copies of the logits of a slice of positions: number formats, soft caps, and the softmax.
LOGITS_COPIES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Information:
    """What is known of one source (a domain) of text.

    N-grams lie within a sequence, and start tokens are not counted; where only answers count, n-grams and tokens are
    those that lie in answers. `aggregation`, `diversity` and `entropy` depend on
    the amount of text, so sources that are to be compared are counted on equally many tokens.

    Attributes:
        domain: its name.
        tokens: tokens that the loss was measured on.
        loss: mean negative log-likelihood of a token under the model, in nats.
        aggregation: share of all 4-grams that occurred before; 0 where no 4-gram comes twice.
        diversity: different pairs of neighbouring tokens, as a share of all pairs.
        entropy: entropy of the distribution of tokens, in nats.
    """

    domain: str
    tokens: int
    loss: float
    aggregation: float
    diversity: float
    entropy: float

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that exceeds a float."""
        return perplexity(self.loss, 1)

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold; a perplexity beyond all floats is None."""
        return asdict(self) | {"perplexity": self.perplexity if math.isfinite(self.perplexity) else None}


def measure_information(stream: Stream, token_set: TokenSet, *, batch_size: int = 8) -> tuple[Information, ...]:
    """Measure every source of a token set under a model, one of the model's units in memory at a time.

    Args:
        stream: the model, open.
        token_set: one domain a source; the counts use as many sequences of each as the smallest one has.
        batch_size: sequences in a batch at most.

    Raises:
        TextError: sequences shorter than a 4-gram.
        InputError: the model's predictions are not numbers.
    """
    least = NGRAM + token_set.num_start
    if token_set.seq_len < least:
        raise TextError(
            f"sequences of {token_set.seq_len} tokens hold no {NGRAM}-grams; use --seq-len {least} or more, such as 512"
        )
    losses = _mean_losses(stream, token_set, batch_size)
    least_counted = min(token_set.num_counted.values())
    # Where only answers count, `_least_counts` takes equally many tokens of all sequences.
    common = None if token_set.counts is not None else min(map(len, token_set.sequences.values()))
    sources = []
    for domain, ids_NS in token_set.sequences.items():
        rows_NS = ids_NS[:common, token_set.num_start :]
        counts_NS = _least_counts(token_set, domain, least_counted)
        sources.append(
            Information(
                domain=domain,
                tokens=token_set.num_counted[domain],
                loss=losses[domain],
                aggregation=1 - distinct_share(rows_NS, NGRAM, counts_NS),
                diversity=distinct_share(rows_NS, 2, counts_NS),
                entropy=token_entropy(rows_NS if counts_NS is None else rows_NS[counts_NS]),
            )
        )
    return tuple(sources)


def forecast(stream: Stream, token_set: TokenSet, *, batch_size: int) -> Forecast:
    """Say how much memory `measure_information` takes at most."""
    total, seq_len = sum(token_set.num_tokens.values()), token_set.seq_len
    size = _fitting(stream, token_set, batch_size)
    vocab_size = int(stream.model.config.get_text_config().vocab_size)
    batch = batch_lines(stream, (), batch_size=size, seq_len=seq_len, tokens=total)
    logits = 4 * LOGITS_COPIES * min(size * seq_len * vocab_size, BATCH_ELEMENTS)
    counting = ("n-grams", 8 * 8 * max(ids_NS.numel() for ids_NS in token_set.sequences.values()))
    text = text_lines(total)
    return Forecast(
        stages=(
            Stage(name="reading a layer", lines=(*unit_lines(stream, batch), *text)),
            Stage(name="judging predictions", lines=(*head_lines(stream), (LOGITS, logits), *text)),
            Stage(name="counting", lines=(counting, *text)),
        )
    )


def distinct_share(ids_NS: Tensor, length: int, counts_NS: Tensor | None = None) -> float:
    """Return how many different n-grams there are, as a share of all n-grams within sequences; 1 where there are none.

    Args:
        ids_NS: token ids.
        length: n.
        counts_NS: which tokens count, bool; an n-gram does where all of its tokens do. None for all.
    """
    num_places = ids_NS.shape[1] - length + 1
    if num_places < 1 or not len(ids_NS):
        return 1.0
    values = int(ids_NS.max()) + 1
    number_T = torch.zeros(ids_NS[:, :num_places].numel(), dtype=torch.int64)
    # One token after another: numbers of the n-grams so far, as small as possible, so that nothing overflows.
    for offset in range(length):
        key_T = number_T * values + ids_NS[:, offset : offset + num_places].flatten()
        number_T = torch.unique(key_T, return_inverse=True)[1]
    if counts_NS is not None:
        inside_NP = torch.stack([counts_NS[:, offset : offset + num_places] for offset in range(length)]).all(0)
        number_T = torch.unique(number_T[inside_NP.flatten()], return_inverse=True)[1]
        if not len(number_T):
            return 1.0
    return (int(number_T.max()) + 1) / len(number_T)


def token_entropy(ids_NS: Tensor) -> float:
    """Return the entropy of the distribution of tokens, in nats."""
    counts = torch.unique(ids_NS, return_counts=True)[1].double()
    shares = counts / counts.sum()
    return max(0.0, -float((shares * shares.log()).sum()))


def _least_counts(token_set: TokenSet, domain: str, least: int) -> Tensor | None:
    """Return the first `least` tokens that count in a domain (N, S), bool, without start tokens; None where all do."""
    if token_set.counts is None:
        return None
    counts_NS = token_set.counts[domain]
    first_NS = counts_NS.flatten().cumsum(0).view(counts_NS.shape) <= least
    return (counts_NS & first_NS)[:, token_set.num_start :]


def _mean_losses(stream: Stream, token_set: TokenSet, batch_size: int) -> dict[str, float]:
    """Return the mean loss by domain, in nats; what the last layer returned is kept in files, not in memory."""
    size = _fitting(stream, token_set, batch_size)
    batches = list(token_set.batches(size))
    outputs = read(stream, [ids_BS for _, ids_BS in batches], description="reading")
    sums = dict.fromkeys(token_set.domains, 0.0)
    vocab_size = int(stream.model.config.get_text_config().vocab_size)
    with stream.head() as head:
        rows = zip(batches, outputs, token_set.batch_counts(size), strict=True)
        for (domain, ids_BS), output, counts_BS in track(rows, "perplexity", total=len(batches)):
            name = token_set.domains[domain]
            for positions, ids_BP in predictions(ids_BS, vocab_size):
                nll_T = token_nll(logits_at(head, ids_BS, output, positions), ids_BP)
                sums[name] += float(counted(nll_T, counts_BS, positions).double().sum())
            stream.release()
    losses = {name: sums[name] / _num_predicted(token_set, name) for name in token_set.domains}
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise InputError(
                f"{stream.checkpoint.path} predicts no numbers for the domain {name} in "
                f"{str(stream.dtype).removeprefix('torch.')}; its weights are damaged, or it needs a number format "
                "with more range"
            )
    return losses


def _fitting(stream: Stream, token_set: TokenSet, batch_size: int) -> int:
    embedding: Any = stream.model.get_input_embeddings()
    return fitting_batch(batch_size, seq_len=token_set.seq_len, hidden_size=int(embedding.weight.shape[-1]))


def _num_predicted(token_set: TokenSet, domain: str) -> int:
    """Return how many tokens of a domain are predicted and count."""
    if token_set.counts is not None:
        return int(token_set.counts[domain][:, 1:].sum())
    count, length = token_set.sequences[domain].shape
    return count * (length - 1)
