"""The one seam: Coterie's own functions in place of the experts, registered with transformers.

transformers calls the experts of (almost) every MoE family as ``experts(hidden_TD, index_TK, weight_TK) -> out_TD``.
Whoever registers a function there sees the experts module and the routing decision that the family really made.
One dispatcher is registered, once; the function that it calls hangs on the experts module itself.

Legend: E experts, D model width, T tokens, K chosen experts. An index equal to E means "no expert".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.errors import NotAMoE
from coterie.model.arch.experts import Experts, is_experts

ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

_NAME = "coterie"
_ATTRIBUTE = "_coterie_installed"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Installed:
    """What one experts module carries: neither parameter nor submodule, so that nothing of the model's own changes.

    A deep copy of the module shares the function, as copies share code, and has everything else for itself. A pickle
    holds the function as pickles do, by its name; one that has no name to import it by cannot be pickled.

    Attributes:
        function: what is computed instead of the module's own loop.
        config: the module's config before; while a function is installed it has a shallow copy that names the seam,
            because a config may be shared with modules, and whole models, in which nothing is installed.
        outer: what was installed before, and is again afterwards.
    """

    function: ExpertsFunction
    config: Any
    outer: _Installed | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Installed:
        config, outer = copy.deepcopy(self.config, memo), copy.deepcopy(self.outer, memo)
        return _Installed(function=self.function, config=config, outer=outer)


def _dispatch(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    function = installed(module)
    if function is None:  # taken out by another thread since the module looked into its config
        function = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return function(module, hidden_TD, index_TK, weight_TK)


ALL_EXPERTS_FUNCTIONS.register(_NAME, _dispatch)


def install(model: nn.Module, function: ExpertsFunction) -> None:
    """Let every experts module of `model` compute `function(module, hidden, index, weight)` until `uninstall`.

    The function hangs on the modules: it goes with them to another device or number format and into deep copies (which
    share it) and pickles (if it can be pickled), and is gone when they are. The last one installed counts. Several
    threads may run the model meanwhile.

    Args:
        model: a model, or a part of one.
        function: gets the experts module, its inputs (T, D), the chosen experts (T, K), where an index of E means "no
            expert", and their weights (T, K); returns the routed output (T, D).

    Raises:
        NotAMoE: the model has no experts behind transformers' interface, so nothing would ever call the function.
    """
    modules = _experts_of(model)
    if not modules:
        raise NotAMoE(
            f"{type(model).__name__} has no experts that transformers calls through its experts interface, so a "
            "function in their place would never run; pass a model with routed experts"
        )
    _install(modules, function)


def uninstall(model: nn.Module) -> None:
    """Take out what was installed last in `model`; what was installed before it, or the family's own loop, is back.

    Raises:
        ValueError: nothing is installed in one of its experts modules.
    """
    modules = _experts_of(model)
    if not modules or any(installed(module) is None for module in modules):
        raise ValueError(f"no function is installed in {type(model).__name__}, or not in all of its experts modules")
    for module in modules:
        last: _Installed = module.__dict__[_ATTRIBUTE]
        _set(module, last.config, last.outer)


def installed(module: nn.Module) -> ExpertsFunction | None:
    """Return the function that `module` computes now instead of its own loop; None where nothing is installed."""
    last: _Installed | None = module.__dict__.get(_ATTRIBUTE)
    return None if last is None else last.function


@contextmanager
def intercepted(model: nn.Module, function: ExpertsFunction) -> Iterator[None]:
    """Within the block, every experts module of `model` computes `function(module, hidden, index, weight)` instead.

    Blocks may be nested; the innermost function counts, and what was set before comes back after each.
    """
    before = [(module, module.config, module.__dict__.get(_ATTRIBUTE)) for module in _experts_of(model)]
    try:
        _install([module for module, _, _ in before], function)
        yield
    finally:
        for module, config, outer in before:
            _set(module, config, outer)


def _experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_experts(module)]


def _install(modules: list[nn.Module], function: ExpertsFunction) -> None:
    copies: dict[int, Any] = {}
    for module in modules:
        config: Any = module.config
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            copies[id(config)]._experts_implementation = {"": _NAME}  # of this config, not of those within it
        outer = module.__dict__.get(_ATTRIBUTE)
        # The function first: whoever sees the new config finds it.
        setattr(module, _ATTRIBUTE, _Installed(function=function, config=config, outer=outer))
        module.config = copies[id(config)]


def _set(module: nn.Module, config: Any, installed: _Installed | None) -> None:
    """Give a module this config and what is installed in it."""
    module.config = config
    if installed is None:
        module.__dict__.pop(_ATTRIBUTE, None)
    else:
        setattr(module, _ATTRIBUTE, installed)


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Within the block, `module` runs the loop that its own family defines, whatever was set before.

    In every thread that runs it: several threads that want different things of one module need copies of it.
    """
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
    top_k = index_TK.shape[-1]
    for expert, rows in rows_by_expert(index_TK, experts.num_experts).items():
        token_N, slot_N = rows // top_k, rows % top_k
        hidden_NF = experts.hidden(expert, hidden_TD[token_N])
        output_ND = experts.project(expert, hidden_NF)
        if visit is not None:
            visit(expert, token_N, slot_N, hidden_NF, output_ND)
        total_TD.index_add_(0, token_N, (output_ND * weight_TK[token_N, slot_N, None]).to(total_TD.dtype))
    return total_TD.to(hidden_TD.dtype)


def rows_by_expert(index_TK: Tensor, num_experts: int) -> dict[int, Tensor]:
    """Return for each chosen expert, ascending, the places in the flattened index that name it."""
    flat, order = index_TK.reshape(-1).sort(stable=True)
    bounds = torch.searchsorted(flat, torch.arange(num_experts + 1, device=flat.device)).tolist()
    return {
        expert: order[bounds[expert] : bounds[expert + 1]]
        for expert in range(num_experts)
        if bounds[expert] < bounds[expert + 1]
    }
