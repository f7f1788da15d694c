"""WeightConversion between the two name spaces: tensors on disk (often one an expert) and in memory (fused).

transformers' own conversion does both directions; this file only feeds it some tensors at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from coterie.errors import ArchitectureMismatch, CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.checkpoint import Checkpoint, TensorReader
from coterie.model.disk.tensors import WHOLE_NUMBERS
from coterie.model.quiet import in_a_line, quiet


class WeightConversion:
    """The conversion of one checkpoint and its meta model.

    Attributes:
        memory_names: name on disk -> name in memory. A tensor that becomes several carries the first one's name; a
            tensor that the model has no place for carries its renamed name.
        transposed: names on disk of tensors whose last two axes are always swapped on the way.
        either_way: names on disk of those whose axes are swapped only where the shape is not yet the model's.
        sources: name in memory -> names on disk that it is made from, of all tensors that the model has a place for.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        """Match names.

        Args:
            checkpoint: the side of the names on disk.
            model: its meta model, the side of the names in memory. Conversions pass through it; between two calls its
                parameters are empty.
        """
        self._checkpoint = checkpoint
        self._model = model
        self._transforms = get_model_conversion_mapping(model)
        renamings: list[Any] = [entry for entry in self._transforms if not isinstance(entry, WeightConverter)]
        converters = [entry for entry in self._transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state: dict[str, Any] = model.state_dict()
        self.memory_names: dict[str, str] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        swapped: dict[bool, set[str]] = {True: set(), False: set()}
        # In the order in which stock loaders read them: some renamings are switched on by an earlier name.
        for name in sorted(checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
            self.memory_names[name] = target
            patterns = [""] if pattern is None else by_pattern[pattern].target_patterns
            for operation in () if pattern is None else by_pattern[pattern].operations:
                if isinstance(operation, Transpose):
                    swapped[operation.check_dims].add(name)
            for memory_name in {target, *(target.replace(patterns[0], other) for other in patterns[1:])} & state.keys():
                self.sources[memory_name] = (*self.sources.get(memory_name, ()), name)
        self.transposed, self.either_way = (frozenset(swapped[checked]) for checked in (False, True))
        # What was matched above must not count as used: only the tensors that are read decide what is reverted.
        for entry in self._transforms:
            entry._was_used = False
        self._use_disk_dtypes(state)

    def _use_disk_dtypes(self, state: Mapping[str, Tensor]) -> None:
        """Give the meta model the number formats on disk, so that converting needs no memory for wider ones."""
        for name, disk_names in self.sources.items():
            dtypes = {TORCH_DTYPES.get(self._checkpoint.tensors[disk].dtype) for disk in disk_names}
            dtype = dtypes.pop()
            if not dtypes and dtype is not None and state[name].is_floating_point():
                put(self._model, name, state[name].to(dtype))

    def all_sources(self, model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
        """Return `sources`, of tied weights also under the name that is not on disk.

        Args:
            model: the model whose weights they become.
        """
        sources = dict(self.sources)
        tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        for target, source in tied.items():
            for missing, there in ((target, source), (source, target)):
                if missing not in sources and there in sources:
                    sources[missing] = sources[there]
        return sources

    def check_whole(self, model: PreTrainedModel) -> None:
        """Raise CorruptCheckpoint where a tensor that the model needs is made from nothing; see `check_fractions`."""
        state = model.state_dict()
        self.check_fractions(model)
        missing = sorted(state.keys() - self.all_sources(model).keys())
        if missing:
            raise CorruptCheckpoint(
                f"{self._checkpoint.path}: {missing[0]} is missing, and {len(missing) - 1} others of the "
                f"{len(state)} tensors that the model needs; fetch the checkpoint again"
            )

    def check_fractions(self, model: PreTrainedModel) -> None:
        """Raise UnsupportedDtype where what the model computes with as fractions is stored as whole numbers."""
        state = model.state_dict()
        for name, disk_names in self.sources.items():
            for disk in disk_names:
                info = self._checkpoint.tensors[disk]
                if info.dtype in WHOLE_NUMBERS and name in state and state[name].is_floating_point():
                    raise UnsupportedDtype(
                        f"{self._checkpoint.path / info.shard}: {disk} is stored as {info.dtype}, whole numbers, and "
                        "the model has fractions there, and nothing says how they are packed; fetch the file again"
                    )

    def check_shapes(self, model: PreTrainedModel) -> None:
        """Raise CorruptCheckpoint where a tensor that is taken over as it is has another shape than the config says."""
        state = model.state_dict()
        uses: dict[str, int] = {}
        for disk_names in self.sources.values():
            for disk in disk_names:
                uses[disk] = uses.get(disk, 0) + 1
        for name, (disk, *others) in self.sources.items():
            shape, expected = self._checkpoint.tensors[disk].shape, tuple(state[name].shape)
            turned = others or uses[disk] > 1 or disk in self.transposed | self.either_way
            if not turned and len(shape) == len(expected) and shape != expected:
                raise CorruptCheckpoint(
                    f"{self._checkpoint.path}: {disk} has shape {list(shape)}, config.json says {list(expected)}"
                )

    def read(
        self, reader: TensorReader, names: Iterable[str], dtype: torch.dtype = torch.float32
    ) -> tuple[dict[str, Tensor], list[Any]]:
        """Read tensors by their names on disk; see `convert`."""
        return self.convert({name: reader.read(name) for name in names}, lambda name: dtype)

    def convert(
        self, raw: dict[str, Tensor], dtype_of: Callable[[str], torch.dtype]
    ) -> tuple[dict[str, Tensor], list[Any]]:
        """Return tensors by their names in memory, on the CPU.

        Args:
            raw: tensors by their names on disk; emptied on the way, to let go of their memory early.
            dtype_of: number format of each name in memory, for those that hold fractions.

        Returns:
            The tensors, and the conversions that were used, for `write`.

        Raises:
            CorruptCheckpoint: shapes contradict the config, or a conversion failed.
        """
        transforms: list[Any] = copy.deepcopy(self._transforms)
        config = LoadStateDictConfig(dtype=torch.float32, device_map={"": "cpu"}, weight_mapping=transforms)
        with quiet(), torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(self._model, raw, config)
        raw.clear()
        tensors = _take_out(self._model)
        if info.mismatched_keys:
            name, shape, expected = sorted(info.mismatched_keys)[0]
            raise CorruptCheckpoint(
                f"{self._checkpoint.path}: {name} has shape {tuple(shape)}, config.json says {tuple(expected)}"
            )
        if info.conversion_errors:
            name, problem = next(iter(info.conversion_errors.items()))
            raise CorruptCheckpoint(f"{self._checkpoint.path}: {name} cannot be converted: {in_a_line(problem)}")
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                # Not one dict comprehension: each narrow tensor goes before the next wide one comes.
                tensors[name] = tensor.to(dtype_of(name))
            del tensor
        conversions: Any = self._model._weight_conversions
        return tensors, list(conversions or [])

    def write(
        self,
        model: PreTrainedModel,
        tensors: Mapping[str, Tensor],
        conversions: list[Any],
        *,
        as_they_are: bool = False,
    ) -> dict[str, Tensor]:
        """Return tensors under their names on disk, in the dtype that each name has in the checkpoint.

        Args:
            model: the meta model of the result (its config has the result's number of experts).
            tensors: by name in memory.
            conversions: what `read` returned with them.
            as_they_are: keep the dtype of the tensors instead; those that may lie either way lie as in memory.

        Raises:
            ArchitectureMismatch: the conversion made a name that the checkpoint does not have.
        """
        model._weight_conversions = copy.deepcopy(conversions)  # type: ignore[assignment]
        if as_they_are:  # bytes do not have the shape by which it would be decided whether axes are swapped
            for operation in _operations(model._weight_conversions):
                if isinstance(operation, Transpose) and operation.check_dims:
                    operation.dim1, operation.check_dims = operation.dim0, False
        with quiet(), torch.no_grad():
            converted = revert_weight_conversion(model, dict(tensors))
        known = self._checkpoint.tensors
        originals = {name: sibling(name, known) for name in converted}
        # Only tensors that are one of many, as those of single experts are, may have brothers that were not there.
        single = {sources[0] for sources in self.sources.values() if len(sources) == 1}
        unknown = sorted(
            name
            for name, original in originals.items()
            if original is None or (original != name and original in single)
        )
        if unknown:
            raise ArchitectureMismatch(
                f"{self._checkpoint.path}: converting back to disk made {len(unknown)} names that the checkpoint does "
                f"not have, the first is {unknown[0]}"
            )
        if as_they_are:
            return {name: tensor.contiguous() for name, tensor in converted.items()}
        return {
            name: tensor.to(TORCH_DTYPES[known[str(originals[name])].dtype]).contiguous()
            for name, tensor in converted.items()
        }


def _operations(conversions: Any) -> Iterable[Any]:
    for conversion in conversions:
        yield from getattr(conversion, "operations", ())


def sibling(name: str, known: Container[str]) -> str | None:
    """Return the name itself if it is known, else that of the first expert beside it: a result may have more experts.

    Args:
        name: a name on disk.
        known: names on disk of the original.
    """
    if name in known:
        return name
    components = name.split(".")
    number = max((place for place, component in enumerate(components) if component.isdigit()), default=None)
    if number is None:
        return None
    components[number] = "0"
    first = ".".join(components)
    return first if first in known else None


#: Number formats that can be compressed, by the name that safetensors gives them.
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer of a model by its name."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _take_out(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the saved tensors that are no longer empty, and make their places empty again."""
    tensors: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in list(store.items()):
                if tensor is None or tensor.is_meta or name in module._non_persistent_buffers_set:
                    continue
                full_name = f"{module_name}.{name}" if module_name else name
                tensors[full_name] = tensor.detach()
                put(model, full_name, tensors[full_name].to("meta"))
    return tensors
