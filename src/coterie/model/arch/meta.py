"""The meta model of a config.json: all modules and names on the meta device, no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from coterie.errors import CorruptCheckpoint, InputError, NotACheckpoint
from coterie.model.quiet import quiet


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
            # Infinity and the like stand as objects in config.json; transformers reads them back like this.
            decoded = PreTrainedConfig._decode_special_floats(copy.deepcopy(dict(config)))
            parsed = CONFIG_MAPPING[model_type].from_dict(decoded)
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
    if model.base_model is model and model.get_output_embeddings() is None:
        raise InputError(_without_head(where, type(model).__name__, type(parsed)))
    return model.eval()  # type: ignore[no-any-return]


def _without_head(where: str, name: str, config_class: type) -> str:
    """Say that a class predicts nothing, and which class of the same family does."""
    mappings: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    whole = next((mapping[config_class].__name__ for mapping in mappings if config_class in mapping), "one that has it")
    return (
        f"{where}: config.json names {name}, a class without a head, which predicts no token, so that nothing can be "
        f"measured or compared; if the checkpoint has the head (lm_head), name {whole} under architectures in a copy "
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
