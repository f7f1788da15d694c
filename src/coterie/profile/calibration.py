"""From a source of text (`coterie.profile.sources`) to sequences of tokens, drawn by domain.

Legend: N sequences, S tokens of a sequence, B sequences of a batch.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.errors import TextError
from coterie.profile.shares import shares
from coterie.profile.sources import On, chosen_sources
from coterie.profile.token_file import TokenFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSet:
    """Token sequences of one length, by domain.

    Attributes:
        sequences: domain name -> token ids (number of sequences, sequence length), int64.
        seq_len: tokens in each sequence.
        digest: SHA-256 of all token ids and domain names; equal text, seed and tokenizer give an equal digest.
        weights: the weight of each domain in the draw; None when all are equal.
        num_start: start tokens that each sequence begins with, which are part of its length.
        counts: for each token in `sequences` whether it counts, bool; None where all do. A token counts in statistics
            where it is read, and in losses where it is predicted.
    """

    sequences: dict[str, Tensor]
    seq_len: int
    digest: str
    weights: Mapping[str, float] | None = None
    num_start: int = 0
    counts: Mapping[str, Tensor] | None = None

    @property
    def on(self) -> On:
        """Which tokens count."""
        return "all" if self.counts is None else "assistant"

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names, sorted."""
        return tuple(self.sequences)

    @property
    def num_tokens(self) -> dict[str, int]:
        """Number of tokens in each domain, whether they count or not."""
        return {domain: ids.numel() for domain, ids in self.sequences.items()}

    @property
    def num_counted(self) -> dict[str, int]:
        """Number of tokens that count in each domain."""
        return self.num_tokens if self.counts is None else {name: int(rows.sum()) for name, rows in self.counts.items()}

    def share_out(self, total: int) -> list[int]:
        """Share out an amount, such as the tokens of a sample, among the domains by their weights; 1 at least."""
        if self.weights is None:
            return [max(1, total // len(self.sequences))] * len(self.sequences)
        return shares(total, [self.weights[domain] for domain in self.sequences])

    def batches(self, batch_size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (domain index, token ids (B, seq_len)); a batch holds one domain only."""
        for index, ids in enumerate(self.sequences.values()):
            for start in range(0, len(ids), batch_size):
                yield index, ids[start : start + batch_size]

    def batch_counts(self, batch_size: int) -> Iterator[Tensor | None]:
        """Yield for each of the `batches` which of its tokens count (B, S), bool; None where all do."""
        for domain, ids in self.sequences.items():
            for start in range(0, len(ids), batch_size):
                yield None if self.counts is None else self.counts[domain][start : start + batch_size]


def tokenize(
    tokenizer: Any,
    folder: str | Path,
    *,
    seq_len: int,
    tokens: int | None = None,
    seed: int = 0,
    domains: tuple[str, ...] | None = None,
    weights: Mapping[str, float] | None = None,
    up_to: bool = False,
    on: On = "all",
) -> TokenSet:
    """Cut the text of a folder into sequences and draw from each domain an equal share of them, or one by weight.

    Documents are tokenized one by one and joined with the tokenizer's end-of-text token. Every sequence begins with the
    start token that the tokenizer puts before a text, if it does, and goes on with text. The sequences are drawn
    without replacement by `seed`, so a larger `tokens` contains a smaller one. Where only answers count, those that
    predict none are left out.

    Args:
        tokenizer: a Hugging Face tokenizer.
        folder: the text, see `coterie.profile.sources.text_sources`.
        seq_len: tokens in a sequence, its start token included.
        tokens: tokens in all, shared by the domains; everything when None. A domain that has less gives all that it
            has, and a warning is logged.
        seed: seed of the draw.
        domains: only these domains.
        weights: share of the tokens by domain, in any unit; domains that are not named, or have weight 0, get
            nothing. Equal weights draw the same as no weights.
        up_to: whether `tokens` is the most that is wanted, so that less is nothing to warn of.
        on: which tokens count: "all", or those of answers, "assistant".

    Raises:
        TextError: a domain is empty or shorter than one sequence, or has no answers where only these count.
        UnknownName: a domain that has no file.
        InputError: weights that share nothing out, weights beside `domains`, or weights without `tokens`.
    """
    sources, chosen = chosen_sources(folder, tokens=tokens, domains=domains, weights=weights, on=on)
    token_file = TokenFile(tokenizer, answers=on == "assistant")
    text_length(seq_len, token_file)
    for domain, source in sources.items():
        token_file.add(domain, source.origin, source.read(), limit=source.limit)
    return draw(token_file, seq_len=seq_len, tokens=tokens, seed=seed, weights=chosen, up_to=up_to)


def text_length(seq_len: int, token_file: TokenFile) -> int:
    """Return how many tokens of text a sequence holds.

    Raises:
        TextError: none, or nothing that could be predicted.
    """
    if seq_len < 2:
        raise TextError(f"a sequence of {seq_len} tokens predicts nothing; use --seq-len 2 or more")
    num_start = len(token_file.start)
    if seq_len - num_start < 1:
        raise TextError(
            f"a sequence of {seq_len} tokens holds no text beside the {num_start} that this tokenizer starts a text "
            f"with; use --seq-len {num_start + 1} or more"
        )
    return seq_len - num_start


def draw(
    token_file: TokenFile,
    *,
    seq_len: int,
    tokens: int | None,
    seed: int,
    weights: Mapping[str, float],
    up_to: bool = False,
) -> TokenSet:
    """Cut text into sequences and draw from them, see `tokenize`; a text can be drawn from more than once.

    Args:
        token_file: the text.
        seq_len: tokens in a sequence.
        tokens: tokens in all; everything when None.
        seed: seed of the draw.
        weights: of all domains.
        up_to: see `tokenize`.

    Raises:
        TextError: a domain is shorter than one sequence.
    """
    length = text_length(seq_len, token_file)
    counts = shares(0 if tokens is None else tokens, list(weights.values()), step=seq_len)
    wanted = dict(zip(weights, counts, strict=True))
    digest = hashlib.sha256(f"{seq_len}".encode())
    sequences: dict[str, Tensor] = {}
    counted: dict[str, Tensor] = {}
    for domain in token_file.domains:
        there = token_file.num_tokens(domain)
        count = token_file.num_rows(domain, seq_len=seq_len)
        if count == 0:
            needed = f"one sequence of {seq_len}" if length == seq_len else f"the {length} of a sequence of {seq_len}"
            raise TextError(
                f"{token_file.origin(domain)} has {there} tokens, fewer than {needed}; add text or lower --seq-len"
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        if token_file.answers:
            order = order[_predict_answers(token_file, domain, count, seq_len)[order]]
            if (count := len(order)) == 0:
                raise TextError(f"no sequence of {seq_len} tokens of {token_file.origin(domain)} predicts an answer")
        if tokens is not None:
            if wanted[domain] > count and not up_to:
                log.warning(
                    "domain %s has %d of the %d tokens asked for", domain, count * seq_len, wanted[domain] * seq_len
                )
            order = order[: wanted[domain]]
        sequences[domain] = token_file.rows(domain, order.tolist(), seq_len=seq_len)
        digest.update(domain.encode())
        digest.update(sequences[domain].numpy().data)
        if token_file.answers:
            counted[domain] = token_file.counts(domain, order.tolist(), seq_len=seq_len)
            digest.update(b"answers" + counted[domain].numpy().tobytes())
    uneven = len(set(weights.values())) > 1
    return TokenSet(
        sequences=sequences, seq_len=seq_len, digest=digest.hexdigest(), weights=dict(weights) if uneven else None,
        num_start=len(token_file.start), counts=counted if token_file.answers else None,
    )  # fmt: skip


def _predict_answers(token_file: TokenFile, domain: str, count: int, seq_len: int) -> Tensor:
    """Tell of every sequence of a domain whether a token of it that is predicted counts, (N,), bool."""
    step = max(1, 2**20 // seq_len)
    parts = [
        token_file.counts(domain, range(start, min(start + step, count)), seq_len=seq_len)[:, 1:].any(1)
        for start in range(0, count, step)
    ]
    return torch.cat(parts)
