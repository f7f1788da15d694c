"""A checkpoint whose config.json names a class without a head, though it has all tensors of the one with a head.

Whoever saves the inner model of one that predicts tokens gets a config.json that names the base class. Where input and
output embedding are one matrix, or the head was put beside it, nothing is missing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coterie.errors import CoterieError
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.meta import build_model, class_with_head, is_headless, tell_named_code
from coterie.model.arch.structure import split_name
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.plain import Plain
from coterie.model.disk.tensors import Packed, TensorInfo

log = logging.getLogger(__name__)


def model_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the config to build a checkpoint's model from.

    It names the class with a head in place of a base class where that one's tensors are all there, and no others.

    Raises:
        NotACheckpoint, CorruptCheckpoint: no model can be built from the config.
    """
    config, where = checkpoint.config, str(checkpoint.path)
    tell_named_code(config, where)
    named = (config.get("architectures") or [""])[0]
    if not named.endswith("Model"):  # as all base classes are called; most others are not, and building takes time
        return config
    model = build_model(config, where=where)
    whole = class_with_head(model)
    if not is_headless(model) or whole is None:
        return config
    changed = {**config, "architectures": [whole]}
    if not _is_whole(checkpoint, changed):
        return config
    _tell(where, named, whole)
    return changed


@functools.cache  # a command builds the model several times
def _tell(where: str, named: str, whole: str) -> None:
    log.info("%s: config.json names %s, but all tensors of %s are there: it is read as that", where, named, whole)


def with_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as the class with a head would have written it; the same object where it did.

    Its tensors have the names that this class gives them: base classes leave the first part out (``model.``).

    Raises:
        NotACheckpoint, CorruptCheckpoint: no model can be built from the config.
    """
    config = model_config(checkpoint)
    if config is checkpoint.config:
        return checkpoint
    model = build_model(config)
    prefix = f"{model.base_model_prefix}."
    bare = {
        name
        for name, memory_name in WeightConversion(checkpoint, model).memory_names.items()
        if memory_name.startswith(prefix) and not name.startswith(prefix)
    }
    # Layers that the class has no place for lie beside the others.
    stacks = tuple(f"{name.partition('.')[0]}." for name in bare if split_name(name) is not None)
    tensors = {
        name: _renamed(info, name, pickled=checkpoint.pickled)
        for name, info in (
            (f"{prefix}{name}" if name in bare or name.startswith(stacks) else name, info)
            for name, info in checkpoint.tensors.items()
        )
    }
    return replace(checkpoint, config=config, tensors=tensors)


def _renamed(info: TensorInfo, name: str, *, pickled: bool) -> TensorInfo:
    if not pickled:
        return replace(info, name=name)
    packed = Packed(encoding=Plain(dtype=info.dtype), stored={"": info})  # which is looked up by its name in the file
    return TensorInfo(name=name, dtype=info.dtype, shape=info.shape, shard=info.shard, packed=packed)


def _is_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    try:
        model = build_model(config)
    except CoterieError:
        return False
    conversion, state = WeightConversion(checkpoint, model), model.state_dict()
    if state.keys() - conversion.all_sources(model).keys():
        return False
    for disk_name, memory_name in conversion.memory_names.items():
        if memory_name not in state:
            if not any(component.isdigit() for component in disk_name.split(".")):
                return False  # another head; what has no place within layers predicts tokens further ahead
        elif (
            conversion.sources[memory_name] == (disk_name,)
            and checkpoint.tensors[disk_name].shape != state[memory_name].shape
        ):
            return False
    return True
