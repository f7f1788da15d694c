"""Biases that a quantiser wrote beside its weights for a model that has none."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from coterie.model.arch.conversion import WeightConversion
from coterie.model.disk.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def without_idle_biases(checkpoint: Checkpoint, model: PreTrainedModel, conversion: WeightConversion) -> Checkpoint:
    """Return a checkpoint without the biases beside packed weights that the model class has no place for.

    GPTQ's tools write zeros there (AutoGPTQ issue 555). Stock loaders leave them out; a result would carry them along,
    those of experts that are gone as well. The same object where there are none.

    Args:
        checkpoint: what is read.
        model: its meta model.
        conversion: between the names of both.
    """
    places, names = model.state_dict().keys(), conversion.memory_names
    packed = {name for name, info in checkpoint.tensors.items() if info.packed is not None and names[name] in places}
    idle = {
        name
        for name, memory_name in names.items()
        if name.endswith(".bias") and memory_name not in places and f"{name.removesuffix('bias')}weight" in packed
    }
    if not idle:
        return checkpoint
    log.info("%s: %d biases that the model class has no place for are left out", checkpoint.path, len(idle))
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in idle}
    return replace(checkpoint, tensors=kept)
