"""The config.json of a smaller model: experts of another number or width, another number of chosen ones."""

from __future__ import annotations

from typing import Any

from coterie.model.arch.choice import choice_key
from coterie.model.arch.entries import with_values
from coterie.model.arch.layers import Architecture
from coterie.model.arch.width import width_rule


def resized_config(
    architecture: Architecture, num_experts: int, width: int | None = None, top_k: int | None = None
) -> dict[str, Any]:
    """Return the content of config.json with experts of another number or width, or another number of chosen ones.

    Args:
        architecture: of the original.
        num_experts: experts in each layer.
        width: their width; None leaves it as it is.
        top_k: experts that a token chooses; None leaves it as it is.

    Raises:
        Infeasible: no entry, or no value of it, gives experts of that width, or lets a token choose that many, and
            leaves all else as it is.
    """
    values = {architecture.expert_key: num_experts}
    if width is not None and width != architecture.layers[0].width:
        values |= width_rule(architecture).values(width)
    if top_k is not None and top_k != architecture.layers[0].top_k:
        values[choice_key(architecture)] = top_k
    return with_values(architecture.config, values, architecture.model)
