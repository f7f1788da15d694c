"""From a folder of text to batches of tokens, one domain a file.

A text folder holds one ``*.txt`` file a domain (documents separated by a line that is only ``<|endoftext|>``) or one
``*.jsonl`` file a domain (one JSON object a line with a ``text`` field). ``*.qa.jsonl`` files hold questions with exact
answers and are read by `coterie.evaluate`, not here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.errors import InputError, TextError, UnknownName
from coterie.profile.shares import checked_weights, shares

log = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "<|endoftext|>"

#: Any text will do to see what a tokenizer puts before one.
_PROBE = "Some text."

_SEPARATOR_LINE = re.compile(rf"\n?^{re.escape(DOCUMENT_SEPARATOR)}$\n?", flags=re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSet:
    """Token sequences of one length, by domain.

    Attributes:
        sequences: domain name -> token ids (number of sequences, sequence length), int64.
        seq_len: tokens in each sequence.
        digest: SHA-256 of all token ids and domain names; equal text, seed and tokenizer give an equal digest.
        weights: the weight of each domain in the draw; None when all are equal.
        num_start: start tokens that each sequence begins with, which are part of its length.
    """

    sequences: dict[str, Tensor]
    seq_len: int
    digest: str
    weights: Mapping[str, float] | None = None
    num_start: int = 0

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names, sorted."""
        return tuple(self.sequences)

    @property
    def num_tokens(self) -> dict[str, int]:
        """Number of tokens in each domain."""
        return {domain: ids.numel() for domain, ids in self.sequences.items()}

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


def text_files(folder: str | Path, domains: tuple[str, ...] | None = None) -> dict[str, Path]:
    """Return the text files of a folder by domain name, sorted.

    Raises:
        TextError: no such folder, no text in it, or two files for one domain.
        UnknownName: a domain was asked for that has no file.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise TextError(f"{path} is not a folder; --text takes a folder with one *.txt or *.jsonl file a domain")
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.name.endswith(".qa.jsonl") or file.suffix not in (".txt", ".jsonl") or not file.is_file():
            continue
        if file.stem in files:
            raise TextError(f"domain {file.stem!r} has two files: {files[file.stem].name} and {file.name}")
        files[file.stem] = file
    if not files:
        raise TextError(f"{path} holds no *.txt and no *.jsonl file; put one file a domain there")
    chosen = files.keys() if domains is None else domains
    if not chosen:
        raise TextError(
            f"none of the domains {', '.join(sorted(files))} was asked for; name one or leave the choice out"
        )
    for domain in chosen:
        if domain not in files:
            raise UnknownName("domain", domain, files)
    return {domain: files[domain] for domain in sorted(set(chosen))}


def read_documents(file: Path) -> list[str]:
    """Read the documents of one domain.

    Raises:
        TextError: not UTF-8, not JSON, a line without ``text``, or no text at all.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8 text: {error}") from None
    if file.suffix == ".jsonl":
        documents = []
        # Only \n ends a line: other separators that str.splitlines knows may stand inside a JSON string.
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
                document = None
            if not isinstance(document, str):
                raise TextError(f'{file}, line {number}: expected a JSON object with a "text" field that is a string')
            documents.append(document)
    else:
        documents = _SEPARATOR_LINE.split(content)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise TextError(f"{file} is empty; every domain needs text")
    return documents


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
) -> TokenSet:
    """Cut the text of a folder into sequences and draw from each domain an equal share of them, or one by weight.

    Documents are tokenized one by one and joined with the tokenizer's end-of-text token. Every sequence begins with the
    start token that the tokenizer puts before a text, if it does, and goes on with text. The sequences are drawn
    without replacement by `seed`, so a larger `tokens` contains a smaller one.

    Args:
        tokenizer: a Hugging Face tokenizer.
        folder: the text, see the module.
        seq_len: tokens in a sequence, its start token included.
        tokens: tokens in all, shared by the domains; everything when None. A domain that has less gives all that it
            has, and a warning is logged.
        seed: seed of the draw.
        domains: only these domains.
        weights: share of the tokens by domain, in any unit; domains that are not named, or have weight 0, get
            nothing. Equal weights draw the same as no weights.
        up_to: whether `tokens` is the most that is wanted, so that less is nothing to warn of.

    Raises:
        TextError: a domain is empty or shorter than one sequence.
        UnknownName: a domain that has no file.
        InputError: weights that share nothing out, weights beside `domains`, or weights without `tokens`.
    """
    if weights is None:
        files = text_files(folder, domains)
        chosen: Mapping[str, float] = dict.fromkeys(files, 1)
    else:
        if domains is not None or tokens is None:
            raise InputError("weights share out a number of tokens, and name the domains: give tokens, and no domains")
        chosen = checked_weights(weights)
        files = {domain: file for domain, file in text_files(folder, tuple(weights)).items() if domain in chosen}
    sources = ((domain, str(file), read_documents(file)) for domain, file in files.items())
    return draw(tokenizer, sources, seq_len=seq_len, tokens=tokens, seed=seed, weights=chosen, up_to=up_to)


