"""Mapped results: routers with a row for each original expert, and a map from those to the experts that there are.

Legend: E experts of the original, M experts now, D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.errors import CorruptArtifact
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.manifest import MANIFEST, Manifest

_MAPPED = "coterie_mapped"


def attach_maps(model: PreTrainedModel, layers: Sequence[MoELayer], maps: Sequence[Tensor]) -> None:
    """Make every experts module of `model` translate the router's choice through its map before it computes.

    Args:
        model: a model whose routers have E rows and whose experts modules hold M experts.
        layers: its MoE layers.
        maps: for each layer, the expert (below M) that stands for each of E router rows, int64.
    """
    inner = {layer.index: model.get_submodule(layer.experts).config._experts_implementation for layer in layers}  # type: ignore[union-attr]
    for layer, expert_map_E in zip(layers, maps, strict=True):
        experts = model.get_submodule(layer.experts)
        parameter = next(experts.parameters())
        device = "cpu" if parameter.is_meta else parameter.device
        experts.register_buffer("coterie_expert_map", expert_map_E.to(device), persistent=False)
        experts.coterie_inner = inner[layer.index]
        # Every experts module looks into its own config; several may share one.
        experts.config._experts_implementation = _MAPPED  # type: ignore[union-attr]


def _mapped_experts(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Translate original expert numbers through the module's map, then run the implementation that was set before."""
    own: Any = type(module).forward
    function = ALL_EXPERTS_FUNCTIONS.get_interface(str(module.coterie_inner), own.__wrapped__)
    return function(module, hidden_TD, module.coterie_expert_map[index_TK], weight_TK)  # type: ignore[index,no-any-return]


ALL_EXPERTS_FUNCTIONS.register(_MAPPED, _mapped_experts)


def widen_routers(model: PreTrainedModel, wide: PreTrainedModel, layers: Sequence[MoELayer]) -> None:
    """Give `model` (M experts) the routers of `wide` (E experts), module and tensors."""
    for layer in layers:
        if layer.router is not None:
            model.set_submodule(layer.router, wide.get_submodule(layer.router))
        for name, _ in layer.router_tensors:
            owner, _, leaf = name.rpartition(".")
            if layer.router is None or not name.startswith(layer.router + "."):
                source = wide.get_submodule(owner)
                store = "_parameters" if leaf in source._parameters else "_buffers"
                getattr(model.get_submodule(owner), store)[leaf] = getattr(source, store)[leaf]


def maps_of(manifest: Manifest, layers: Sequence[MoELayer]) -> list[Tensor]:
    """Return for each layer the expert that stands for each router row, int64, as a manifest says it.

    Raises:
        CorruptArtifact: the manifest is of a model with other layers.
    """
    told = [entry.num_experts_before for entry in manifest.layers]
    counts = [layer.num_experts for layer in layers]
    if told != counts:
        raise CorruptArtifact(f"{MANIFEST} is of layers with {told} experts, config.json of layers with {counts}")
    return [torch.tensor(entry.expert_map, dtype=torch.int64) for entry in manifest.layers]
