"""A run rehearsed for some seconds: its own loop, threads, reads and products, with weights that mean nothing.

What every token passes is filled with one number and of the right size; experts are read from the model's own files,
as many of a layer as a run would miss, and computed. So whatever takes time in a run takes it here: products, threads
that read on the processor that computes, the family's modules, drawing a token, writing its text, and what other
programs do meanwhile.

Legend: T tokens, D model width, K chosen experts, L layers, E experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.utils import GENERATION_CONFIG_NAME

from coterie.model.arch.layers import MoELayer
from coterie.model.arch.load import checkpoint_meta_model
from coterie.model.arch.seam import intercepted
from coterie.model.quiet import quiet
from coterie.run.arena import Arena
from coterie.run.experts import StreamedExperts
from coterie.run.prepare import Prepared
from coterie.run.probe import BEYOND_CACHES, zero_biases
from coterie.run.reader import Reader
from coterie.run.records import slot_bytes
from coterie.run.residency import Residency
from coterie.run.resident import fill_resident, kernel_tensors

#: Seconds that tokens are made for, and that a chunk of a prompt may take.
SECONDS = 4.0

#: Tokens that are made first and not counted, and at least after them; tokens of the prompt before.
_WARM, _FEWEST, _PROMPT = 2, 3, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What was measured.

    Attributes:
        token: seconds of a token behind the prompt.
        num_tokens: tokens that this is the mean of.
        hits: share of what they chose that was in memory.
        chunk: seconds of a first chunk of a prompt until the first token, with no expert in memory.
        waiting: seconds of these in which an expert was waited for.
    """

    token: float
    num_tokens: int
    hits: float
    chunk: float
    waiting: float


def rehearse(
    prepared: Prepared,
    *,
    rate: float,
    chunk: int,
    asked: float,
    policy: str,
    lanes: int,
    direct: bool,
    seconds: float = SECONDS,
) -> Rehearsal:
    """Rehearse a run; takes no more memory than the run.

    Args:
        prepared: the run.
        rate: share of what tokens choose that is in memory.
        chunk: tokens of a prompt that pass the model at once.
        asked: share of a layer's experts that a chunk asks for.
        policy: which experts stay in memory.
        lanes: threads that read.
        direct: read past the page cache, where the file system can.
        seconds: how long tokens are made, and how long a chunk may take; of one that takes longer a part is rehearsed.
    """
    model: Any = checkpoint_meta_model(prepared.checkpoint, dtype=prepared.dtype)
    kernels = kernel_tensors(prepared.checkpoint, prepared.conversion, prepared.apart)
    fill_resident(model, room=BEYOND_CACHES, kernels=kernels)
    layers, tokenizer = prepared.architecture.layers, prepared.tokenizer
    for layer in layers:
        module = model.get_submodule(layer.experts)
        zero_biases(module, prepared.dtype)
        if getattr(module, "coterie_expert_map", None) is not None:  # experts are named by their own numbers here
            module.coterie_expert_map = None
    settings: Any = GenerationConfig()  # type: ignore[no-untyped-call]
    if (prepared.checkpoint.path / GENERATION_CONFIG_NAME).is_file():
        settings = GenerationConfig.from_pretrained(prepared.checkpoint.path)
    settings.eos_token_id = None  # a token that ends the answer may be drawn
    model.generation_config = settings
    slot, draw = slot_bytes(prepared.records.values()), random.Random(0)
    num_slots = min(prepared.budget.num_slots, _slots_for(prepared, slot))
    reader = Reader(lanes=lanes, direct=direct)
    with Residency(Arena(num_slots, slot), reader, prepared.records, policy) as residency:
        streamed = StreamedExperts(
            model, prepared.places, residency, num_slots=num_slots, dtype=prepared.dtype
        )  # fmt: skip
        stage = _Stage(model, streamed, residency, prepared, draw)

        def generate(tokens: int, limit: float, most: int) -> list[float]:
            """Return when each token came, in seconds from the beginning."""
            ids_1S = torch.zeros((1, tokens), dtype=torch.int64)
            clock, begun = _Clock(tokenizer, limit), time.perf_counter()
            with quiet(), torch.no_grad(), intercepted(model, stage.compute):
                model.generate(
                    ids_1S, attention_mask=torch.ones_like(ids_1S), streamer=clock, max_new_tokens=most,
                    stopping_criteria=StoppingCriteriaList([clock.over]), remove_invalid_values=True, pad_token_id=0,
                )  # fmt: skip
            return [moment - begun for moment in clock.moments]

        room = min(prepared.context - 1, 512)
        generate(min(_PROMPT, room), 0, 2)  # what is done once in a process is no time of a prompt
        stage.play_chunk(asked, seconds)
        try:
            first = generate(chunk, seconds, 1)[0]
        except _TooLongError:
            first = time.perf_counter() - stage.begun
        part, waiting = stage.layers_played / len(layers), residency.counters.wait_seconds
        stage.fill(num_slots)
        before = residency.counters
        stage.play_tokens(rate)
        moments = generate(min(_PROMPT, room), seconds, max(_WARM + _FEWEST + 1, room - _PROMPT))
        each = [after - before for before, after in pairwise(moments)][_WARM:]
        after = residency.counters
        hits, misses = after.hits - before.hits, after.misses - before.misses
        return Rehearsal(
            token=fmean(each) - stage.beside / len(moments), num_tokens=len(each), hits=hits / max(hits + misses, 1),
            chunk=first / part, waiting=waiting / part,
        )  # fmt: skip


