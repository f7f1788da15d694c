"""Let a model compute what a policy leaves of its routing, whatever computes its experts.

Legend: T tokens, K chosen experts, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.model.arch.layers import MoELayer
from coterie.model.arch.seam import installed, intercepted

_Function = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(kw_only=True, slots=True)
class Spent:
    """How many experts were computed.

    Attributes:
        experts: experts of tokens, over all layers and tokens.
        tokens: tokens, each counted once a layer.
    """

    experts: int = 0
    tokens: int = 0

    @property
    def experts_per_token(self) -> float:
        """Experts that a layer computed for a token, in the mean."""
        return self.experts / max(self.tokens, 1)


class Choice(Protocol):
    """What says which experts are computed: a `coterie.route.policy.RoutePolicy`, or what acts like one."""

    def choose(self, layer: int, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return what is computed of what the router of a layer chose; see `LayerRule.choose`."""

    def check(self, top_k: Sequence[int], *, where: str) -> None:
        """Raise InputError where it is not for a model."""


@contextmanager
def routed(model: nn.Module, layers: Sequence[MoELayer], policy: Choice) -> Iterator[Spent]:
    """Within the block, a model computes what a policy leaves of what its routers choose, as it computed it before.

    Args:
        model: a model, of any form that Coterie reads; experts with a map are asked for by their own numbers.
        layers: its MoE layers.
        policy: what is left out.

    Yields:
        What is counted meanwhile.

    Raises:
        InputError: the policy is for other layers.
    """
    policy.check([layer.top_k for layer in layers], where=type(model).__name__)
    modules = {id(module): (number, _function(module)) for number, layer in enumerate(layers)
               for module in (model.get_submodule(layer.experts),)}  # fmt: skip

    spent = Spent()

    def compute(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        number, function = modules[id(module)]
        expert_map: Any = getattr(module, "coterie_expert_map", None)
        if expert_map is not None:
            index_TK = expert_map[index_TK]
        num_experts = int(module.num_experts)  # type: ignore[arg-type]
        index_TK, weight_TK = policy.choose(number, index_TK, weight_TK, num_experts)
        is_computed_TK = index_TK < num_experts
        spent.experts += int(is_computed_TK.sum())
        spent.tokens += len(index_TK)
        # Not all of transformers' implementations know "no expert": what is left out is another one, of weight 0.
        other_T1 = index_TK.gather(-1, is_computed_TK.int().argmax(dim=-1, keepdim=True)) % num_experts
        return function(module, hidden_TD, torch.where(is_computed_TK, index_TK, other_T1), weight_TK)

    with intercepted(model, compute):
        yield spent


def _function(module: nn.Module) -> _Function:
    """Return what computes a module's experts, by their own numbers."""
    function = installed(module)
    if function is not None:
        return function
    own: Any = type(module).forward
    inner = getattr(module, "coterie_inner", None)  # of a mapped result
    name = inner if inner is not None else module.config._experts_implementation  # type: ignore[union-attr]
    computes: _Function = ALL_EXPERTS_FUNCTIONS.get_interface(str(name), own.__wrapped__)
    return computes
