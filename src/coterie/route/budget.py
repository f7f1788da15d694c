"""A policy that spends a number of experts a token, exactly in the mean over the text of a profile.

    policy = budget_policy(profile, experts_per_token=2.5)

Each token keeps the expert that is worth most. Of the others, those are computed that are worth as much as a threshold,
which is the quantile of the profile's sample at which so many are left: no search, and exact in expectation. What is
left out is left out: the weights of the others stay, which in models that normalise them leaves a smaller sum, and does
less damage than scaling them up (`benchmarks/route.py`). What an expert is worth to a token is its weight, or its
weight times the mean size of its output; the latter leaves the least out, by size, and yet does more damage in some
models.

Layers get the same number of experts each, or what `means` says.

Legend: T tokens, K chosen experts, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from coterie.errors import InputError, UnknownName
from coterie.profile.profile import Profile
from coterie.route.policy import LayerRule, RoutePolicy

#: How it is decided which experts of a token are computed.
RuleName = Literal["threshold", "output", "share", "fewer"]
RULES: tuple[RuleName, ...] = get_args(RuleName)


def budget_policy(
    profile: Profile,
    *,
    experts_per_token: float,
    rule: RuleName = "threshold",
    renormalise: bool = False,
    means: Sequence[float] | None = None,
) -> RoutePolicy:
    """Return the policy with which a token of the profile's text gets so many experts in the mean.

    Args:
        profile: of the model; its sample gives the quantiles.
        experts_per_token: experts of a layer that are computed for a token in the mean, from 1 to what it chooses.
        rule: "threshold" asks an expert's weight to be as large as a number of the layer, "output" its weight times the
            mean norm of its outputs; "share" adds experts until a share of the token's weight is reached; "fewer" gives
            every token the same number, a whole one.
        renormalise: scale the weights that are left to the sum that they had.
        means: experts of each layer, in place of the same in all.

    Raises:
        InputError: a number out of range, not one for each layer, or a rule that has only whole numbers.
        UnknownName: there is no such rule, or the profile does not hold what it needs.
    """
    if rule not in RULES:
        raise UnknownName("rule", rule, RULES)
    if means is not None and len(means) != len(profile.layers):
        raise InputError(f"{len(means)} numbers of experts for {len(profile.layers)} layers: give one for each")
    rules = []
    for number, layer in enumerate(profile.layers):
        mean = experts_per_token if means is None else means[number]
        if not 1 <= mean <= layer.top_k:
            raise InputError(
                f"--experts-per-token {mean:g}: a token of layer {layer.index} chooses {layer.top_k} experts; ask for "
                f"1 to {layer.top_k}"
            )
        rules.append(_rule(profile, number, mean, rule, renormalise=renormalise))
    policy = RoutePolicy(
        model=profile.model_digest, rules=tuple(rules), top_k=tuple(layer.top_k for layer in profile.layers),
        experts_per_token=0, origin=f"{experts_per_token:g} experts a token by {rule}",
    )  # fmt: skip
    return replace(policy, experts_per_token=float(experts_of(policy, profile).mean()))


def experts_of(policy: RoutePolicy, profile: Profile) -> Tensor:
    """Return how many experts a token of a profile's sample gets in each layer, in the mean: (L,), float64."""
    means = []
    for number, layer in enumerate(profile.layers):
        sample = profile.samples[number]
        index_TK, _ = policy.choose(number, sample.index_TK.long(), sample.weight_TK, layer.num_experts)
        means.append((index_TK < layer.num_experts).sum(-1).double().mean())
    return torch.stack(means)


def worth_of(profile: Profile, number: int, rule: RuleName) -> Tensor:
    """Return what the slots of a layer's sample are worth to a rule (T, K), float64."""
    layer, sample = profile.layers[number], profile.samples[number]
    index_TK = sample.index_TK.long()
    weight_TK = sample.weight_TK.double().masked_fill(index_TK >= layer.num_experts, 0)
    if rule != "output":
        return weight_TK
    size_E = torch.tensor(_sizes(profile, number), dtype=torch.float64)
    return weight_TK * size_E[index_TK.clamp(max=len(size_E) - 1)]


def _sizes(profile: Profile, number: int) -> tuple[float, ...]:
    """Return the mean norm of the outputs of each expert of a layer; the mean of all for one that nobody chose."""
    uses_E, norm_E = profile.sum(number, "usage"), profile.sum(number, "output_norm")
    typical = norm_E.sum() / uses_E.sum().clamp_min(1)
    return tuple(torch.where(uses_E > 0, norm_E / uses_E.clamp_min(1), typical).tolist())


def _rule(profile: Profile, number: int, mean: float, rule: RuleName, *, renormalise: bool) -> LayerRule:
    """Return the rule of one layer."""
    if rule == "fewer":
        if mean != int(mean):
            raise InputError(f"the rule 'fewer' gives every token a whole number of experts, and {mean:g} is none")
        return LayerRule(most=int(mean), renormalise=renormalise)
    sample = profile.samples[number]
    wanted = (mean - 1) * len(sample.index_TK)
    worth_TK = worth_of(profile, number, rule)
    if rule == "share":
        # Where in its token each expert begins: it is computed if that is before the share.
        sorted_TK = worth_TK.sort(dim=-1, descending=True).values
        begin_TK = (sorted_TK.cumsum(-1) - sorted_TK) / sorted_TK.sum(-1, keepdim=True).clamp_min(1e-30)
        ordered = begin_TK[:, 1:].flatten().sort().values
        return LayerRule(share=_cut(ordered, wanted, none=0.0, whole=1.0), renormalise=renormalise)
    worth = _sizes(profile, number) if rule == "output" else ()
    ordered = worth_TK.sort(dim=-1, descending=True).values[:, 1:].flatten().sort(descending=True).values
    above = 2 * float(ordered[0]) if len(ordered) else 0.0
    return LayerRule(
        threshold=_cut(ordered, wanted, none=above, whole=0.0), worth=worth, renormalise=renormalise
    )  # fmt: skip


def _cut(ordered: Tensor, wanted: float, *, none: float, whole: float) -> float:
    """Return a number between the values of slots that are computed and those that are not, the former first.

    Args:
        ordered: values of all slots but the best of each token.
        wanted: how many of them are computed.
        none: the number where none is.
        whole: the number where all are.
    """
    count = round(wanted)
    if count <= 0:
        return none
    return whole if count >= len(ordered) else float(ordered[count - 1] + ordered[count]) / 2
