"""A model in memory as a whole, on the way to be trained: what is trained of it, and how its experts are computed.

Legend: T tokens, K chosen experts, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.model.arch.experts import Experts, canonical_experts
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.seam import intercepted, routed_output


def trainable(model: PreTrainedModel, layers: Sequence[MoELayer]) -> dict[str, nn.Parameter]:
    """Return the parameters of the experts and routers of a model, by name in memory."""
    expert_prefixes = tuple(f"{layer.experts}." for layer in layers)
    routers = {name for layer in layers for name, _ in layer.router_tensors}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(expert_prefixes) or name in routers
    }


@contextmanager
def experts_apart(model: PreTrainedModel, experts: Mapping[str, Experts] | None = None) -> Iterator[None]:
    """Within the block, the experts of a model are computed one after the other, and gradients reach their tensors.

    Args:
        model: whose experts.
        experts: what stands for those of the model, by name of their module; None for its own.
    """
    stand_ins = {id(model.get_submodule(name)): entry for name, entry in (experts or {}).items()}

    def compute(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        stand_in = stand_ins.get(id(module))
        module_experts = canonical_experts(module, attached=True) if stand_in is None else stand_in
        return routed_output(module_experts.apart(), hidden_TD, index_TK, weight_TK)

    with intercepted(model, compute):
        yield
