"""Information: what a source of calibration text is to a model, in numbers, before anything is measured on it.

After IGSP [arXiv 2606.03328], whose finding is that no single source keeps all abilities of a model: the perplexity of
calibration text decides which ones it keeps, and repeated n-grams waste it.

Legend: N sequences, S tokens of a sequence, B sequences of a batch, P positions of a part, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coterie.errors import InputError, TextError
from coterie.model.memory import fitting_batch
from coterie.model.stream import Stream
from coterie.profile.calibration import TokenSet
from coterie.progress import track

#: Length of the n-grams whose aggregation is measured.
NGRAM = 4

#: Elements of the logits that exist at a time (64 MiB in float32).
LOGITS_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class Information:
    """What is known of one source (a domain) of text.

    N-grams lie within a sequence. `aggregation`, `diversity` and `entropy` depend on the amount of text, so sources
    that are to be compared are counted on equally many tokens.

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
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

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
    if token_set.seq_len < NGRAM:
        raise TextError(
            f"sequences of {token_set.seq_len} tokens hold no {NGRAM}-grams; use --seq-len {NGRAM} or more, such as 512"
        )
    losses = _mean_losses(stream, token_set, batch_size)
    common = min(len(ids_NS) for ids_NS in token_set.sequences.values())
    found = []
    for domain, ids_NS in token_set.sequences.items():
        counted_NS = ids_NS[:common]
        found.append(
            Information(
                domain=domain,
                tokens=ids_NS.numel(),
                loss=losses[domain],
                aggregation=1 - distinct_share(counted_NS, NGRAM),
                diversity=distinct_share(counted_NS, 2),
                entropy=token_entropy(counted_NS),
            )
        )
    return tuple(found)


def distinct_share(ids_NS: Tensor, length: int) -> float:
    """Return how many different n-grams there are, as a share of all n-grams within sequences; 1 where there are none.

    Args:
        ids_NS: token ids.
        length: n.
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
    return (int(number_T.max()) + 1) / len(number_T)


def token_entropy(ids_NS: Tensor) -> float:
    """Return the entropy of the distribution of tokens, in nats."""
    counts = torch.unique(ids_NS, return_counts=True)[1].double()
    shares = counts / counts.sum()
    return max(0.0, -float((shares * shares.log()).sum()))


def _mean_losses(stream: Stream, token_set: TokenSet, batch_size: int) -> dict[str, float]:
    """Return the mean loss by domain, in nats; what the last layer returned is kept in files, not in memory."""
    embedding: Any = stream.model.get_input_embeddings()
    size = fitting_batch(batch_size, seq_len=token_set.seq_len, hidden_size=int(embedding.weight.shape[-1]))
    batches = list(token_set.batches(size))
    run = stream.run([functools.partial(_base_output, stream.model, ids_BS) for _, ids_BS in batches])
    for _ in track(run, "reading", total=len(stream.units)):
        pass
    stream.release()
    sums = dict.fromkeys(token_set.domains, 0.0)
    vocab_size = int(stream.model.config.get_text_config().vocab_size)
    with stream.head() as head:
        rows = zip(batches, run.results, strict=True)
        for (domain, ids_BS), output in track(rows, "perplexity", total=len(batches)):
            name = token_set.domains[domain]
            sums[name] += sum(_losses(head, ids_BS, output, vocab_size))
            stream.release()
    losses = {name: sums[name] / _num_predicted(ids_NS) for name, ids_NS in token_set.sequences.items()}
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise InputError(
                f"{stream.checkpoint.path} predicts no numbers for the domain {name} in "
                f"{str(stream.dtype).removeprefix('torch.')}; its weights are damaged, or it needs a number format "
                "with more range"
            )
    return losses


def _num_predicted(ids_NS: Tensor) -> int:
    return len(ids_NS) * (ids_NS.shape[1] - 1)


def _base_output(model: Any, ids_BS: Tensor) -> Any:
    output = model.base_model(input_ids=ids_BS, use_cache=False)
    return type(output)(last_hidden_state=output.last_hidden_state)  # nothing else may stay in memory


def _losses(head: Callable[[Tensor, Any], Tensor], ids_BS: Tensor, output: Any, vocab_size: int) -> Iterator[float]:
    """Yield sums of the negative log-likelihood of the tokens of a batch, part by part."""
    num_predicted = ids_BS.shape[1] - 1
    step = max(1, LOGITS_ELEMENTS // (len(ids_BS) * vocab_size))
    for start in range(0, num_predicted, step):
        part = slice(start, min(start + step, num_predicted))
        states = type(output)(last_hidden_state=output.last_hidden_state[:, part])
        logits_BPV = head(ids_BS[:, part], states)
        next_BP = ids_BS[:, part.start + 1 : part.stop + 1].to(logits_BPV.device)
        for logits_PV, next_P in zip(logits_BPV, next_BP, strict=True):
            loss_P = functional.cross_entropy(logits_PV.float(), next_P, reduction="none")
            yield float(loss_P.double().sum())
