"""``coterie.run.pack``: a model's experts as records that are read in one go and multiplied with as they lie.

One expert is in memory at a time. The folder appears when it is whole; a run that was killed goes on at the file that
it was in (`coterie.journal`). Every tensor's SHA-256 is taken before it is written and compared with what is read back.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.amounts import format_bytes
from coterie.artifact import atomic_path, file_digest, open_artifact, write_artifact, write_json
from coterie.errors import CorruptCheckpoint, InputError, OutOfSpace, ReloadMismatch
from coterie.journal import Run, open_run
from coterie.model.disk.beside import MODELING_FILE
from coterie.model.disk.checkpoint import Checkpoint, TensorReader
from coterie.model.disk.encodings.kernel_matrix import this_isa
from coterie.model.disk.header import header_of, read_header
from coterie.model.disk.quantized import dequantized
from coterie.model.disk.quantized_records import BLOCK, Records, pack_config, pack_settings
from coterie.model.disk.tensors import TORCH_NAMES, TensorInfo, bytes_of
from coterie.model.disk.weights import INDEX_NAME
from coterie.model.stream.spill import trim_memory
from coterie.outputs import check_output, free_space
from coterie.progress import track
from coterie.run.pack_plan import PackPlan, PlannedFile, plain_format, plan_pack
from coterie.run.places import PROJECTIONS, LayerPlaces
from coterie.run.prepare import Opened, check_isa, open_places

log = logging.getLogger(__name__)

#: What says how a folder was packed, and the checksums of all tensors in it.
PACK_FILE = "coterie-pack.json"

#: What rounding takes: some float32 copies of a band of rows.
_ROUNDING_BYTES = 64 * 2**20

#: Rows that are summed up at once.
_BAND = 256

#: Bytes that are read at once to be checked.
_CHUNK = 4 * 2**20


@dataclass(kw_only=True, slots=True)
class Rounding:
    """What became of matrices that are stored in few bits.

    Attributes:
        matrices: how many.
        exact: those of which no number changed.
        wrong: sum of squares of what changed.
        total: sum of squares of all numbers.
    """

    matrices: int = 0
    exact: int = 0
    wrong: float = 0.0
    total: float = 0.0

    @property
    def relative(self) -> float:
        """Size of what changed, relative to that of the numbers."""
        return (self.wrong / self.total) ** 0.5 if self.total else 0.0

    def add(self, other: Rounding) -> None:
        """Count others too."""
        self.matrices, self.exact = self.matrices + other.matrices, self.exact + other.exact
        self.wrong, self.total = self.wrong + other.wrong, self.total + other.total


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedModel:
    """A folder that was packed, or would be.

    Attributes:
        path: the folder.
        bits: of experts' numbers.
        dense: of those of linear layers that every token passes; None where these are as they were.
        isa: the processor that 4-bit numbers lie for, like AVX512; None where there are none.
        num_bytes: bytes of all weights.
        bytes_before: bytes of all weights of the model, as it is stored.
        experts: how many records there are.
        record_bytes: bytes of the largest.
        kinds: how many matrices are stored in how many bits, "4 bits, groups of 64" and the like.
        memory_bytes: bytes that packing takes at most, beside Python and libraries: what is read of one expert, or one
            tensor that every token passes, and what it becomes.
        rounding: what became of their numbers; nothing of what was not written yet.
    """

    path: Path
    bits: int
    dense: int | None
    isa: str | None
    num_bytes: int
    bytes_before: int
    experts: int
    record_bytes: int
    kinds: Mapping[str, int]
    memory_bytes: int
    rounding: Rounding = field(default_factory=Rounding)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        rounding = asdict(self.rounding) | {"relative": self.rounding.relative}
        return asdict(self) | {"path": str(self.path), "rounding": rounding}

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} in {name}" for name, count in self.kinds.items())
        text = (
            f"{format_bytes(self.num_bytes)} of weights (the model has {format_bytes(self.bytes_before)}), "
            f"{self.experts} experts of {format_bytes(self.record_bytes)}; matrices: {kinds}"
        )
        if self.isa is not None:
            text += f"; for processors with {self.isa}"
        if self.rounding.matrices:
            text += (
                f"; {self.rounding.exact} of {self.rounding.matrices} kept all their numbers, in all "
                f"{self.rounding.relative:.2%} changed"
            )
        return text


def pack(
    model: str | Path,
    out: str | Path,
    *,
    bits: int,
    dense: int | None = None,
    group: int | None = None,
    dry_run: bool = False,
) -> PackedModel:
    """Write a model as records of experts in few bits, which a run multiplies with as they lie.

    Numbers are the nearest, with scales of least squared error. A model whose numbers are of few bits already keeps
    them where scales in bfloat16 say them: symmetric integers with such scales do so exactly. What no kernel takes
    stays in bfloat16.

    Args:
        model: a model folder, a GGUF file, a hub id, or a result of Coterie.
        out: the folder to write; must not exist.
        bits: of experts' numbers: 8, with a scale for each row, or 4, with scale and offset for each group of columns.
        dense: the same for linear layers that every token passes (attention, shared experts, the head); None to leave
            them as they are. Embeddings, norms, routers, and a head that is the embedding stay in any case.
        group: columns that share a scale with 4 bits: 32, 64, 128 or 256; that of the model where it has some, else 64.
        dry_run: say what would be written, and write nothing.

    Raises:
        InputError: bits or a group that no kernel computes with, or the model was packed for another processor.
        NotACheckpoint, CorruptCheckpoint, ArchitectureMismatch, NotAMoE: the model is not usable.
        OutputExists, OutputBusy, StaleArtifact: something is at the place already, or is being made there.
        OutOfSpace: the disk cannot hold it.
        ReloadMismatch: what was written reads back as something else.
    """
    target = check_output(out, kind="packed model", reads={"model folder": [model]}, folder=True)
    opened = open_places(model, output_dtype="float32")
    check_isa(opened.stored)
    plan = plan_pack(opened, bits=bits, dense=dense, group=group)
    isa = this_isa() if plan.has_four_bits else None
    result = PackedModel(
        path=target, bits=bits, dense=dense, isa=isa, num_bytes=plan.num_bytes,
        bytes_before=opened.stored.num_bytes, experts=sum(records.count for records in plan.experts),
        record_bytes=max(records.num_bytes for records in plan.experts), kinds=_kinds(plan),
        memory_bytes=_memory_bytes(opened, plan),
    )  # fmt: skip
    _tell(result, plan)
    if dry_run:
        return result
    header = {"model": opened.stored.digest, "bits": bits, "dense": dense, "group": group, "isa": isa}
    with open_run(target, header, what="packed model") as run:
        _check_space(target, plan, run)
        with opened.checkpoint.reader() as reader:
            files = track(plan.files, "packing", total=plan.num_bytes, weight=lambda file: file.num_bytes)
            for file in files:
                if file.name not in run.finished:
                    _write(run, file, opened, plan, reader)
                trim_memory()
        digests: dict[str, str] = {}
        for step in run.finished.values():
            digests |= step.content["digests"]
            result.rounding.add(Rounding(**step.content["rounding"]))
        _write_small_files(run.folder, opened, plan, isa)
        body = {
            "version": 1, "bits": bits, "dense": dense, "isa": isa, "torch": torch.__version__,
            "rounding": asdict(result.rounding), "config": file_digest(run.folder / "config.json"), "sha256": digests,
        }  # fmt: skip
        write_artifact(run.folder / PACK_FILE, kind="pack", body=body, inputs={"model": opened.stored.digest})
        run.publish()
    log.info("%s: %s", target, result)
    return result


def _kinds(plan: PackPlan) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for matrix, count in plan.matrices:
        name = {4: f"4 bits, groups of {matrix.group}", 8: "8 bits"}.get(matrix.bits, "bfloat16")
        kinds[name] = kinds.get(name, 0) + count
    return kinds


def _memory_bytes(opened: Opened, plan: PackPlan) -> int:
    """Return what one expert takes, or one other tensor: as it is stored, as it is read, and as it is written."""
    experts = (
        2 * sum(tensor.info.num_bytes for tensor in places.experts[0]) + records.num_bytes
        for places, records in zip(opened.places, plan.experts, strict=True)
    )
    others = (2 * info.num_bytes for name, info in opened.checkpoint.tensors.items() if name not in opened.apart)
    linear = (opened.checkpoint.tensors[name].num_bytes + records.num_bytes for name, records in plan.dense.items())
    return max(max(experts), max(others, default=0), max(linear, default=0)) + _ROUNDING_BYTES


def _tell(result: PackedModel, plan: PackPlan) -> None:
    log.info(
        "%s: %s of weights will be written, the model has %s; at most %s in memory at once", result.path,
        format_bytes(result.num_bytes), format_bytes(result.bytes_before), format_bytes(result.memory_bytes),
    )  # fmt: skip
    plain = [(matrix, count) for matrix, count in plan.matrices if matrix.bits not in (4, 8)]
    if plain:
        matrix, _ = plain[0]
        log.warning(
            "%d matrices of experts stay in bfloat16, such as those of %d rows and %d columns: kernels want columns "
            "that are a multiple of 32, and for 4 bits rows of 16",
            sum(count for _, count in plain), matrix.rows, matrix.columns,
        )  # fmt: skip


def _check_space(target: Path, plan: PackPlan, run: Run) -> None:
    """Raise OutOfSpace unless the disk can hold what is still to be written."""
    needed = sum(file.num_bytes for file in plan.files if file.name not in run.finished) + 16 * 2**20
    existing, free = free_space(target)
    if free < needed:
        raise OutOfSpace(
            errno.ENOSPC, f"{target} needs {format_bytes(needed)}, {existing} has {format_bytes(free)} free"
        )


def _write(run: Run, file: PlannedFile, opened: Opened, plan: PackPlan, reader: TensorReader) -> None:
    """Write a weight file, read it back, and note that it is finished."""
    rounding, digests = Rounding(), {}
    if file.layer is None:
        contents = _dense_contents(file, opened.checkpoint, plan, reader, rounding)
    else:
        contents = _expert_contents(opened.places[file.layer], plan.experts[file.layer], reader, rounding)
    with atomic_path(run.folder / file.name) as temporary, temporary.open("wb") as out:
        out.write(header_of(file.tensors, metadata={"format": "pt"}, multiple=BLOCK))
        for name, content in zip(file.tensors, contents, strict=True):
            assert len(content) == bytes_of(*file.tensors[name]), name
            out.write(content)
            digests[name] = hashlib.sha256(content).hexdigest()
    wrong = next(_changed(run.folder, read_header(run.folder / file.name), digests), None)
    if wrong is not None:
        raise ReloadMismatch(f"{run.folder / file.name}: {wrong} reads back as something else: the disk is damaged")
    run.finish(file.name, files=[file.name], content={"digests": digests, "rounding": asdict(rounding)})


def _expert_contents(
    places: LayerPlaces, records: Records, reader: TensorReader, rounding: Rounding
) -> Iterator[memoryview]:
    """Yield the records of a layer's experts."""
    for number, tensors in enumerate(places.experts):
        matrices: dict[str, Tensor] = {}
        on_grid = False
        for tensor in tensors:
            whole = len(tensor.info.shape) == 2
            name, on_grid = tensor.info.name, on_grid or tensor.info.packed is not None
            matrix = reader.read(name) if whole else reader.read_rows(name, number, number + 1)[0]
            matrices |= {rows.field: rows.of(matrix) for rows in tensor.rows}
        ordered = [matrices[each] for each in PROJECTIONS if each in matrices]
        yield record_content(records, ordered, on_grid=on_grid, rounding=rounding)


