"""Tokens guessed and checked: one pass of the model says of several guesses which are right (2211.17192).

What comes out is what would come out anyway: a token is chosen by the model's own scores, as without guesses, and a
guess is right if it is that token. Where tokens are drawn, each is drawn with noise that belongs to its place in the
text, the same that a guess for this place was drawn with; so what is drawn does not depend on who guesses, or whether
anybody does (drafter-invariant speculation, 2408.07978).

Legend: S tokens so far, C tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from coterie.model.arch.layers import MoELayer
from coterie.run.draft import Draft, Lookup, Resident, Sibling
from coterie.run.draft_choice import DraftChoice
from coterie.run.experts import StreamedExperts
from coterie.run.lookahead import router_rows
from coterie.run.passes import let_pass
from coterie.run.residency import Residency
from coterie.run.restriction import Restriction
from coterie.run.stop_rule import Guess, Round, StopRule, Worth

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Drafted:
    """What guesses have brought so far.

    Attributes:
        passes: passes of the model behind prompts.
        tokens: tokens that came of them.
        guesses: guesses that were checked.
        right: those that were right.
        seconds: seconds of guessing.
    """

    passes: int = 0
    tokens: int = 0
    guesses: int = 0
    right: int = 0
    seconds: float = 0.0

    def since(self, before: Drafted) -> Drafted:
        """Return what has come since."""
        return Drafted(
            passes=self.passes - before.passes, tokens=self.tokens - before.tokens,
            guesses=self.guesses - before.guesses, right=self.right - before.right,
            seconds=self.seconds - before.seconds,
        )  # fmt: skip

    def __str__(self) -> str:
        share = self.right / max(self.guesses, 1)
        each = self.tokens / max(self.passes, 1)
        return f"{self.right} of {self.guesses} guesses were right ({share:.0%}), {each:.2f} tokens came of a pass"


class Speculation:
    """Lets a model generate with guesses.

    Attributes:
        rule: says how many guesses, if any.
    """

    def __init__(self, draft: Draft, residency: Residency, rule: StopRule | None = None) -> None:
        """Know who guesses.

        Args:
            draft: who.
            residency: counts which experts are missed, and how long they are waited for.
            rule: says how many guesses; as many as are worth it when None.
        """
        self.rule = rule or Worth()
        self._draft, self._residency = draft, residency
        self._drafted = Drafted()
        self._is_refused = False

    @property
    def drafted(self) -> Drafted:
        """What guesses have brought so far: a copy."""
        return replace(self._drafted)

    def decoder(self, streamer: TextStreamer | None, see: Callable[[Tensor], None] | None) -> Callable[..., Tensor]:
        """Return what transformers' `generate` calls for the tokens behind the prompt.

        Args:
            streamer: gets each token.
            see: gets the scores (V) of the model before each token is chosen, as it gave them.
        """

        def decode(
            model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            **inputs: Any,
        ) -> Tensor:  # fmt: skip
            cache = inputs.get("past_key_values")
            if cache is None or not cache.is_croppable:
                self._refuse()
                alone: Tensor = model._sample(
                    input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **inputs
                )
                return alone
            outputs = model._prefill(input_ids, generation_config, inputs, is_first_iteration=True)
            cache.activate_past_recording()
            text = _Text(model, input_ids, logits_processor, stopping_criteria, generation_config, inputs, outputs)
            text.streamer, text.see = streamer, see
            self._go_on(text)
            if streamer is not None:
                streamer.end()  # type: ignore[no-untyped-call]
            return text.ids_1S

        return decode

    def _refuse(self) -> None:
        if not self._is_refused:
            log.warning("there are no drafts: what this model keeps of a text cannot be cut off again")
        self._is_refused = True

    def _go_on(self, text: _Text) -> None:
        """Make tokens until the text is over, round by round."""
        text.take(text.scores_CV[0])
        while not text.is_over:
            started = time.perf_counter()
            guesses = self._guess(text) if self.rule.begins() else []
            guessed, before = time.perf_counter(), self._residency.counters
            text.check([guess.token for guess in guesses])
            seconds, after = time.perf_counter() - guessed, self._residency.counters
            num_right = text.take_checked([guess.token for guess in guesses])
            self._drafted.passes += 1
            self._drafted.tokens += num_right + 1
            self._drafted.guesses += len(guesses)
            self._drafted.right += num_right
            self._drafted.seconds += guessed - started
            self.rule.learn(
                Round(
                    guesses=guesses, num_right=num_right, guessing=guessed - started, seconds=seconds,
                    waited=after.wait_seconds - before.wait_seconds, misses=after.misses - before.misses,
                )
            )  # fmt: skip

    def _guess(self, text: _Text) -> list[Guess]:
        """Return guesses that are worth a look."""
        guesses: list[Guess] = []
        self._draft.begin(text.ids_1S, text.choose, text.pass_token)
        try:
            while len(guesses) < text.most and self.rule.goes_on(guesses):
                guess = self._draft.next()
                if guess is None:
                    break
                guesses.append(guess)
                if not self.rule.takes(guesses):
                    guesses.pop()
                    break
        finally:
            text.forget(self._draft.end())
        return guesses


class _Text:
    """A text on its way, of which all but the last token has passed the model once the first one is chosen.

    Attributes:
        ids_1S: the tokens.
        scores_CV: what the model gave behind the tokens that passed last.
        is_over: there are no more tokens.
        streamer, see: told of each token, and of the scores that it is chosen by.
    """

    def __init__(
        self, model: Any, ids_1S: Tensor, process: Any, ends: Any, config: Any, inputs: dict[str, Any], outputs: Any
    ) -> None:
        self.ids_1S, self.is_over = ids_1S, False
        self.scores_CV: Tensor = outputs.logits[0, -1:]
        self.streamer: Any = None
        self.see: Callable[[Tensor], None] | None = None
        self._model, self._process, self._ends, self._config = model, process, ends, config
        self._inputs, self._cache = inputs, outputs.get("past_key_values")
        positions: Tensor | None = inputs.get("position_ids")
        self._position = None if positions is None else positions[..., -1:]
        self._mask_1S: Tensor | None = inputs.get("attention_mask")
        self._noise: list[Tensor] = []

    @property
    def most(self) -> int:
        """Guesses at most: one token more comes out of a pass than it had guesses, and none beyond the longest text."""
        return max(0, int(self._config.max_length) - self.ids_1S.shape[1] - 1)

    def choose(self, ids_1S: Tensor, scores_V: Tensor, ahead: int) -> tuple[int, float, float]:
        """Return a token behind a text, so many ahead of this one, with its probability and the entropy of all."""
        size = int(self.scores_CV.shape[-1])
        if len(scores_V) != size:  # of a model whose vocabulary is padded otherwise
            scores_V = torch.cat([scores_V[:size], scores_V.new_full((max(0, size - len(scores_V)),), -torch.inf)])
        share_1V = self._process(ids_1S, scores_V.to(copy=True, dtype=torch.float32)[None]).softmax(dim=-1)
        token = int(self._draw(share_1V, ahead))
        share_V = share_1V[0]
        return token, float(share_V[token]), float(torch.special.entr(share_V).sum())

    def _draw(self, share_1V: Tensor, ahead: int) -> Tensor:
        """Return a token of probabilities, with the noise of its place; as `torch.multinomial` draws a single one."""
        if not self._config.do_sample:
            return share_1V.argmax(dim=-1)
        while len(self._noise) <= ahead:
            self._noise.append(torch.empty_like(share_1V).exponential_())
        return (share_1V / self._noise[ahead]).argmax(dim=-1)

    def pass_token(self, ids_11: Tensor) -> Tensor:
        """Let a token pass the model, behind those that have; return the scores (V) behind it."""
        return self._pass(ids_11)[0]

    def forget(self, count: int) -> None:
        """Forget so many tokens that have passed the model last."""
        self._cache.crop(-count)
        if self._position is not None:
            self._position = self._position - count
        if self._mask_1S is not None and count:
            self._mask_1S = self._mask_1S[:, :-count]

    def check(self, guesses: list[int]) -> None:
        """Let the last token pass the model, and guesses behind it."""
        guesses_1C = self.ids_1S.new_tensor([guesses])
        self.scores_CV = self._pass(torch.cat([self.ids_1S[:, -1:], guesses_1C], dim=1))

    def take_checked(self, guesses: list[int]) -> int:
        """Take tokens as long as guesses are right, and one more; return how many were."""
        num_right = 0
        for number, scores_V in enumerate(self.scores_CV):
            token = self.take(scores_V)
            if self.is_over or number == len(guesses) or token != guesses[number]:
                break
            num_right += 1
        self.forget(len(guesses) - num_right)
        return num_right

    def take(self, scores_V: Tensor) -> int:
        """Choose the next token by the scores of the model, and return it."""
        if self.see is not None:
            self.see(scores_V)
        share_1V = self._process(self.ids_1S, scores_V.to(copy=True, dtype=torch.float32)[None])
        if self._config.do_sample:
            share_1V = share_1V.softmax(dim=-1)
        token_1 = self._draw(share_1V, 0)
        self._noise = self._noise[1:]
        self.ids_1S = torch.cat([self.ids_1S, token_1[None].to(self.ids_1S.device)], dim=1)
        self.is_over = bool(self._ends(self.ids_1S, None).all())
        if self.streamer is not None:
            self.streamer.put(token_1.cpu())
        return int(token_1)

    def _pass(self, ids_1C: Tensor) -> Tensor:
        """Let tokens pass the model; return the scores (C, V) behind each."""
        count = ids_1C.shape[1]
        positions = None
        if self._position is not None:
            positions = self._position + torch.arange(1, count + 1, device=self._position.device)
            self._position = positions[..., -1:]
        if self._mask_1S is not None:
            self._mask_1S = torch.cat([self._mask_1S, self._mask_1S.new_ones((1, count))], dim=1)
        scores_1CV = let_pass(
            self._model, ids_1C, self._cache, positions, self._inputs, mask_BS=self._mask_1S, scored=count
        )
        return scores_1CV[0]


def speculation_of(
    choice: DraftChoice,
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    residency: Residency,
    experts: StreamedExperts,
    *,
    chunk: int,
) -> Speculation | None:
    """Return how a model generates with guesses; None where nobody guesses.

    Args:
        choice: who does.
        model: the model.
        layers: its MoE layers.
        residency: who of its experts is in memory.
        experts: what computes them.
        chunk: tokens of a prompt that pass a model at once.
    """
    if choice.name == "off":
        return None
    if choice.name == "lookup":
        return Speculation(Lookup(), residency)
    if choice.sibling is None:
        restriction = Restriction(residency, router_rows(model, layers), share=choice.share)
        return Speculation(Resident(experts, restriction), residency)
    return Speculation(Sibling(choice.sibling.load(), chunk=chunk), residency)
