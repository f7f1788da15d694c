"""The meta model of a config.json: all modules and names on the meta device, no memory."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from coterie.errors import CorruptCheckpoint, InputError, NotACheckpoint
from coterie.model.quiet import quiet

log = logging.getLogger(__name__)

#: Ways to compute attention and experts that are part of transformers and torch. Any other may be fetched from the hub
#: and run: a repository's name is one by itself, and names such as "flash_attention_2" or "sonicmoe" stand for some.
OWN_IMPLEMENTATIONS = frozenset(("eager", "sdpa", "flex_attention", "paged|eager", "batched_mm", "grouped_mm"))


def meta_model(
    config: Mapping[str, Any], *, where: str = "the config", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the model of a config.json on the meta device: all modules and names, no memory.

    Args:
        config: the content of config.json.
        where: what to name in an error.
        dtype: number format of the parameters; float32 when None.

    Raises:
        NotACheckpoint: transformers does not know the model type.
        CorruptCheckpoint: transformers knows it, but cannot build a model from the config.
        InputError: the config names a class without a head, which predicts nothing.
    """
    model = build_model(config, where=where, dtype=dtype)
    if is_headless(model):
        raise InputError(_without_head(where, model))
    return model


def build_model(
    config: Mapping[str, Any], *, where: str = "the config", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the meta model of whatever class a config names, with a head or without; see `meta_model`."""
    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise NotACheckpoint(
            f"{where} has model_type {model_type!r}, which transformers {transformers.__version__} does not know; "
            "a newer transformers may (code that comes with a checkpoint is not run)"
        )
    name = (config.get("architectures") or [None])[0]
    model_class = getattr(transformers, name, None) if name else None
    with torch.device("meta"), quiet():
        try:
            parsed = parse_config(config)
            if model_class is not None:
                model = model_class._from_config(parsed, dtype=dtype or torch.float32)
            else:
                text = type(parsed) in MODEL_FOR_CAUSAL_LM_MAPPING
                auto: Any = AutoModelForCausalLM if text else AutoModelForImageTextToText
                model = auto.from_config(parsed, dtype=dtype or torch.float32, trust_remote_code=False)
        except Exception as error:  # every family checks its config in its own way
            reason = " ".join(str(error).split())[:300]
            raise CorruptCheckpoint(
                f"{where}: no {model_type} model can be built from its config.json ({type(error).__name__}: {reason})"
            ) from error
    return model.eval()  # type: ignore[no-any-return]


def parse_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a config.json as transformers has it, without the code that it names (see `OWN_IMPLEMENTATIONS`)."""
    # Infinity and the like stand as objects in config.json; transformers reads them back like this.
    decoded = PreTrainedConfig._decode_special_floats(copy.deepcopy(dict(config)))
    parsed: PreTrainedConfig = CONFIG_MAPPING[config["model_type"]].from_dict(without_named_code(decoded))
    return parsed


def without_named_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the entries that name code which transformers would fetch from the hub and run."""
    return {
        key: without_named_code(value) if isinstance(value, Mapping) and "implementation" not in key else value
        for key, value in config.items()
        if not (isinstance(key, str) and "implementation" in key and list(_strange_code(value)))
    }


def tell_named_code(config: Mapping[str, Any], where: str) -> None:
    """Log which entries of a config.json name code that is not run."""
    for key, value in config.items():
        if "implementation" in key:
            for name in _strange_code(value):
                _tell(where, key, name)
        elif isinstance(value, Mapping):
            tell_named_code(value, where)


@functools.cache  # a command builds the model several times
def _tell(where: str, key: str, name: str) -> None:
    log.warning(
        "%s: config.json names %r as %s, which transformers would fetch from the hub and run; code that comes with a "
        "checkpoint is never run, so the standard implementation is used", where, name, key,
    )  # fmt: skip


def _strange_code(value: Any) -> Iterator[str]:
    """Yield the names in an entry, or in an entry for each part of the model, that are no implementation of our own."""
    for name in value.values() if isinstance(value, Mapping) else (value,):
        if name is not None and name not in OWN_IMPLEMENTATIONS:
            yield str(name)


def is_headless(model: PreTrainedModel) -> bool:
    """Tell whether a model predicts no tokens: a base class, which ends with hidden states."""
    return model.base_model is model and model.get_output_embeddings() is None  # type: ignore[no-untyped-call]


def class_with_head(model: PreTrainedModel) -> str | None:
    """Return the name of the class of the same family that predicts tokens; None where there is none."""
    mappings: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    config_class = type(model.config)
    return next((mapping[config_class].__name__ for mapping in mappings if config_class in mapping), None)


def _without_head(where: str, model: PreTrainedModel) -> str:
    """Say that a class predicts nothing, and which class of the same family does."""
    return (
        f"{where}: config.json names {type(model).__name__}, a class without a head, which predicts no token, so that "
        "nothing can be measured or compared; if the checkpoint has the head (lm_head), name "
        f"{class_with_head(model) or 'one that has it'} under architectures in a copy "
        "of the folder, else pass the model that this one was made from"
    )


def make_buffers(model: PreTrainedModel) -> None:
    """Compute, on the CPU, the buffers that checkpoints do not hold, by the model's own initialisation."""
    owners: dict[str, nn.Module] = {}
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            owners[owner] = model.get_submodule(owner)
            owners[owner]._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    families = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    with torch.no_grad():
        for name, module in owners.items():
            inner = max((key for key in families if not key or f"{name}.".startswith(f"{key}.")), key=len)
            families[inner]._init_weights(module)  # type: ignore[no-untyped-call]