def _dense_contents(
    file: PlannedFile, checkpoint: Checkpoint, plan: PackPlan, reader: TensorReader, rounding: Rounding
) -> Iterator[memoryview]:
    """Yield the tensors of what every token passes: records of linear layers, all else as it is."""
    for name in file.tensors:
        info = checkpoint.tensors[name]
        tensor = reader.read(name)
        if name in plan.dense:
            yield record_content(plan.dense[name], [tensor], on_grid=info.packed is not None, rounding=rounding)
        else:
            dtype = getattr(torch, TORCH_NAMES[plain_format(info)])
            yield _bytes_of(tensor if info.packed is None else tensor.to(dtype))


def record_content(records: Records, matrices: list[Tensor], *, on_grid: bool, rounding: Rounding) -> memoryview:
    """Return the bytes of a record.

    Args:
        records: what it holds.
        matrices: its matrices, in the order of the record.
        on_grid: they were stored in few bits before.
        rounding: counts what became of them.
    """
    content = torch.zeros(records.num_bytes, dtype=torch.uint8)
    for form, pieces, matrix_RC in zip(records.matrices, records.pieces, matrices, strict=True):
        encoding = form.encoding(this_isa(), "F32")
        if encoding is None:
            stored, wrong = {"": matrix_RC.to(torch.bfloat16)}, 0.0
        else:
            stored, wrong = encoding.fit(matrix_RC, on_grid=on_grid)
            starts = range(0, len(matrix_RC), _BAND)
            total = math.fsum(float(matrix_RC[start : start + _BAND].double().square().sum()) for start in starts)
            rounding.add(Rounding(matrices=1, exact=int(not wrong), wrong=wrong, total=total))
        for suffix, (begin, _, _) in pieces.items():
            piece = stored[suffix].contiguous().view(torch.uint8).flatten()
            content[begin : begin + len(piece)] = piece
    return content.numpy().data


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_small_files(folder: Path, opened: Opened, plan: PackPlan, isa: str | None) -> None:
    """Write index and config, and copy what belongs to the model and holds no weights."""
    for file in opened.stored.other_files():
        name = file.relative_to(opened.stored.path)
        if name not in (Path(MODELING_FILE), Path(PACK_FILE)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    weight_map = {name: file.name for file in plan.files for name in file.tensors}
    index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_NAME, index)
    config = dequantized(opened.stored).config
    settings = pack_config(isa, (*plan.experts, *plan.dense.values()))
    write_json(folder / "config.json", {**config, "quantization_config": settings})


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """A packed folder whose tensors are all as they were written.

    Attributes:
        path: the folder.
        tensors: how many were read, records among them.
        num_bytes: their bytes.
    """

    path: Path
    tensors: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self) | {"path": str(self.path)}


