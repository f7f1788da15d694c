"""Ask a family's own router what it would choose with other router tensors, such as those of fewer experts.

The block of a meta model with that many experts is run with the given router tensors and with the original weights
of everything else in the block; its experts are not computed, only their routing decision is caught. So softmax,
sigmoid, correction bias, group limits and renormalisation are the family's own.

Legend: E experts of the original, M rows of the router now, D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.arch.load import result_meta_model
from coterie.model.arch.seam import intercepted

_CHUNK = 8192  # tokens


class Reroute:
    """Routing decisions of the blocks of one model; keeps a meta model for each number of experts asked for."""

    def __init__(self, architecture: Architecture, model: PreTrainedModel, top_k: int | None = None) -> None:
        """Remember the model.

        Args:
            architecture: of the original.
            model: the original; the weights of a block must be in memory when its router is asked.
            top_k: experts that a token chooses with other router tensors; None for as many as now.
        """
        self._top_k = top_k
        self._architecture = architecture
        self._model = model
        self._meta_models: dict[int, PreTrainedModel] = {}

    def __call__(self, layer: MoELayer, router: Mapping[str, Tensor], block_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the router chooses: ``index_TK`` (M means "no expert"), int64, and ``weight_TK``, float32.

        Differentiable in the router tensors where the family's router is.

        Args:
            layer: which one.
            router: all its router tensors by name in memory, sliced to the experts that there are.
            block_TD: what the block receives.

        Raises:
            ArchitectureMismatch: the block does not run on hidden states alone.
            Infeasible: so few experts cannot be routed.
        """
        count = self._count(layer, router)
        block, tensors = self._prepared(layer, router, count)
        choices: list[tuple[Tensor, Tensor]] = []

        def catch(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
            index_TK = index_TK.masked_fill(weight_TK == 0, count).clamp(max=count)
            choices.append((index_TK, weight_TK.float()))
            return torch.zeros_like(hidden_TD)

        with intercepted(self._meta_models[count], catch):
            for chunk_TD in torch.split(block_TD, _CHUNK):
                try:
                    functional_call(block, tensors, (chunk_TD[None],))
                except Exception as error:  # whatever a family's block raises: it wants more than hidden states
                    raise ArchitectureMismatch(
                        f"{layer.block}: the router of this family cannot be run by itself "
                        f"({type(error).__name__}: {str(error).strip()[:200]}); use a recipe that does not ask it"
                    ) from error
        return torch.cat([index_TK for index_TK, _ in choices]), torch.cat([weight_TK for _, weight_TK in choices])

    def _count(self, layer: MoELayer, router: Mapping[str, Tensor]) -> int:
        """Return M: rows behind the experts' (for shared experts, or for "no expert") are not counted."""
        name, axis = layer.router_tensors[0]
        owner, _, leaf = name.rpartition(".")
        original: Tensor = getattr(self._architecture.model.get_submodule(owner), leaf)
        return router[name].shape[axis] - (original.shape[axis] - layer.num_experts)

    def _prepared(
        self, layer: MoELayer, router: Mapping[str, Tensor], count: int
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the meta block with `count` experts, and the tensors that it is to run with."""
        if count not in self._meta_models:
            self._architecture.check_feasible(count, self._top_k)
            self._meta_models[count] = result_meta_model(
                self._architecture, count, maps=None, dtype=torch.float32, top_k=self._top_k
            )
        inside = f"{layer.block}." if layer.block else ""
        weights = {
            name.removeprefix(inside): tensor
            for name, tensor in self._model.get_submodule(layer.block).state_dict(prefix=inside).items()
            if not name.startswith(f"{layer.experts}.")
        }
        device = next(iter(router.values())).device
        tensors = {
            name: tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in weights.items()
        }
        tensors |= {name.removeprefix(inside): tensor for name, tensor in router.items()}
        return self._meta_models[count].get_submodule(layer.block), tensors
