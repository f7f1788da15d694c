"""The config.json of a smaller model: experts of another number or width, another number of chosen ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coterie.model.arch.choice import choice_key
from coterie.model.arch.entries import Entry, value_at, with_values
from coterie.model.arch.layers import Architecture
from coterie.model.arch.spellings import other_spellings
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
        ArchitectureMismatch: an entry that transformers does not read may be one of these numbers under another name.
    """
    values: dict[Entry, int] = {architecture.expert_key: num_experts}
    if width is not None and width != architecture.layers[0].width:
        values |= width_rule(architecture).values(width)
    if top_k is not None and top_k != architecture.layers[0].top_k:
        values[choice_key(architecture)] = top_k
    return with_values(architecture.config, values | _spellings(architecture, values), architecture.model)


def _spellings(architecture: Architecture, values: Mapping[Entry, int]) -> dict[Entry, Any]:
    """Return new values of the entries that say the same as some that change, under names that nothing here reads."""
    config, model = architecture.config, architecture.model
    others: dict[Entry, Any] = {}
    for path, new in values.items():
        old = value_at(config, model, path)
        if old is not None:
            others |= other_spellings(config, model, path, old, new)
    return others
