"""Several answers in one batch: a step reads an expert once, however many of the answers choose it.

What prompts have in common at their beginning passes the model once, their rests side by side, and an answer that goes
on with the same prompt as another takes its keys and values over. An answer that has ended leaves the batch, and
padding chooses no experts. Everything before the first token is prepared by transformers' own `generate`, answer by
answer, so each has its own processors of scores and ends as it would alone; draws come from a generator for each
answer, so a seed draws the same however many answers there are.

Legend: B answers, U different prompts, S tokens so far, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from coterie.errors import Cancelled
from coterie.model.quiet import quiet
from coterie.run.experts import StreamedExperts
from coterie.run.kv import WindowLayer, ZipLayer
from coterie.run.passes import KEPT, let_pass
from coterie.run.sampling import Sampling, check_tokens

#: Tokens in common from which on it is worth a pass of its own.
_SHARED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """An answer that is wanted.

    Attributes:
        ids_1S: the prompt.
        max_tokens: tokens that are made at most.
        sampling: how they are chosen.
        on_token: gets each token with the scores (V) that the model gave to all, before anything changed them; True
            ends the answer after it, and an error ends it with that error.
        cancelled: asked again and again; ends the answer where it says so.
        on_end: gets what became of it, as soon as it is over.
    """

    ids_1S: Tensor
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    on_token: Callable[[int, Tensor], bool] | None = None
    cancelled: Callable[[], bool] | None = None
    on_end: Callable[[Outcome], None] | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether it is not wanted any more."""
        return self.cancelled is not None and self.cancelled()


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of it.

    Attributes:
        ids: the tokens that were made.
        error: what ended it, if it did not end as wanted.
    """

    ids: list[int] = field(default_factory=list)
    error: Exception | None = None


class _Answer:
    """An answer on its way.

    Attributes:
        wanted: what is wanted.
        outcome: what has come of it so far.
        ids_1S: prompt and tokens so far.
        inputs: what transformers gives to the model beside the ids.
        is_over: there are no more tokens.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted, *, context: int, pad: int | None) -> None:
        self.wanted, self.outcome, self.ids_1S, self.is_over = wanted, Outcome(), wanted.ids_1S, False
        self.inputs: dict[str, Any] = {}

        def keep(
            model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            **inputs: Any,
        ) -> Tensor:  # fmt: skip
            self._process, self._ends, self._draws = logits_processor, stopping_criteria, generation_config.do_sample
            self.inputs = inputs
            return input_ids

        cast(Any, model).generate(
            wanted.ids_1S, attention_mask=torch.ones_like(wanted.ids_1S), custom_generate=keep,
            max_new_tokens=min(wanted.max_tokens, context - wanted.ids_1S.shape[1]), pad_token_id=pad,
            **wanted.sampling.settings(),
        )  # fmt: skip
        seed = wanted.sampling.seed
        seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        self._generator = torch.Generator(device=model.device).manual_seed(seed)

    def take(self, scores_V: Tensor) -> None:
        """Choose a token by the scores that the model gives, and end where that was the last one."""
        try:
            scores_1V = scores_V.to(copy=True, dtype=torch.float32)[None]
            raw_V = None if self.wanted.on_token is None else scores_1V[0].clone()
            scores_1V = self._process(self.ids_1S, scores_1V)
            if self._draws:
                token_11 = torch.multinomial(scores_1V.softmax(dim=-1), 1, generator=self._generator)
            else:
                token_11 = scores_1V.argmax(dim=-1, keepdim=True)
            self.ids_1S = torch.cat([self.ids_1S, token_11.to(self.ids_1S.device)], dim=1)
            self.outcome.ids.append(int(token_11))
            self.is_over = bool(self._ends(self.ids_1S, None).all())
            if self.wanted.on_token is not None and raw_V is not None:
                self.is_over |= self.wanted.on_token(self.outcome.ids[-1], raw_V)
        except Exception as error:  # of this answer alone
            self.end(error)

    def end(self, error: Exception) -> None:
        """End it with an error."""
        self.outcome.error, self.is_over = error, True

    def tell(self) -> None:
        """Tell whoever waits that it is over."""
        if self.wanted.on_end is not None:
            self.wanted.on_end(self.outcome)

    def leave_if_cancelled(self) -> None:
        """End it where it is not wanted any more."""
        if not self.is_over and self.wanted.is_cancelled:
            self.end(Cancelled("the generation was cancelled"))


