"""Scores that a family's own router gives to all experts, as the model itself records them.

Legend: E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.model.arch.layers import MoELayer, find_router


@contextmanager
def router_scores(model: PreTrainedModel, layers: Sequence[MoELayer]) -> Iterator[dict[int, Tensor]]:
    """Within the block, whatever runs the router of one of these layers leaves its scores in the mapping.

    They are what the family declares as its ``router_logits``: logits in most families, shares that sum to 1 in some.
    They are detached, in the router's own number format, and without columns behind the experts' (for shared experts,
    or for "no expert"). Scores of a later call replace those of an earlier one: take what is needed out in between.

    Args:
        model: the model, or a meta model of which parts have their weights.
        layers: the layers to listen to; one that declares no scores never gets an entry.

    Yields:
        The scores (T, E) by `MoELayer.index`, tokens in the order of the input.
    """
    scores: dict[int, Tensor] = {}
    handles = []
    for layer in layers:
        declared = find_router(model, layer.block)
        if declared is not None:
            name, position = declared
            handles.append(model.get_submodule(name).register_forward_hook(_keep(scores, layer, position)))
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def _keep(scores: dict[int, Tensor], layer: MoELayer, position: int) -> Callable[[nn.Module, object, object], None]:
    """Return a hook that keeps the scores of a layer, the output at `position` where a router returns several."""

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        value = output[position] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        scores[layer.index] = value.detach().flatten(0, -2)[:, : layer.num_experts]

    return hook
