"""Which weight file of the result holds which tensors; decided from headers, before anything is read.

Every member of the model's list of layers has a file of its own, and so has any other large unit, so that a file can be
written as soon as its unit is done. All other tensors (norms, small embeddings, parts that the model class has no place
for) share files.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from coterie.artifact import atomic_path, write_json
from coterie.model.arch.conversion import WeightConversion, sibling
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.header import read_header
from coterie.model.disk.weights import INDEX_NAME, SINGLE_NAME
from coterie.model.stream.unit import Unit

#: Units beside the list of layers have a file of their own from this size on.
OWN_FILE_BYTES = 64 * 2**20

#: Files of tensors that belong to no such unit are split here.
SHARED_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One weight file of the result.

    Attributes:
        file: its name.
        names: names on disk of its tensors, sorted.
        unit: name of the unit that they belong to, or None for a shared file.
    """

    file: str
    names: tuple[str, ...]
    unit: str | None


def lay_out(
    checkpoint: Checkpoint, units: Sequence[Unit], conversion: WeightConversion, packed: Container[str] = ()
) -> tuple[Shard, ...]:
    """Assign every tensor of a checkpoint to one weight file; a unit with packed tensors has its own."""
    by_unit: dict[str, list[str]] = {unit.name: [] for unit in units}
    owner = {name: unit.name for unit in units for name in unit.names}
    shared: list[str] = []
    for name in sorted(checkpoint.tensors):
        unit = owner.get(conversion.memory_names[name])
        (shared if unit is None else by_unit[unit]).append(name)
    sizes = {name: info.num_bytes for name, info in checkpoint.tensors.items()}
    shards = []
    for unit_name, names in by_unit.items():
        if not names:
            continue
        large = sum(sizes[name] for name in names) >= OWN_FILE_BYTES
        if unit_name.rpartition(".")[2].isdigit() or large or any(name in packed for name in names):
            shards.append(Shard(file="", names=tuple(names), unit=unit_name))
        else:
            shared += names
    shards += [Shard(file="", names=tuple(names), unit=None) for names in _groups(sorted(shared), sizes)]
    if len(shards) == 1:
        return (replace(shards[0], file=SINGLE_NAME),)
    return tuple(
        replace(shard, file=f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        for number, shard in enumerate(shards, start=1)
    )


def _groups(names: list[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    for name in names:
        if group and sum(sizes[other] for other in group) + sizes[name] > SHARED_FILE_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def write_shard(
    folder: Path,
    shard: Shard,
    tensors: Mapping[str, Tensor],
    *,
    known: Container[str] | None = None,
    file: str | None = None,
) -> None:
    """Write one weight file, atomically; a layer that lost experts, or has more, has other tensors than it had.

    Args:
        folder: where to.
        shard: the file.
        tensors: what goes into it, by name on disk.
        known: names beside which they may be; those of the shard when None.
        file: its name there; that of the shard when None.
    """
    strange = [name for name in tensors if sibling(name, known or shard.names) is None]
    assert not strange, f"{shard.file}: {strange}"
    with atomic_path(folder / (file or shard.file)) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": "pt"})


def write_index(folder: Path, shards: Sequence[Shard]) -> int:
    """Write the index of all weight files, where there are several; return the bytes of all tensors."""
    infos = [info for shard in shards for info in read_header(folder / shard.file).values()]
    total = sum(info.num_bytes for info in infos)
    if len(shards) > 1:
        weight_map = {info.name: info.shard for info in infos}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)
    return total
