"""Which of the experts that a token chose are computed: rules by layer, and the file that holds them.

A policy looks at what the router has decided and leaves out some of it. It needs nothing but the chosen experts and
their weights, so it works with every family, and in place of the experts (`coterie.model.arch.seam`).

Legend: T tokens, K chosen experts, E experts. An index equal to E means "no expert".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.artifact import open_artifact, write_artifact
from coterie.errors import CorruptArtifact, InputError
from coterie.fields import Fields

KIND = "route"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRule:
    """What a layer leaves out. Of a token's experts, the one that is worth most is always computed.

    Attributes:
        most: experts of a token at most, those that are worth most; None for as many as it chose.
        share: experts are computed until their weights reach this share of the token's whole weight; 1 for all.
        threshold: an expert is computed only if it is worth as much.
        worth: what an expert's weight is multiplied by for what it is worth, by its number; empty for the weight alone.
        renormalise: scale the weights that are left to the sum that they had.
    """

    most: int | None = None
    share: float = 1.0
    threshold: float = 0.0
    worth: tuple[float, ...] = ()
    renormalise: bool = False

    def choose(self, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return the experts that are computed (T, K) and their weights (T, K): E, and 0, for those that are not.

        Args:
            index_TK: what the router chose, in any order.
            weight_TK: routing weights, none negative.
            num_experts: E.

        Raises:
            InputError: the rule knows what another number of experts is worth.
        """
        is_expert_TK = index_TK < num_experts
        worth_TK = self._worth(index_TK, weight_TK, num_experts).masked_fill(~is_expert_TK, -torch.inf)
        order_TK = worth_TK.argsort(dim=-1, descending=True, stable=True)
        rank_TK = order_TK.argsort(dim=-1)
        keep_TK = worth_TK >= self.threshold
        if self.most is not None:
            keep_TK &= rank_TK < self.most
        if self.share < 1:
            sorted_TK = weight_TK.float().masked_fill(~is_expert_TK, 0).gather(-1, order_TK)
            before_TK = (sorted_TK.cumsum(-1) - sorted_TK).gather(-1, rank_TK)
            keep_TK &= before_TK < self.share * sorted_TK.sum(-1, keepdim=True)
        keep_TK = (keep_TK | (rank_TK == 0)) & is_expert_TK
        left_TK = weight_TK.masked_fill(~keep_TK, 0)
        if self.renormalise:
            whole_T1 = weight_TK.masked_fill(~is_expert_TK, 0).sum(-1, keepdim=True)
            left_T1 = left_TK.sum(-1, keepdim=True)
            left_TK = torch.where(left_T1 > 0, left_TK * (whole_T1 / left_T1), left_TK)
        return index_TK.masked_fill(~keep_TK, num_experts), left_TK

    def _worth(self, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Tensor:
        if not self.worth:
            return weight_TK.float()
        if len(self.worth) != num_experts:
            raise InputError(
                f"the policy knows what {len(self.worth)} experts of a layer are worth, and the layer has "
                f"{num_experts}; make one for this model with `coterie route`"
            )
        worth_E = torch.tensor(self.worth, device=weight_TK.device)
        return weight_TK.float() * worth_E[index_TK.clamp(max=num_experts - 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutePolicy:
    """How many experts a token gets in each layer.

    Attributes:
        model: digest of the model that it was made for; empty for any.
        rules: one for each MoE layer.
        top_k: K of each layer, which the rules are made for.
        experts_per_token: experts that are computed for a token of a layer, in the mean over the text it was made on.
        origin: how it was made, for people.
        divergence: KL to the model with all experts on the text that it was measured on, nats a token; None where it
            was not.
    """

    model: str
    rules: tuple[LayerRule, ...]
    top_k: tuple[int, ...]
    experts_per_token: float
    origin: str = ""
    divergence: float | None = None

    def choose(self, layer: int, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return what is computed of what the router of a layer chose; see `LayerRule.choose`."""
        return self.rules[layer].choose(index_TK, weight_TK, num_experts)

    def __str__(self) -> str:
        cost = "not measured" if self.divergence is None else f"{self.divergence:.2g} nats a token"
        return f"{self.experts_per_token:.2f} experts a token; what that costs: {cost}"

    def check(self, top_k: Sequence[int], *, where: str) -> None:
        """Raise InputError where a model has other layers, or its tokens choose another number of experts.

        Args:
            top_k: K of each MoE layer of the model.
            where: what the model is called.
        """
        if tuple(top_k) != self.top_k:
            raise InputError(
                f"the policy is for {len(self.top_k)} layers in which a token chooses {_list(self.top_k)} experts, and "
                f"{where} has {len(top_k)} in which it chooses {_list(top_k)}; make one for this model with "
                "`coterie route`"
            )

    def save(self, path: Path) -> None:
        """Write it as a JSON file, which people may read and edit."""
        body: dict[str, Any] = {
            "origin": self.origin, "experts_per_token": self.experts_per_token,
            "divergence": self.divergence,
            "layers": [
                {
                    "top_k": top_k, "most": rule.most, "share": rule.share, "threshold": rule.threshold,
                    "renormalise": rule.renormalise, "worth": list(rule.worth),
                }
                for top_k, rule in zip(self.top_k, self.rules, strict=True)
            ],
        }  # fmt: skip
        write_artifact(path, kind=KIND, body=body, inputs={"model": self.model})

    @classmethod
    def of(cls, route: RoutePolicy | str | Path | None) -> RoutePolicy | None:
        """Return a policy that is given as one, or as its file; see `load` for what is raised."""
        return cls.load(route) if isinstance(route, str | Path) else route

    @classmethod
    def load(cls, path: str | Path) -> RoutePolicy:
        """Read one, edited by hand or not.

        Raises:
            CorruptArtifact: there is none, or it says what cannot be.
            StaleArtifact: a newer version wrote it.
        """
        artifact = open_artifact(Path(path), kind=KIND, edited=True)
        fields = Fields(artifact.body, where=str(path))
        with fields.all_read():
            origin, mean = fields.text("origin"), fields.number("experts_per_token", least=0)
            divergence = None if fields.null("divergence") else fields.number("divergence", least=0)
            layers = [_rule(each) for each in fields.each("layers")]
        if not layers:
            raise CorruptArtifact(f"{path}: holds no layers; make it anew with `coterie route`")
        return cls(
            model=str(artifact.inputs.get("model", "")), rules=tuple(rule for _, rule in layers),
            top_k=tuple(top_k for top_k, _ in layers), experts_per_token=mean, origin=origin, divergence=divergence,
        )  # fmt: skip


def uniform_policy(rule: LayerRule, top_k: Sequence[int], *, experts_per_token: float, origin: str) -> RoutePolicy:
    """Return the policy of one rule in all layers, for any model whose tokens choose so many experts."""
    return RoutePolicy(
        model="", rules=(rule,) * len(top_k), top_k=tuple(top_k), experts_per_token=experts_per_token, origin=origin
    )


def _rule(fields: Fields) -> tuple[int, LayerRule]:
    """Return K of a layer, and its rule."""
    with fields.all_read():
        top_k = fields.whole("top_k", least=1)
        rule = LayerRule(
            share=fields.number("share", least=0), threshold=fields.number("threshold", least=0),
            renormalise=fields.yes_or_no("renormalise"), worth=fields.numbers("worth", least=0),
        )  # fmt: skip
        if fields.null("most"):
            return top_k, rule
        return top_k, replace(rule, most=fields.whole("most", least=1))


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in sorted(set(numbers)))
