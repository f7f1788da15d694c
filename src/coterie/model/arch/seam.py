"""The one seam: Coterie's own functions in place of the experts, registered with transformers.

transformers calls the experts of (almost) every MoE family as ``experts(hidden_TD, index_TK, weight_TK) -> out_TD``.
Whoever registers a function there sees the experts module and the routing decision that the family really made.

Legend: E experts, D model width, T tokens, K chosen experts. An index equal to E means "no expert".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.model.arch.experts import Experts, is_experts

ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

_NAME = "coterie"
_active: dict[int, ExpertsFunction] = {}


def _dispatch(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return _active[id(module)](module, hidden_TD, index_TK, weight_TK)


ALL_EXPERTS_FUNCTIONS.register(_NAME, _dispatch)


@contextmanager
def intercepted(model: PreTrainedModel, function: ExpertsFunction) -> Iterator[None]:
    """Within the block, every experts module of `model` computes `function(module, hidden, index, weight)` instead.

    Blocks may be nested; the innermost function counts, and what was set before comes back after each.
    """
    modules = [module for module in model.modules() if is_experts(module)]
    configs = {id(module.config): module.config for module in modules}
    before = {key: config._experts_implementation for key, config in configs.items()}  # type: ignore[union-attr]
    outer = {id(module): _active.get(id(module)) for module in modules}
    _active.update({id(module): function for module in modules})
    try:
        for config in configs.values():
            config._experts_implementation = _NAME  # type: ignore[union-attr]
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]  # type: ignore[union-attr]
        for module_id, previous in outer.items():
            if previous is None:
                _active.pop(module_id, None)
            else:
                _active[module_id] = previous


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Within the block, `module` runs the loop that its own family defines, whatever was set before."""
    config = module.config
    before = config._experts_implementation  # type: ignore[union-attr]
    try:
        config._experts_implementation = "eager"  # type: ignore[union-attr]
        yield
    finally:
        config._experts_implementation = before  # type: ignore[union-attr]


def routed_output(
    experts: Experts,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    *,
    visit: Callable[[int, Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Compute ``y_t = sum_k weight_tk f_index_tk(x_t)`` from canonical experts, one expert at a time.

    Args:
        experts: the experts of the layer.
        hidden_TD: the inputs.
        index_TK: chosen experts; an index of E or more means "no expert".
        weight_TK: routing weights.
        visit: called for every chosen expert with (expert, token_N, slot_N, hidden_NF, output_ND): the rows it was
            chosen for, and its activations and outputs there, without the routing weight.

    Returns:
        The routed output (T, D), summed in float32 or wider, in the dtype of `hidden_TD`.
    """
    total_TD = torch.zeros(
        hidden_TD.shape, dtype=torch.promote_types(hidden_TD.dtype, torch.float32), device=hidden_TD.device
    )
    flat, order = index_TK.reshape(-1).sort(stable=True)
    bounds = torch.searchsorted(flat, torch.arange(experts.num_experts + 1, device=flat.device)).tolist()
    top_k = index_TK.shape[-1]
    for expert in range(experts.num_experts):
        begin, end = bounds[expert], bounds[expert + 1]
        if begin == end:
            continue
        rows = order[begin:end]
        token_N, slot_N = rows // top_k, rows % top_k
        hidden_NF = experts.hidden(expert, hidden_TD[token_N])
        output_ND = experts.project(expert, hidden_NF)
        if visit is not None:
            visit(expert, token_N, slot_N, hidden_NF, output_ND)
        total_TD.index_add_(0, token_N, (output_ND * weight_TK[token_N, slot_N, None]).to(total_TD.dtype))
    return total_TD.to(hidden_TD.dtype)