class Batch:
    """Answers that are made together; see `generate_batch`."""

    def __init__(
        self,
        model: PreTrainedModel,
        experts: StreamedExperts,
        wanted: Sequence[Wanted],
        *,
        context: int,
        pad: int | None,
        cache: Cache | None = None,
    ) -> None:
        """Prepare them.

        Args:
            model: with its experts in the place of its own.
            experts: these.
            wanted: the answers, one at least.
            context: tokens of prompt and answer together, at most.
            pad: the token that stands for none, which transformers asks for.
            cache: an empty one for keys and values; what transformers makes for the model when None.

        Raises:
            InputError: a setting cannot be.
        """
        for each in wanted:
            each.sampling.check()
            check_tokens(each.max_tokens)
        with quiet():
            self.answers = [_Answer(model, each, context=context, pad=pad) for each in wanted]
        self._model: Any = model
        self._experts = experts
        self._alive = list(self.answers)
        self._cache: Any = self.answers[0].inputs.get("past_key_values") if cache is None else cache
        self._mask_BS = torch.empty(0)
        self._positions: Any = None

    @property
    def is_possible(self) -> bool:
        """Whether the family lets several sequences of different lengths pass together.

        What is kept of a sequence must be keys and values alone, and positions must be given by whoever calls.
        """
        for answer in self.answers:
            others = {name for name, value in answer.inputs.items() if isinstance(value, Tensor)} - KEPT
            if others or answer.inputs.get("position_ids") is None:
                return False
        return (
            isinstance(self._cache, Cache)
            and "position_ids" in inspect.signature(self._model.forward).parameters
            and all(_is_plain(layer) for layer in self._cache.layers)
        )

    @property
    def is_cancelled(self) -> bool:
        """Whether none of the answers that have not ended is wanted any more."""
        return bool(self._alive) and all(answer.wanted.is_cancelled for answer in self._alive)

    @torch.no_grad()
    def run(self, chunk: int) -> None:
        """Make all answers; whatever ends one, or all, is with them.

        Args:
            chunk: tokens of prompts that pass the model at once, over all of them.
        """
        try:
            scores_BV = self._read_prompts(chunk)
            while True:
                for answer, scores_V in zip(self._alive, scores_BV, strict=True):
                    answer.leave_if_cancelled()
                    if not answer.is_over:
                        answer.take(scores_V)
                self._drop()
                if not self._alive:
                    return
                self._grow()
                last_B1 = torch.stack([answer.ids_1S[0, -1:] for answer in self._alive])
                scores_BV = self._pass(last_B1, is_first=False)
        except Exception as error:  # of all that have not ended: a disk that fails, or all are cancelled
            for answer in self._alive:
                answer.end(error)
            self._drop()
        finally:
            self._experts.counts_T = None

    def _read_prompts(self, chunk: int) -> Tensor:
        """Let prompts pass, and return the scores (B, V) that the first tokens are chosen by."""
        prompts = list(dict.fromkeys(tuple(answer.ids_1S[0].tolist()) for answer in self._alive))
        which = [prompts.index(tuple(answer.ids_1S[0].tolist())) for answer in self._alive]
        positions = [self.answers[which.index(number)].inputs["position_ids"] for number in range(len(prompts))]
        shared = self._shared(prompts)
        rest = max(map(len, prompts)) - shared
        ids, masks, padded = [], [], []
        for prompt, position in zip(prompts, positions, strict=True):
            padding = rest + shared - len(prompt)
            ids.append([*prompt[:shared], *[0] * padding, *prompt[shared:]])
            masks.append([1] * shared + [0] * padding + [1] * (len(prompt) - shared))
            nothing = position.new_zeros((*position.shape[:-1], padding))
            padded.append(torch.cat([position[..., :shared], nothing, position[..., shared:]], dim=-1))
        device = self._alive[0].ids_1S.device
        ids_US = torch.tensor(ids, device=device)
        mask_US, positions_US = torch.tensor(masks, device=device), torch.cat(padded, dim=-2)
        if shared:
            self._mask_BS, self._positions = mask_US[:1, :shared], positions_US.narrow(-2, 0, 1)[..., :shared]
            self._read(ids_US[:1, :shared], chunk)
            self._cache.batch_repeat_interleave(len(prompts))
        self._mask_BS, self._positions = mask_US, positions_US
        scores_UV = self._read(ids_US[:, shared:], max(1, chunk // len(prompts)))
        if which != list(range(len(prompts))):
            self._select(which)
        return scores_UV[which]

    def _shared(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Return how many tokens at the beginning of all prompts pass once; the last one of each is not among them."""
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        # Padding behind them would count in a window of the last tokens.
        is_padded = len({len(prompt) for prompt in prompts}) > 1
        if len(prompts) == 1 or shared < _SHARED or (is_padded and any(self._cache.is_sliding)):
            return 0
        return shared

    def _read(self, ids_US: Tensor, chunk: int) -> Tensor:
        """Let more tokens pass in chunks, which are the last ones of the mask; return the scores behind the last."""
        mask_US, positions = self._mask_BS, self._positions
        before = mask_US.shape[1] - ids_US.shape[1]
        scores_UV = torch.empty(0)
        for begin in range(0, ids_US.shape[1], chunk):
            part_UC = ids_US[:, begin : begin + chunk]
            end = before + begin + part_UC.shape[1]
            self._mask_BS, self._positions = mask_US[:, :end], positions[..., :end]
            scores_UV = self._pass(part_UC, is_first=before + begin == 0)
        return scores_UV

    def _pass(self, ids_BC: Tensor, *, is_first: bool) -> Tensor:
        """Let tokens pass the model, which are the last ones of the mask; return the scores behind the last."""
        is_padded = not bool(self._mask_BS.all())
        self._experts.counts_T = self._mask_BS[:, -ids_BC.shape[1] :].reshape(-1).bool() if is_padded else None
        return let_pass(
            self._model, ids_BC, self._cache, self._positions[..., -ids_BC.shape[1] :], self._alive[0].inputs,
            mask_BS=self._mask_BS if is_padded else None, is_first=is_first,
        )[:, -1]  # fmt: skip

    def _grow(self) -> None:
        """Make room in mask and positions for the token that was chosen last."""
        self._mask_BS = torch.cat([self._mask_BS, self._mask_BS.new_ones((len(self._alive), 1))], dim=1)
        self._positions = torch.cat([self._positions, self._positions[..., -1:] + 1], dim=-1)

    def _drop(self) -> None:
        """Let answers that are over leave."""
        staying = [number for number, answer in enumerate(self._alive) if not answer.is_over]
        if len(staying) == len(self._alive):
            return
        over = [answer for answer in self._alive if answer.is_over]
        self._alive = [self._alive[number] for number in staying]
        for answer in over:
            answer.tell()
        if staying:
            self._select(staying)

    def _select(self, numbers: Sequence[int]) -> None:
        """Go on with these sequences, some of them perhaps several times."""
        index = torch.tensor(numbers, device=self._mask_BS.device)
        self._cache.batch_select_indices(index)
        self._mask_BS, self._positions = self._mask_BS[index], self._positions.index_select(-2, index)


def _is_plain(layer: object) -> bool:
    """Return whether a layer of a cache keeps keys and values alone, each token's for itself, or nothing."""
    # In a window, and in a block that is rounded together, padding would count.
    more = LinearAttentionCacheLayerMixin | DynamicIndexedLayer | WindowLayer | ZipLayer
    return isinstance(layer, DynamicLayer | DummyLayer) and not isinstance(layer, more)
