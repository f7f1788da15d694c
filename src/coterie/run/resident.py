"""The part of a model that stays in memory: all but the matrices of its routed experts. Their places stay empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from coterie.errors import ArchitectureMismatch
from coterie.model.arch.conversion import WeightConversion, put
from coterie.model.arch.experts import is_experts
from coterie.model.arch.load import checkpoint_meta_model
from coterie.model.disk.checkpoint import Checkpoint

#: Bytes on disk that are read and converted at once, unless a single tensor has more.
_AT_ONCE = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidentSize:
    """How large the resident part is.

    Attributes:
        num_bytes: of its tensors in memory.
        largest: bytes that exist twice while it is read, at most.
    """

    num_bytes: int
    largest: int


def resident_size(
    checkpoint: Checkpoint, conversion: WeightConversion, model: PreTrainedModel, apart: Collection[str]
) -> ResidentSize:
    """Return how large the resident part is, from headers.

    Args:
        checkpoint: the model, as a view in full precision.
        conversion: between its names on disk and in memory.
        model: its meta model, in the number format of the run.
        apart: names on disk of the matrices of experts, which are not part of it.
    """
    state = model.state_dict()
    names = [name for name, sources in conversion.sources.items() if not set(sources) & set(apart)]
    sizes = [state[name].numel() * _dtype_of(model, name).itemsize for name in names if name in state]
    batches = _batches(checkpoint, conversion, apart)
    read = max((sum(checkpoint.tensors[name].num_bytes for name in batch) for batch in batches), default=0)
    return ResidentSize(num_bytes=sum(sizes), largest=2 * read)


def load_resident(
    checkpoint: Checkpoint, conversion: WeightConversion, dtype: torch.dtype, apart: Collection[str]
) -> PreTrainedModel:
    """Return a model with its resident part; matrices of experts are on the meta device.

    Args:
        checkpoint: the model, as a view in full precision.
        conversion: between its names on disk and in memory.
        dtype: number format in memory, where the family does not keep another.
        apart: names on disk of the matrices of experts.

    Raises:
        ArchitectureMismatch: a tensor that the model needs is not there.
    """
    model = checkpoint_meta_model(checkpoint, dtype=dtype)
    state = model.state_dict()
    with checkpoint.reader() as reader:
        for batch in _batches(checkpoint, conversion, apart):
            memory, _ = conversion.convert(
                {name: reader.read(name) for name in batch}, lambda name: _dtype_of(model, name)
            )
            for name, tensor in memory.items():
                if name in state:
                    put(model, name, tensor)
    tied = conversion.all_sources(model)
    by_sources = {sources: name for name, sources in conversion.sources.items()}
    empty = []
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta or set(tied.get(name, ())) & set(apart):
            continue
        twin = by_sources.get(tied.get(name, ()))
        if twin is None or twin == name:
            empty.append(name)
        else:
            put(model, name, model.state_dict()[twin])
    if empty:
        raise ArchitectureMismatch(f"{checkpoint.path}: {empty[0]} and {len(empty) - 1} others have no weights")
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-untyped-call, no-any-return]


def fill_resident(model: PreTrainedModel, *, room: int) -> None:
    """Give a model a resident part that means nothing and takes the time of a real one; see `load_resident`.

    Tensors of one shape share memory where there are many of them, but for as many bytes as processors do not keep.

    Args:
        model: the meta model in the number format of a run; matrices of experts stay on the meta device.
        room: bytes of tensors of one shape that are there, at most, unless one alone has more.
    """
    experts = {id(tensor) for module in model.modules() if is_experts(module) for tensor in module.parameters()}
    filled: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}
    same: dict[int, torch.Tensor] = {}
    turn: Counter[tuple[tuple[int, ...], torch.dtype]] = Counter()
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if not tensor.is_meta or id(tensor) in experts:
            continue
        if id(tensor) not in same:
            kind = tuple(tensor.shape), _dtype_of(model, name) if tensor.is_floating_point() else tensor.dtype
            copies = filled.setdefault(kind, [])
            size = max(1, tensor.numel() * tensor.element_size())
            if not copies or (len(copies) + 1) * size <= room:
                # Norms scale by one; matrices keep numbers small.
                copies.append(torch.full(kind[0], 1 if tensor.ndim < 2 else 0.01, dtype=kind[1]))
            same[id(tensor)] = copies[turn[kind] % len(copies)]
            turn[kind] += 1
        put(model, name, same[id(tensor)])
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]


def _dtype_of(model: PreTrainedModel, name: str) -> torch.dtype:
    """Return the number format that a tensor has in memory, by its name there; some families keep a wider one."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor: torch.Tensor | None = module._parameters.get(leaf)
    tensor = module._buffers[leaf] if tensor is None else tensor
    assert tensor is not None
    if not tensor.is_floating_point():
        return torch.float32  # not asked for
    plan = model._get_dtype_plan(tensor.dtype)
    if not plan:
        return tensor.dtype
    pattern, by_group, _ = build_glob_alternation(list(plan))
    match = pattern.search(name)
    return tensor.dtype if match is None or match.lastgroup is None else plan[by_group[match.lastgroup]]


def _batches(checkpoint: Checkpoint, conversion: WeightConversion, apart: Collection[str]) -> list[list[str]]:
    """Return names on disk of the resident part in batches; what becomes one tensor in memory is in one."""
    groups: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        memory_name = conversion.memory_names[name]
        if name not in apart and memory_name in conversion.sources:
            groups.setdefault(memory_name, []).append(name)
    batches: list[list[str]] = [[]]
    size = 0
    for names in groups.values():
        own = sum(checkpoint.tensors[name].num_bytes for name in names)
        if batches[-1] and size + own > _AT_ONCE:
            batches.append([])
            size = 0
        batches[-1] += names
        size += own
    return [batch for batch in batches if batch]
