"""Crossing between the two name spaces: tensors on disk (often one an expert) and in memory (fused).

transformers' own conversion does both directions; this file only feeds it some tensors at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from coterie.errors import ArchitectureMismatch, CorruptCheckpoint
from coterie.model.checkpoint import Checkpoint, TensorReader
from coterie.model.layers import quiet


class Crossing:
    """The crossing of one checkpoint and its empty model.

    Attributes:
        memory_names: name on disk -> name in memory. A tensor that becomes several carries the first one's name; a
            tensor that the model has no place for carries its renamed name.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._transforms = get_model_conversion_mapping(model)
        renamings = [entry for entry in self._transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._transforms if isinstance(entry, WeightConverter)]
        state: dict[str, Any] = model.state_dict()
        self.memory_names = {
            name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
            for name in checkpoint.tensors
        }
        # What was matched above must not count as used: only the tensors that are read decide what is reverted.
        self._transforms = get_model_conversion_mapping(model)

    def read(self, reader: TensorReader, names: Iterable[str]) -> tuple[dict[str, Tensor], list[Any]]:
        """Read tensors by their names on disk and return them by their names in memory, float32, on the CPU.

        Returns:
            The tensors, and the conversions that were used, for `write`.

        Raises:
            CorruptCheckpoint: shapes contradict the config, or a conversion failed.
        """
        held = {name: reader.read(name) for name in names}
        transforms: list[Any] = copy.deepcopy(self._transforms)
        config = LoadStateDictConfig(dtype=torch.float32, device_map={"": "cpu"}, weight_mapping=transforms)
        with quiet(), torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(self._model, held, config)
        tensors = _take_out(self._model)
        if info.mismatched_keys:
            name, found, expected = sorted(info.mismatched_keys)[0]
            raise CorruptCheckpoint(
                f"{self._checkpoint.path}: {name} has shape {tuple(found)}, config.json says {tuple(expected)}"
            )
        if info.conversion_errors:
            name, problem = next(iter(info.conversion_errors.items()))
            raise CorruptCheckpoint(f"{self._checkpoint.path}: {name} cannot be converted: {problem}")
        conversions: Any = self._model._weight_conversions
        return tensors, list(conversions or [])

    def write(self, model: PreTrainedModel, tensors: Mapping[str, Tensor], conversions: list[Any]) -> dict[str, Tensor]:
        """Return tensors under their names on disk, in the dtype that each name has in the checkpoint.

        Args:
            model: the empty model of the result (its config has the result's number of experts).
            tensors: by name in memory.
            conversions: what `read` returned with them.

        Raises:
            ArchitectureMismatch: the conversion made a name that the checkpoint does not have.
        """
        model._weight_conversions = copy.deepcopy(conversions)  # type: ignore[assignment]
        with quiet(), torch.no_grad():
            converted = revert_weight_conversion(model, dict(tensors))
        unknown = sorted(converted.keys() - self._checkpoint.tensors.keys())
        if unknown:
            raise ArchitectureMismatch(
                f"{self._checkpoint.path}: converting back to disk made {len(unknown)} names that the checkpoint does "
                f"not have, the first is {unknown[0]}"
            )
        return {
            name: tensor.to(TORCH_DTYPES[self._checkpoint.tensors[name].dtype]).contiguous()
            for name, tensor in converted.items()
        }


#: Number formats that can be compressed, by the name that safetensors gives them.
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _take_out(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that are no longer empty, and make their places empty again."""
    taken: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or tensor.is_meta:
                    continue
                taken[f"{module_name}.{name}" if module_name else name] = tensor.detach()
                empty = tensor.detach().to("meta")
                store[name] = torch.nn.Parameter(empty, requires_grad=False) if store is module._parameters else empty
    return taken
