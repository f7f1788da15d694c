"""The columns of the table of results: what each says of a model, in which words, and with which standard error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coterie.report.gather import Entry
from coterie.report.words import bytes_text, number_text, percent_text, times_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of the table of results."""

    title: str
    hint: str
    value: Callable[[Entry], float | None]
    text: Callable[[float | None], str]
    better: str = ""  # "low", "high" or "" for neither
    error: Callable[[Entry], float | None] = lambda entry: None  # standard error of the value over sequences


COLUMNS = (
    Column(title="Bytes", hint="all tensors in the weight files", value=lambda e: float(e.num_bytes),
           text=lambda v: bytes_text(None if v is None else round(v)), better="low"),
    Column(title="of original", hint="bytes divided by the original's", value=lambda e: e.bytes_ratio,
           text=percent_text, better="low"),
    Column(title="Perplexity", hint="exp of the mean negative log-likelihood of all test tokens",
           value=lambda e: e.score("perplexity"), text=number_text, better="low"),
    Column(title="× original", hint="perplexity divided by the original's on the same tokens",
           value=lambda e: e.score("perplexity_ratio"), text=times_text, better="low",
           error=lambda e: None if e.is_base else e.error("perplexity_ratio")),
    Column(title="KL", hint="mean divergence of the predictions from the original's, in nats a token",
           value=lambda e: None if e.is_base else e.score("kl"), text=number_text, better="low",
           error=lambda e: None if e.is_base else e.error("kl")),
    Column(title="Top-1 agreement", hint="share of tokens where the likeliest next token is the original's",
           value=lambda e: None if e.is_base else e.score("agreement"),
           text=lambda v: percent_text(v, 1), better="high"),
    Column(title="Exact answers", hint="share of questions answered exactly", value=lambda e: e.score("accuracy"),
           text=lambda v: percent_text(v, 1), better="high"),
    Column(title="Speed", hint="tokens a second divided by the original's, measured in turns",
           value=lambda e: None if e.card is None else e.card.speed_ratio, text=times_text, better="high"),
)  # fmt: skip
