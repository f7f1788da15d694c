"""Calibration text: what is asked for, in one noun; and the text itself, tokenized once and drawn from again and again.

text = CalibrationText(checkpoint, TextSettings(source="text/calibration", tokens=131_072, seq_len=512))
measured = text.draw()
trained = text.draw(1_048_576, up_to=True)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.amounts import check_seed
from coterie.errors import InputError
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile.calibration import TokenSet, draw, text_length
from coterie.profile.data_sets import is_data_set_name
from coterie.profile.documents import log_unread
from coterie.profile.self_text import SELF, Writing, write_text
from coterie.profile.sources import On, check_on, chosen_sources
from coterie.profile.token_file import TokenFile


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """What text a model reads, and how it is cut.

    Attributes:
        source: a text folder, see `coterie.profile.documents`; ``hf:`` and the name of a data set, see
            `coterie.profile.data_sets`; or "self" for text that the model writes (a folder of that name is "./self").
        tokens: tokens in all, shared by the domains.
        seq_len: tokens in a sequence.
        seed: seed of the draw, and of what the model writes.
        domains: only these domains.
        weights: share of the tokens by domain, in any unit; domains that are not named get nothing. Equal shares when
            None.
        on: which tokens count in statistics and losses: "all", or those of answers in conversations and of completions,
            "assistant".
    """

    source: str | Path
    tokens: int
    seq_len: int
    seed: int = 0
    domains: tuple[str, ...] | None = None
    weights: Mapping[str, float] | None = None
    on: On = "all"

    @property
    def own(self) -> bool:
        """Whether the model writes the text."""
        return str(self.source) == SELF

    def check(self) -> None:
        """Raise InputError for a seed that cannot be, and for domains or weights of text that has no domains."""
        check_seed(self.seed)
        check_on(self.on)
        if self.own and self.on != "all":
            raise InputError("text that the model writes holds no conversations: leave --on assistant out")
        if self.own and (self.domains is not None or self.weights is not None):
            raise InputError(
                "text that the model writes has no domains: leave them out, or let it write a file into a text folder "
                "first (coterie calibrate MODEL --generate DIR) and mix that with the others"
            )


class CalibrationText:
    """The text of a run, as the tokens of one model: made at the first draw, in a file that has no name."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: TextSettings,
        *,
        device: str = "cpu",
        limit: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Say what text it is; nothing is read yet.

        Args:
            checkpoint: the model, whose tokenizer cuts the text.
            settings: what text.
            device: where the model writes its own.
            limit: bytes of memory that writing may take; as many as are free when None.
            scratch: folder of the file; the system's own when None.

        Raises:
            InputError: see `TextSettings.check`.
        """
        settings.check()
        self.settings = settings
        self.device = device
        self._checkpoint = checkpoint
        self._limit = limit
        self._scratch = scratch
        self._token_file: TokenFile | None = None
        self._weights: Mapping[str, float] = {}

    def draw(self, tokens: int | None = None, *, up_to: bool = False) -> TokenSet:
        """Draw sequences, without replacement; a larger draw contains a smaller one.

        Args:
            tokens: tokens in all; those of the settings when None.
            up_to: whether that is the most that is wanted, so that less is nothing to warn of.

        Raises:
            TextError: no text, empty text, or text shorter than a sequence.
            UnknownName: a domain that has no file.
            InputError: weights that share nothing out; see `coterie.profile.self_text.write_text` for more.
            Infeasible: the model does not fit into memory to write text.
        """
        settings = self.settings
        if self._token_file is None:
            self._token_file = self._written() if settings.own else self._read()
        return draw(
            self._token_file, seq_len=settings.seq_len, tokens=settings.tokens if tokens is None else tokens,
            seed=settings.seed, weights=self._weights, up_to=up_to,
        )  # fmt: skip

    def _begun(self) -> TokenFile:
        answers = self.settings.on == "assistant"
        token_file = TokenFile(load_tokenizer(self._checkpoint.path), scratch=self._scratch, answers=answers)
        text_length(self.settings.seq_len, token_file)
        return token_file

    def _read(self) -> TokenFile:
        settings = self.settings
        sources, self._weights = chosen_sources(
            settings.source, tokens=settings.tokens, domains=settings.domains, weights=settings.weights, on=settings.on
        )
        if not is_data_set_name(settings.source):
            log_unread(settings.source)
        token_file = self._begun()
        for domain, source in sources.items():
            token_file.add(domain, source.origin, source.read(), limit=source.limit)
        return token_file

    def _written(self) -> TokenFile:
        settings = self.settings
        writing = Writing(
            tokens=settings.tokens, max_length=settings.seq_len, seed=settings.seed, device=self.device
        )  # fmt: skip
        written = write_text(self._checkpoint, writing, limit=self._limit)
        self._weights = {SELF: 1}
        token_file = self._begun()
        token_file.add(SELF, "the text that the model wrote", ((document, True) for document in written))
        return token_file


class UnwrittenText(CalibrationText):
    """In place of text that the model would write itself, where a run is only foretold: random tokens, as many."""

    def draw(self, tokens: int | None = None, *, up_to: bool = False) -> TokenSet:
        """Draw sequences of random tokens."""
        seq_len, seed = self.settings.seq_len, self.settings.seed
        count = max(1, (self.settings.tokens if tokens is None else tokens) // max(1, seq_len))
        vocab_size = len(load_tokenizer(self._checkpoint.path))
        ids_NS = torch.randint(vocab_size, (count, seq_len), generator=torch.Generator().manual_seed(seed))
        return TokenSet(sequences={SELF: ids_NS}, seq_len=seq_len, digest="unwritten", weights=None, num_start=0)
