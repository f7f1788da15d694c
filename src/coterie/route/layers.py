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
from typing import Any

import torch
from torch import Tensor

from coterie.errors import InputError
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.stream.likelihood import token_kl
from coterie.model.stream.reading import base_output, logits_at, predictions
from coterie.model.stream.stream import Stream
from coterie.model.stream.work import unit_work
from coterie.profile.profile import Profile
from coterie.profile.text import CalibrationText, TextSettings
from coterie.progress import track
from coterie.route.apply import routed
from coterie.route.budget import budget_policy, worth_of
from coterie.route.policy import RoutePolicy


def means_by_damage(
    checkpoint: Checkpoint,
    profile: Profile,
    text: TextSettings,
    *,
    experts_per_token: float,
    device: str | torch.device = "cpu",
) -> list[float]:
    """Return how many experts each layer gets, so that their mean is as given and the damage the least.

    Args:
        checkpoint: the model.
        profile: of it.
        text: a little text; the costs are measured on it.
        experts_per_token: experts of a layer that are computed for a token, in the mean over layers and tokens.
        device: where units are computed.

    Raises:
        InputError: a layer's tokens choose fewer experts.
        TextError: there is no such text, or too little.
    """
    few = min(layer.top_k for layer in profile.layers)
    if experts_per_token > few:
        raise InputError(
            f"--experts-per-token {experts_per_token:g}: tokens of a layer choose {few}; ask for as many at most"
        )
    policy = budget_policy(profile, experts_per_token=experts_per_token)
    batches = [ids_BS for _, ids_BS in CalibrationText(checkpoint, text).draw().batches(8)]
    return share(profile, divergences_of(checkpoint, profile, policy, batches, device), experts_per_token)


def share(profile: Profile, divergence_L: Sequence[float], experts_per_token: float) -> list[float]:
    """Return how many experts each layer gets, given what each costs that alone has as few as the mean.

    Args:
        profile: of the model; its sample says what slots are worth.
        divergence_L: KL to the model as it is, nats.
        experts_per_token: the mean.
    """
    costs = []
    for number, divergence in enumerate(divergence_L):
        square_TJ = worth_of(profile, number).sort(dim=-1, descending=True).values[:, 1:].square()
        count = square_TJ.numel() - round((experts_per_token - 1) * len(square_TJ))
        left_out = float(square_TJ.flatten().sort().values[:count].sum()) / max(1, len(square_TJ))
        costs.append(square_TJ * (max(divergence, 0.0) / max(left_out, 1e-30)))
    pooled = torch.cat([cost_TJ.flatten() for cost_TJ in costs])
    count = round((experts_per_token - 1) * sum(map(len, costs)))
    is_kept = torch.zeros(len(pooled), dtype=torch.bool)
    is_kept[pooled.argsort(descending=True, stable=True)[:count]] = True
    parts = torch.split(is_kept, [cost_TJ.numel() for cost_TJ in costs])
    return [1 + float(part.sum()) / max(1, len(cost_TJ)) for part, cost_TJ in zip(parts, costs, strict=True)]


class _OneLayer:
    """A policy of which one layer takes note, or none; which one is changed as the model runs."""

    def __init__(self, policy: RoutePolicy) -> None:
        self.layer: int | None = None
        self.check = policy.check
        self._policy = policy

    def choose(self, layer: int, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return what is computed in a layer."""
        if layer != self.layer:
            return index_TK, weight_TK
        return self._policy.choose(layer, index_TK, weight_TK, num_experts)


def divergences_of(
    checkpoint: Checkpoint,
    profile: Profile,
    policy: RoutePolicy,
    batches: Sequence[Tensor],
    device: str | torch.device,
) -> list[float]:
    """Return the KL (nats a token) of the model in which one layer alone obeys a policy, for each layer."""
    one = _OneLayer(policy)
    variants = [None, *range(len(profile.layers))]
    with Stream(checkpoint, device=device) as stream:
        run = stream.run([
            functools.partial(base_output, stream.model, ids_BS) for _ in variants for ids_BS in batches
        ])  # fmt: skip
        tokens = len(variants) * sum(ids_BS.numel() for ids_BS in batches)
        work = unit_work(stream, (), tokens=tokens, base=True)
        with routed(stream.model, profile.layers, one):
            for stage in track(run, "what each layer needs", work.total, weight=work.of, largest=work.largest):
                for call in stage.calls:
                    one.layer = variants[call.job // len(batches)]
                    call.finish(call.compute())
        stream.release()
        outputs: list[Any] = run.results
        totals, num_tokens, vocabulary = [0.0] * len(profile.layers), 0, _vocabulary(stream)
        with stream.head() as head:
            for batch, ids_BS in enumerate(batches):
                for positions, ids_BP in predictions(ids_BS, vocabulary):
                    base_TV = logits_at(head, ids_BS, outputs[batch], positions)[:, :-1].flatten(0, 1)
                    num_tokens += ids_BP[:, 1:].numel()
                    for layer in range(len(totals)):
                        output = outputs[(layer + 1) * len(batches) + batch]
                        logits_TV = logits_at(head, ids_BS, output, positions)[:, :-1].flatten(0, 1)
                        totals[layer] += float(token_kl(base_TV, logits_TV).double().sum())
                stream.release()
    return [total / max(1, num_tokens) for total in totals]


def _vocabulary(stream: Stream) -> int:
    """Return how many scores the model gives."""
    config: Any = stream.model.config.get_text_config()
    return int(config.vocab_size)
