"""Distil: train the experts and routers of a compressed model towards what the original model predicts.

The original's predictions are kept as the log-probabilities of its most probable tokens (`Targets`), made while it
streams by one layer at a time; only the compressed model is in memory as a whole. The loss is the Kullback-Leibler
divergence from the original over those tokens and one class for all others, which is never more than the divergence
over all tokens. Steps are those of `coterie.compress.adam` on float32 weights. Sequences are seen once an epoch, in a
seeded order.

Legend: B sequences, S tokens of a sequence, V vocabulary, K tokens kept for each target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.compress.adam import Adam, rate_at
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.seam import intercepted, routed_output


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What the original model predicts behind every token of some sequences.

    Attributes:
        token_BSK: its most probable tokens, int32.
        log_probability_BSK: their log-probabilities in nats, float32.
    """

    token_BSK: Tensor
    log_probability_BSK: Tensor

    @classmethod
    def of(cls, logits_BSV: Tensor, count: int) -> Targets:
        """Keep the `count` most probable tokens of logits."""
        found = logits_BSV.float().log_softmax(-1).topk(min(count, logits_BSV.shape[-1]), dim=-1)
        return cls(token_BSK=found.indices.int().cpu(), log_probability_BSK=found.values.cpu())

    @classmethod
    def joined(cls, parts: Sequence[Targets]) -> Targets:
        """Put the targets of several batches together."""
        return cls(
            token_BSK=torch.cat([part.token_BSK for part in parts]),
            log_probability_BSK=torch.cat([part.log_probability_BSK for part in parts]),
        )

    def select(self, rows: Tensor) -> Targets:
        """Return the targets of some of the sequences."""
        return Targets(token_BSK=self.token_BSK[rows], log_probability_BSK=self.log_probability_BSK[rows])

    def divergence(self, logits_BSV: Tensor) -> Tensor:
        """Return the mean divergence of a model with these logits from the original, nats per token."""
        log_q_BSV = logits_BSV.float().log_softmax(-1)
        log_p_BSK = self.log_probability_BSK.to(log_q_BSV.device)
        log_q_BSK = log_q_BSV.gather(-1, self.token_BSK.to(log_q_BSV.device).long())
        p_BSK = log_p_BSK.exp()
        found_BS = (p_BSK * (log_p_BSK - log_q_BSK)).sum(-1)
        if log_p_BSK.shape[-1] < log_q_BSV.shape[-1]:
            tiny = torch.finfo(torch.float32).tiny
            rest_p_BS = (1 - p_BSK.sum(-1)).clamp(min=tiny)
            rest_q_BS = (1 - log_q_BSK.exp().sum(-1)).clamp(min=1e-7)
            found_BS = found_BS + rest_p_BS * (rest_p_BS.log() - rest_q_BS.log())
        return found_BS.mean()


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How a model is trained.

    Attributes:
        steps: steps of the optimizer.
        sequences: sequences in a step.
        micro: sequences that are computed at once.
        seed: seed of the order of the sequences.
    """

    steps: int
    sequences: int = 8
    micro: int = 2
    seed: int = 0

    def rows(self, step: int, count: int) -> Tensor:
        """Return which of `count` sequences a step sees; each is seen once before one is seen again."""
        wanted = range(step * self.sequences, (step + 1) * self.sequences)
        orders = {
            epoch: torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + epoch))
            for epoch in {number // count for number in wanted}
        }
        return torch.stack([orders[number // count][number % count] for number in wanted])


class Distillation:
    """A compressed model on its way.

    Attributes:
        weights: the trained tensors by name in memory, float32; those of the model itself.
        adam: the optimizer; its state is all that the next step depends on.
        rate: largest step of an entry, relative to the root mean square of its tensor; it may be set until the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[MoELayer],
        schedule: Schedule,
        *,
        rate: float = 0.0,
        workers: int = 1,
    ) -> None:
        """Prepare a model.

        Args:
            model: the compressed model, float32, in memory as a whole; its experts and routers are changed.
            layers: its MoE layers.
            schedule: how it is trained.
            rate: see the attribute.
            workers: threads that share out a step; the result does not depend on it.
        """
        self._model = model
        self._schedule = schedule
        self.rate = rate
        self._workers = workers
        model.requires_grad_(False)
        self.weights = trainable(model, layers)
        for tensor in self.weights.values():
            tensor.requires_grad_(True)
        self.adam = Adam(self.weights)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.adam.steps

    def advance(self, ids_BS: Tensor, targets: Targets) -> float:
        """Take one step on its share of the sequences; return the mean divergence before it, nats per token."""
        rows_B = self._schedule.rows(self.step, len(ids_BS))
        parts = [(ids_BS[rows], targets.select(rows)) for rows in torch.split(rows_B, self._schedule.micro)]
        with self._training():
            results = self._share_out(self._gradients, parts)
        loss: float = sum(loss * len(ids) for (loss, _), (ids, _) in zip(results, parts, strict=True)) / len(rows_B)
        shares = [len(ids) / len(rows_B) for ids, _ in parts]
        mean = [
            sum((share * gradient for share, gradient in zip(shares, gradients, strict=True)), torch.zeros(()))
            for gradients in zip(*(gradients for _, gradients in results), strict=True)
        ]
        self.adam.step(mean, rate_at(self.step, self._schedule.steps, self.rate))
        return loss

    def measure(self, ids_BS: Tensor, targets: Targets) -> float:
        """Return the mean divergence on sequences, nats per token."""
        rows = torch.split(torch.arange(len(ids_BS)), self._schedule.micro)
        parts = [(ids_BS[part], targets.select(part)) for part in rows]
        with self._training():
            losses = self._share_out(self._summed_loss, parts)
        return float(sum(losses) / len(ids_BS))

    def _gradients(self, part: tuple[Tensor, Targets]) -> tuple[float, tuple[Tensor, ...]]:
        with torch.enable_grad():
            loss = self._loss(*part)
            # A bias that only decides which experts are chosen may be a parameter, and nothing depends on it smoothly.
            weights = list(self.weights.values())
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            return float(loss.detach()), gradients

    def _summed_loss(self, part: tuple[Tensor, Targets]) -> float:
        with torch.no_grad():  # holds for one thread only
            return float(self._loss(*part)) * len(part[0])

    def _loss(self, ids_BS: Tensor, targets: Targets) -> Tensor:
        logits_BSV: Tensor = self._model(input_ids=ids_BS.to(self._model.device), use_cache=False).logits
        return targets.divergence(logits_BSV)

    def _share_out(self, function: Any, parts: Sequence[Any]) -> list[Any]:
        if self._workers == 1:
            return [function(part) for part in parts]
        with _one_thread(), ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(function, parts))

    @contextmanager
    def _training(self) -> Iterator[None]:
        def compute(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
            return routed_output(canonical_experts(module, attached=True).apart(), hidden_TD, index_TK, weight_TK)

        with intercepted(self._model, compute):
            yield


def trainable(model: PreTrainedModel, layers: Sequence[MoELayer]) -> dict[str, nn.Parameter]:
    """Return the parameters of the experts and routers of a model, by name in memory."""
    wanted = tuple(f"{layer.experts}." for layer in layers)
    routers = {name for layer in layers for name, _ in layer.router_tensors}
    return {
        name: parameter for name, parameter in model.named_parameters() if name.startswith(wanted) or name in routers
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