def draw(
    tokenizer: Any,
    sources: Iterable[tuple[str, str, list[str]]],
    *,
    seq_len: int,
    tokens: int | None,
    seed: int,
    weights: Mapping[str, float],
    up_to: bool = False,
) -> TokenSet:
    """Cut documents into sequences and draw from them, see `tokenize`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        sources: domain, where its text is from, and its documents.
        seq_len: tokens in a sequence.
        tokens: tokens in all; everything when None.
        seed: seed of the draw.
        weights: of all domains.
        up_to: see `tokenize`.
    """
    if seq_len < 2:
        raise TextError(f"a sequence of {seq_len} tokens predicts nothing; use --seq-len 2 or more")
    start = start_ids(tokenizer)
    text_len = seq_len - len(start)
    if text_len < 1:
        raise TextError(
            f"a sequence of {seq_len} tokens holds no text beside the {len(start)} that this tokenizer starts a text "
            f"with; use --seq-len {len(start) + 1} or more"
        )
    counts = shares(0 if tokens is None else tokens, list(weights.values()), step=seq_len)
    wanted = dict(zip(weights, counts, strict=True))
    digest = hashlib.sha256(f"{seq_len}".encode())
    sequences: dict[str, Tensor] = {}
    for domain, origin, documents in sources:
        ids = token_ids(tokenizer, documents)
        count = len(ids) // text_len
        if count == 0:
            needed = f"one sequence of {seq_len}" if not start else f"the {text_len} of a sequence of {seq_len}"
            raise TextError(f"{origin} has {len(ids)} tokens, fewer than {needed}; add text or lower --seq-len")
        rows = ids[: count * text_len].view(count, text_len)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        if tokens is not None:
            if wanted[domain] > count and not up_to:
                log.warning(
                    "domain %s has %d of the %d tokens asked for", domain, count * seq_len, wanted[domain] * seq_len
                )
            order = order[: wanted[domain]]
        start_NS = torch.tensor(start, dtype=torch.int64).expand(len(order), -1)
        sequences[domain] = torch.cat([start_NS, rows[order]], dim=1)
        digest.update(domain.encode())
        digest.update(sequences[domain].numpy().tobytes())
    uneven = len(set(weights.values())) > 1
    return TokenSet(
        sequences=sequences, seq_len=seq_len, digest=digest.hexdigest(), weights=dict(weights) if uneven else None,
        num_start=len(start),
    )  # fmt: skip


def start_ids(tokenizer: Any) -> list[int]:
    """Return the start tokens that a tokenizer puts before every text: one, or none, for most.

    What it puts behind a text, such as an end-of-text token, is none of these.

    Raises:
        InputError: it turns a text into other tokens when it adds its own.
    """
    whole, text = (list(tokenizer(_PROBE, add_special_tokens=added)["input_ids"]) for added in (True, False))
    for place in range(len(whole) - len(text) + 1):
        if whole[place : place + len(text)] == text:
            return whole[:place]
    raise InputError(
        f"the tokenizer turns {_PROBE!r} into {text} and, with its special tokens, into {whole}, where the former is "
        "no part of the latter; so it cannot be told what a text begins with: mend tokenizer.json"
    )


def token_ids(tokenizer: Any, documents: list[str]) -> Tensor:
    """Tokenize documents and join them with the end-of-text token (when the tokenizer has one); (T,), int64."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids: list[int] = []
    # verbose=False: documents longer than the model's context are cut into sequences right here.
    for encoded in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += encoded
        ids += end
    return torch.tensor(ids, dtype=torch.int64)
