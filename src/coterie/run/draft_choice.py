"""Who is to guess tokens, as it is named: off, lookup, resident, resident:SHARE, or a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from transformers import PreTrainedTokenizerBase

from coterie.amounts import parse_share
from coterie.errors import InputError
from coterie.run.sibling import PreparedSibling, prepare_sibling
from coterie.run.stop_rule import MOST


@dataclass(frozen=True, kw_only=True)
class DraftChoice:
    """Who is to guess.

    Attributes:
        name: off, lookup, resident, or a model.
        share: of the experts of a token, those with the largest weights that guesses are made with, for resident.
        sibling: the model, once it was looked at.
    """

    name: str
    share: float = 1.0
    sibling: PreparedSibling | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what a text names.

        Raises:
            InputError: a share that is none.
        """
        name, colon, share = text.partition(":")
        if name == "resident" and colon:
            kept = parse_share(share)
            if not 0 < kept <= 1:
                raise InputError(f"--draft {text}: a share of a token's experts is more than 0, and 1 at most")
            return cls(name=name, share=kept)
        return cls(name=text)

    @property
    def is_model(self) -> bool:
        """Whether a model of its own guesses."""
        return self.name not in ("off", "lookup", "resident")

    @property
    def scored(self) -> int:
        """Tokens of a pass whose scores are needed."""
        return 1 if self.name == "off" else MOST + 1

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, context: int, chunk: int
    ) -> PreparedSibling | None:
        """Look at the model that guesses, if one does; see `coterie.run.sibling.prepare_sibling` for errors."""
        return (
            prepare_sibling(self.name, tokenizer, dtype=dtype, context=context, chunk=chunk) if self.is_model else None
        )
