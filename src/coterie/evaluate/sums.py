"""Sums over predicted tokens and questions, by domain and by sequence, and the scores that they come to.

Legend: T predicted tokens of some sequences, N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from coterie.evaluate.standard_error import perplexity_error, perplexity_ratio_error, ratio_error, rise_error
from coterie.model.stream.likelihood import perplexity


class Scores(TypedDict):
    """What a model scores in one domain, or over all.

    Keys:
        perplexity: exp of the mean negative log-likelihood of the predicted tokens; None without text.
        perplexity_error: its standard error over sequences, see `coterie.evaluate.standard_error`; this and all other
            errors are None with fewer than two sequences, or where a score is infinite.
        perplexity_rise: perplexity minus the base's on the same tokens; None without text or base.
        perplexity_rise_error: its standard error, paired by sequence.
        perplexity_ratio: perplexity divided by the base's; None without text or base.
        perplexity_ratio_error: its standard error, paired by sequence.
        kl: mean of KL(base || model) over the same tokens, in nats; None without text or base.
        kl_error: its standard error over sequences.
        agreement: share of the same tokens where the likeliest token is the base's; None without text or base.
        accuracy: share of the questions that are answered exactly; None without questions.
        tokens: number of predicted tokens, the first of each sequence not among them.
        sequences: number of sequences that they are in; 0 where that is not known.
        questions: number of questions.
    """

    perplexity: float | None
    perplexity_error: float | None
    perplexity_rise: float | None
    perplexity_rise_error: float | None
    perplexity_ratio: float | None
    perplexity_ratio_error: float | None
    kl: float | None
    kl_error: float | None
    agreement: float | None
    accuracy: float | None
    tokens: int
    sequences: int
    questions: int


@dataclass(slots=True)
class SequenceSums:
    """Sums over the predicted tokens of one sequence, in nats."""

    tokens: int = 0
    nll: float = 0.0
    base_nll: float = 0.0
    kl: float = 0.0


@dataclass(slots=True)
class Sums:
    """Sums over the predicted tokens and the questions of one domain.

    Attributes:
        nll: negative log-likelihood of the tokens, in nats.
        base_nll: the same of the base.
        kl: KL(base || model) after each token, in nats.
        agreeing: tokens where both have the same likeliest one.
        tokens: predicted tokens.
        correct: questions that are answered exactly.
        questions: all questions.
        sequences: the sums of each sequence, by its number in the text.
    """

    nll: float = 0.0
    base_nll: float = 0.0
    kl: float = 0.0
    agreeing: int = 0
    tokens: int = 0
    correct: int = 0
    questions: int = 0
    sequences: dict[int, SequenceSums] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add another domain's."""
        for name in Sums.__slots__:
            if name != "sequences":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.sequences |= other.sequences

    def add_tokens(
        self,
        first: int,
        lengths: Sequence[int],
        nll_T: Tensor,
        base_nll_T: Tensor | None = None,
        kl_T: Tensor | None = None,
    ) -> None:
        """Add tokens of consecutive sequences.

        Args:
            first: number of the first sequence.
            lengths: tokens of each; T in all.
            nll_T: negative log-likelihoods in float64, in nats.
            base_nll_T: those of the base, where there is one.
            kl_T: KL(base || model) there.
        """
        self.nll += float(nll_T.sum())
        self.tokens += len(nll_T)
        parts = [torch.split(nll_T, list(lengths))]
        if base_nll_T is not None and kl_T is not None:
            self.base_nll += float(base_nll_T.sum())
            self.kl += float(kl_T.sum())
            parts += [torch.split(base_nll_T, list(lengths)), torch.split(kl_T, list(lengths))]
        for row, count in enumerate(lengths):
            if not count:
                continue
            sequence = self.sequences.setdefault(first + row, SequenceSums())
            sequence.tokens += count
            sequence.nll += float(parts[0][row].sum())
            if len(parts) > 1:
                sequence.base_nll += float(parts[1][row].sum())
                sequence.kl += float(parts[2][row].sum())

    def of_base(self, correct: int) -> Sums:
        """Return the sums of the base on the same text, of whose answers to the same questions so many are right."""
        sequences = {
            number: SequenceSums(tokens=sums.tokens, nll=sums.base_nll) for number, sums in self.sequences.items()
        }
        return Sums(
            nll=self.base_nll, tokens=self.tokens, correct=correct, questions=self.questions, sequences=sequences
        )

    def scores(self, *, compared: bool) -> Scores:
        """Return what they come to; `compared` tells whether there was a base."""
        compared = compared and self.tokens > 0
        sequences = self.sequences.values()
        tokens_N, nll_N = [each.tokens for each in sequences], [each.nll for each in sequences]
        base_nll_N, kl_N = [each.base_nll for each in sequences], [each.kl for each in sequences]
        mine = perplexity(self.nll, self.tokens) if self.tokens else None
        base = perplexity(self.base_nll, self.tokens) if compared else None
        if base == math.inf:  # which nothing can be compared with
            base = None
        return Scores(
            perplexity=mine,
            perplexity_error=perplexity_error(nll_N, tokens_N),
            perplexity_rise=mine - base if mine is not None and base is not None else None,
            perplexity_rise_error=rise_error(nll_N, base_nll_N, tokens_N) if compared else None,
            perplexity_ratio=mine / base if mine is not None and base is not None else None,
            perplexity_ratio_error=perplexity_ratio_error(nll_N, base_nll_N, tokens_N) if compared else None,
            kl=self.kl / self.tokens if compared else None,
            kl_error=ratio_error(kl_N, tokens_N) if compared else None,
            agreement=self.agreeing / self.tokens if compared else None,
            accuracy=self.correct / self.questions if self.questions else None,
            tokens=self.tokens,
            sequences=len(self.sequences),
            questions=self.questions,
        )


def total_of(sums: Mapping[str, Sums]) -> Sums:
    """Return the sums over all domains."""
    total = Sums()
    for summed in sums.values():
        total.add(summed)
    return total


def add_answers(sums: dict[str, Sums], right: set[int], by_domain: Mapping[str, Sequence[Any]]) -> None:
    """Count the questions of each domain, and those that are answered exactly.

    Args:
        sums: what is added to; domains that only have questions are new in it.
        right: numbers of the questions that are answered exactly, counted over all domains.
        by_domain: the questions of each domain.
    """
    correct = correct_by_domain(right, by_domain)
    for domain, questions in by_domain.items():
        domain_sums = sums.setdefault(domain, Sums())
        domain_sums.questions, domain_sums.correct = len(questions), correct[domain]


def correct_by_domain(right: set[int], by_domain: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """Return of how many questions of each domain the numbers are among `right`; see `add_answers`."""
    correct, first = {}, 0
    for domain, questions in by_domain.items():
        correct[domain] = len(right & set(range(first, first + len(questions))))
        first += len(questions)
    return correct


def base_scores(
    sums: Mapping[str, Sums], right: set[int] | None, by_domain: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, Scores], Scores]:
    """Return what the base itself scores on the text of a model that was compared with it, by domain and over all.

    Args:
        sums: those of the model.
        right: numbers of the questions that the base answers exactly; None where it was not asked.
        by_domain: the questions of each domain.
    """
    correct = correct_by_domain(right or set(), by_domain)
    of_base = {domain: summed.of_base(correct.get(domain, 0)) for domain, summed in sorted(sums.items())}
    if right is None:
        for summed in of_base.values():
            summed.questions = 0
    scores = {domain: summed.scores(compared=False) for domain, summed in of_base.items()}
    return scores, total_of(of_base).scores(compared=False)