def verify(folder: str | Path) -> Verified:
    """Read all tensors of a packed folder and compare them with their checksums.

    Args:
        folder: what `pack` wrote.

    Raises:
        InputError: it was not packed.
        CorruptCheckpoint: a tensor is another than was written; the first is named.
        CorruptArtifact: the file with the checksums is damaged.
    """
    stored = Checkpoint.open(folder)
    if pack_settings(stored.config) is None or not (stored.path / PACK_FILE).is_file():
        raise InputError(f"{stored.path} was not packed by coterie pack, so there are no checksums to compare with")
    body = open_artifact(stored.path / PACK_FILE, kind="pack").body
    if file_digest(stored.path / "config.json") != body["config"]:
        raise CorruptCheckpoint(
            f"{stored.path / 'config.json'} is not what was written: it says what records hold; pack the model again"
        )
    digests: Mapping[str, str] = body["sha256"]
    if stored.tensors.keys() != digests.keys():
        name = sorted(stored.tensors.keys() ^ digests.keys())[0]
        raise CorruptCheckpoint(f"{stored.path}: {name!r} has a checksum or is there, and not both; pack it again")
    by_shard: dict[str, dict[str, TensorInfo]] = {}
    for name, info in stored.tensors.items():
        by_shard.setdefault(info.shard, {})[name] = info
    size = sum(info.num_bytes for info in stored.tensors.values())
    files = track(
        sorted(by_shard), "checking", total=size,
        weight=lambda shard: sum(info.num_bytes for info in by_shard[shard].values()),
    )  # fmt: skip
    for shard in files:
        wrong = next(_changed(stored.path, by_shard[shard], digests), None)
        if wrong is not None:
            raise CorruptCheckpoint(
                f"{stored.path / shard}: {wrong} is not what was written; the file was changed or the disk is damaged: "
                "pack the model again"
            )
    return Verified(path=stored.path, tensors=len(digests), num_bytes=size)


def _changed(folder: Path, infos: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of tensors of one file that have another checksum."""
    if not infos:
        return
    with (folder / next(iter(infos.values())).shard).open("rb", buffering=0) as file:
        for name, info in sorted(infos.items(), key=lambda item: item[1].begin):
            digest, position = hashlib.sha256(), info.begin
            file.seek(position)
            while position < info.end and (content := file.read(min(_CHUNK, info.end - position))):
                digest.update(content)
                position += len(content)
            if digest.hexdigest() != digests[name]:
                yield name
