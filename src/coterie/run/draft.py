"""Who guesses the next tokens: the text so far, the model itself with the experts in memory, or a smaller model.

Each says one token after the other behind a text, as long as it is asked. A guess is drawn with the noise that the
token itself is going to be drawn with, so that who guesses well draws the same.

Legend: S tokens so far, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from coterie.run.experts import StreamedExperts
from coterie.run.restriction import Restriction
from coterie.run.stop_rule import MOST, Guess

#: Chooses a token by scores (V) behind a text (1, S), so many tokens ahead; with its probability, and the entropy.
Choose = Callable[[Tensor, Tensor, int], tuple[int, float, float]]
#: Lets a token pass the model itself, which is added to what is kept of the text; returns the scores (V) behind it.
PassToken = Callable[[Tensor], Tensor]

#: Tokens that a place in the text so far has in common with its end, at most, where it goes on like it.
_ALIKE = 3


class Draft(ABC):
    """Guesses tokens, round by round."""

    @abstractmethod
    def begin(self, ids_1S: Tensor, choose: Choose, pass_token: PassToken) -> None:
        """Begin a round behind a text, of which all but the last token has passed the model."""

    @abstractmethod
    def next(self) -> Guess | None:
        """Return one more token behind those of this round; None where there is no guess."""

    def end(self) -> int:
        """End the round, and return how many tokens have passed the model itself."""
        return 0


class Lookup(Draft):
    """The text so far: what came the last time after the same tokens (prompt lookup of transformers)."""

    def __init__(self) -> None:
        """Look for nothing yet."""
        self._left: list[int] = []

    def begin(self, ids_1S: Tensor, choose: Choose, pass_token: PassToken) -> None:
        """Begin a round behind a text."""
        generator = PromptLookupCandidateGenerator(
            num_output_tokens=MOST, max_matching_ngram_size=_ALIKE, max_length=ids_1S.shape[1] + MOST + 2
        )
        guessed_1S, _ = generator.get_candidates(cast(Any, ids_1S))
        self._left = guessed_1S[0, ids_1S.shape[1] :].tolist()

    def next(self) -> Guess | None:
        """Return one more token."""
        return Guess(token=self._left.pop(0)) if self._left else None


class Resident(Draft):
    """The model itself, with routing restricted to the experts in memory: it takes no memory, and reads nothing."""

    def __init__(self, experts: StreamedExperts, restriction: Restriction) -> None:
        """Stand beside a model.

        Args:
            experts: the model's.
            restriction: restricts their routing.
        """
        self._experts, self._restriction = experts, restriction
        self._num_passed = 0

    def begin(self, ids_1S: Tensor, choose: Choose, pass_token: PassToken) -> None:
        """Begin a round behind a text."""
        self._ids_1S, self._choose, self._pass_token, self._num_passed = ids_1S, choose, pass_token, 0
        self._restriction.missing.clear()

    def next(self) -> Guess | None:
        """Return one more token."""
        before = len(self._restriction.missing)
        self._experts.restriction = self._restriction
        try:
            scores_V = self._pass_token(self._ids_1S[:, -1:])
        finally:
            self._experts.restriction = None
        token, probability, entropy = self._choose(self._ids_1S, scores_V, self._num_passed)
        self._num_passed += 1
        self._ids_1S = torch.cat([self._ids_1S, self._ids_1S.new_tensor([[token]])], dim=1)
        misses = len(self._restriction.missing) - before
        return Guess(token=token, probability=probability, entropy=entropy, misses=misses)

    def end(self) -> int:
        """End the round."""
        return self._num_passed


class Sibling(Draft):
    """A smaller model with the same tokenizer, which keeps keys and values of its own."""

    def __init__(self, model: PreTrainedModel, *, chunk: int) -> None:
        """Stand beside the model.

        Args:
            model: the smaller one, all of it in memory.
            chunk: tokens of a prompt that pass it at once.
        """
        self._model: Any = model
        self._chunk = chunk
        self._cache: Any = None
        self._passed: list[int] = []

    def begin(self, ids_1S: Tensor, choose: Choose, pass_token: PassToken) -> None:
        """Begin a round behind a text."""
        self._ids_1S, self._choose, self._ahead = ids_1S, choose, 0
        text = ids_1S[0].tolist()
        pairs = zip(self._passed, text[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self._cache is not None and common and self._cache.is_croppable:
            self._cache.crop(common - len(self._passed))
            self._passed = self._passed[:common]
        else:
            self._cache, self._passed = None, []

    def next(self) -> Guess | None:
        """Return one more token."""
        scores_1V = torch.empty(0)
        left_1S = self._ids_1S[:, len(self._passed) :]
        for begin in range(0, left_1S.shape[1], self._chunk):
            output = self._model(
                left_1S[:, begin : begin + self._chunk], past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
            if self._cache is None:
                self._cache = output.past_key_values
                self._cache.activate_past_recording()
            scores_1V = output.logits[:, -1]
        self._passed = self._ids_1S[0].tolist()
        token, probability, entropy = self._choose(self._ids_1S, scores_1V[0], self._ahead)
        self._ahead += 1
        self._ids_1S = torch.cat([self._ids_1S, self._ids_1S.new_tensor([[token]])], dim=1)
        return Guess(token=token, probability=probability, entropy=entropy)
