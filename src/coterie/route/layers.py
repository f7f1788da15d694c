"""How many experts each layer gets, where the mean over layers is given: by what leaving some out costs.

The model runs once on a little text as it is, and once more for each layer, in which that layer alone has fewer
experts; all of it in one pass over the weights, one unit in memory. KL to the model as it is, divided by the squared
size of what the layer left out, is what a unit of that costs there. Then slots go, over all layers, that cost the
least. Costs of layers are taken to add up.

Legend: T tokens, K chosen experts, J of them that can be left out, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coterie.errors import InputError
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.stream.likelihood import token_kl
from coterie.model.stream.reading import base_output, logits_at, num_logits, predictions
from coterie.model.stream.stream import Stream
from coterie.model.stream.work import unit_work
from coterie.profile.profile import Profile
from coterie.progress import track
from coterie.route.apply import routed
from coterie.route.budget import RuleName, budget_policy, worth_of
from coterie.route.policy import LayerRule, RoutePolicy


def means_by_damage(
    checkpoint: Checkpoint,
    profile: Profile,
    batches: Sequence[Tensor],
    *,
    experts_per_token: float,
    rule: RuleName = "threshold",
    device: str | torch.device = "cpu",
) -> list[float]:
    """Return how many experts each layer gets, so that their mean is as given and the damage the least.

    Args:
        checkpoint: the model.
        profile: of it.
        batches: token ids (B, S) of a little text; the costs are measured on it.
        experts_per_token: experts of a layer that are computed for a token, in the mean over layers and tokens.
        rule: how experts are told from each other.
        device: where units are computed.

    Raises:
        InputError: a layer's tokens choose fewer experts.
    """
    few = min(layer.top_k for layer in profile.layers)
    if experts_per_token > few:
        raise InputError(
            f"--experts-per-token {experts_per_token:g}: tokens of a layer choose {few}; ask for as many at most"
        )
    policy = budget_policy(profile, experts_per_token=experts_per_token, rule=rule)
    # In each of these, one layer alone has fewer.
    policies = [
        replace(policy, rules=tuple(rule if each is layer else LayerRule() for each, rule in
                                    zip(profile.layers, policy.rules, strict=True)))
        for layer in profile.layers
    ]  # fmt: skip
    divergences = divergences_of(checkpoint, profile.layers, policies, batches, device)
    return share(profile, divergences, experts_per_token, rule)


def share(
    profile: Profile, divergence_L: Sequence[float], experts_per_token: float, rule: RuleName = "threshold"
) -> list[float]:
    """Return how many experts each layer gets, given what each costs that alone has as few as the mean.

    Args:
        profile: of the model; its sample says what slots are worth.
        divergence_L: KL to the model as it is, nats.
        experts_per_token: the mean.
        rule: says what slots are worth.
    """
    costs = []
    for number, divergence in enumerate(divergence_L):
        square_TJ = worth_of(profile, number, rule).sort(dim=-1, descending=True).values[:, 1:].square()
        count = square_TJ.numel() - round((experts_per_token - 1) * len(square_TJ))
        left_out = float(square_TJ.flatten().sort().values[:count].sum()) / max(1, len(square_TJ))
        costs.append(square_TJ * (max(divergence, 0.0) / max(left_out, 1e-30)))
    pooled = torch.cat([cost_TJ.flatten() for cost_TJ in costs])
    count = round((experts_per_token - 1) * sum(map(len, costs)))
    is_kept = torch.zeros(len(pooled), dtype=torch.bool)
    is_kept[pooled.argsort(descending=True, stable=True)[:count]] = True
    parts = torch.split(is_kept, [cost_TJ.numel() for cost_TJ in costs])
    return [1 + float(part.sum()) / max(1, len(cost_TJ)) for part, cost_TJ in zip(parts, costs, strict=True)]


class _Varying:
    """A policy that is changed as the model runs; None for all experts."""

    def __init__(self) -> None:
        self.policy: RoutePolicy | None = None

    def choose(self, layer: int, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return what is computed in a layer."""
        if self.policy is None:
            return index_TK, weight_TK
        return self.policy.choose(layer, index_TK, weight_TK, num_experts)

    def check(self, top_k: Sequence[int], *, where: str) -> None:
        """Check nothing: policies of one profile are all for its model."""


def divergences_of(
    checkpoint: Checkpoint,
    layers: Sequence[MoELayer],
    policies: Sequence[RoutePolicy],
    batches: Sequence[Tensor],
    device: str | torch.device = "cpu",
) -> list[float]:
    """Return the KL (nats a token) of a model that obeys a policy to the model as it is, for each policy.

    Args:
        checkpoint: the model.
        layers: its MoE layers.
        policies: one after the other, in one pass over the weights.
        batches: token ids (B, S) of text.
        device: where units are computed.
    """
    one = _Varying()
    variants = [None, *policies]
    with Stream(checkpoint, device=device) as stream:
        run = stream.run([
            functools.partial(base_output, stream.model, ids_BS) for _ in variants for ids_BS in batches
        ])  # fmt: skip
        tokens = len(variants) * sum(ids_BS.numel() for ids_BS in batches)
        work = unit_work(stream, (), tokens=tokens, base=True)
        with routed(stream.model, layers, one):
            for stage in track(run, "what fewer experts cost", work.total, weight=work.of, largest=work.largest):
                for call in stage.calls:
                    one.policy = variants[call.job // len(batches)]
                    call.finish(call.compute())
        stream.release()
        outputs: list[Any] = run.results
        totals, num_tokens, vocabulary = [0.0] * len(policies), 0, num_logits(stream)
        with stream.head() as head:
            for batch, ids_BS in enumerate(batches):
                for positions, ids_BP in predictions(ids_BS, vocabulary):
                    base_TV = logits_at(head, ids_BS, outputs[batch], positions)[:, :-1].flatten(0, 1)
                    num_tokens += ids_BP[:, 1:].numel()
                    for number in range(len(policies)):
                        output = outputs[(number + 1) * len(batches) + batch]
                        logits_TV = logits_at(head, ids_BS, output, positions)[:, :-1].flatten(0, 1)
                        totals[number] += float(token_kl(base_TV, logits_TV).double().sum())
                stream.release()
    return [total / max(1, num_tokens) for total in totals]