def _slots_for(prepared: Prepared, slot: int) -> int:
    """Return how many experts are in memory, so that they do not come from the processor's own."""
    layers = prepared.architecture.layers
    most = max(max(2 * layer.top_k, layer.num_experts) for layer in layers)
    return min(len(prepared.records), max(most, BEYOND_CACHES // slot))


class _TooLongError(Exception):
    """A chunk takes longer than there is time."""


class _Stage:
    """What stands in the place of the experts: real ones, as many of which are missing as is asked for."""

    def __init__(
        self, model: nn.Module, streamed: StreamedExperts, residency: Residency, prepared: Prepared, draw: random.Random
    ) -> None:
        self._streamed, self._residency, self._draw, self._dtype = streamed, residency, draw, prepared.dtype
        self._layers = prepared.architecture.layers
        self._modules = {layer.index: model.get_submodule(layer.experts) for layer in self._layers}
        self._play: Callable[[nn.Module, Tensor, int], None] | None = None
        self._rate = self._asked = self._seconds = 0.0
        self.begun = self.beside = 0.0  # when a chunk began; seconds of choosing, which no run has
        self.layers_played = 0

    def fill(self, num_slots: int) -> None:
        """Have experts of as many layers in memory as there is room for twice what a token chooses of each."""
        top_k, num_experts = self._layers[0].top_k, self._layers[0].num_experts
        count = max(1, min(len(self._layers), num_slots // (2 * top_k)))
        size = min(num_slots // count, max(1, num_experts - top_k))  # so that others are missing
        for layer in self._layers[:count]:
            with self._residency.acquire(layer.index, range(size)) as leases:
                for lease in leases:
                    del lease  # it holds memory of the arena

    def play_tokens(self, rate: float) -> None:
        """From now on, tokens one by one find a share of their experts in memory."""
        self._play, self._rate = self._token, rate

    def play_chunk(self, asked: float, seconds: float) -> None:
        """From now on, a chunk asks for a share of each layer's experts, none of which is in memory."""
        self._play, self._asked, self._seconds = self._chunk, asked, seconds
        self.begun, self.layers_played = time.perf_counter(), 0

    def compute(self, module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Compute some experts, and return zeros."""
        if self._play is not None:
            self._play(module, hidden_TD.to(self._dtype), index_TK.shape[-1])
        return torch.zeros_like(hidden_TD)

    def _token(self, module: nn.Module, hidden_TD: Tensor, top_k: int) -> None:
        if len(hidden_TD) > 1:  # the prompt before, which is played apart
            return
        begun = time.perf_counter()
        num_missing = sum(self._draw.random() >= self._rate for _ in range(top_k))
        in_memory = self._residency.in_memory()

        # Any layer will do, as all are alike: one that has as many in memory as are to be there, and as few.
        def lacking(layer: MoELayer) -> int:
            there = len(in_memory[layer.index])
            return max(0, top_k - num_missing - there) + max(0, num_missing - (layer.num_experts - there))

        layer = min(self._layers, key=lambda each: (lacking(each), self._draw.random()))
        own = in_memory[layer.index]
        there = self._draw.sample(own, min(top_k - num_missing, len(own)))
        others = sorted(set(range(layer.num_experts)) - set(own))
        missing = self._draw.sample(others, min(num_missing, len(others)))
        index_1K = torch.tensor([[*there, *missing]])
        weight_1K = torch.full(index_1K.shape, 1 / top_k, dtype=self._dtype)
        self.beside += time.perf_counter() - begun
        self._streamed.compute(self._modules[layer.index], hidden_TD, index_1K, weight_1K)

    def _chunk(self, module: nn.Module, hidden_TD: Tensor, top_k: int) -> None:
        if self.layers_played and time.perf_counter() - self.begun > self._seconds:
            raise _TooLongError
        [layer] = [each for each in self._layers if self._modules[each.index] is module]
        chosen = torch.tensor(
            self._draw.sample(range(layer.num_experts), max(top_k, round(self._asked * layer.num_experts)))
        )
        index_TK = chosen[torch.rand(len(hidden_TD), len(chosen)).topk(top_k).indices]
        weight_TK = torch.full(index_TK.shape, 1 / top_k, dtype=self._dtype)
        self._streamed.compute(module, hidden_TD, index_TK, weight_TK)
        self.layers_played += 1


class _Clock(TextStreamer):
    """Notes when each token comes, and writes its text nowhere."""

    def __init__(self, tokenizer: Any, limit: float) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.moments: list[float] = []
        self.over = _Over(self.moments, limit)
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        if self._has_prompt:
            self.moments.append(time.perf_counter())
        self._has_prompt = True
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that no later token changes."""


class _Over(StoppingCriteria):
    """Ends a generation when its time is over and enough tokens came."""

    def __init__(self, moments: Sequence[float], limit: float) -> None:
        self._moments, self._limit = moments, limit

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Say whether the token that was chosen last is the last one."""
        enough = len(self._moments) > _WARM + _FEWEST
        is_over = enough and self._moments[-1] - self._moments[0] > self._limit
        return torch.tensor([is_over], device=input_ids.device)
