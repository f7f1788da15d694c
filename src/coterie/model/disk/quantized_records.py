"""What `coterie pack` writes: a record of bytes for every expert, read in one go and multiplied with as it lies.

A record is a tensor of bytes. It holds the matrices of an expert one after the other, each its numbers and then its
scales, each from a multiple of `PIECE` bytes on; its length is a multiple of `BLOCK`, and in its file it begins at one.
Linear layers that every token passes are records of one matrix. config.json says which records there are, what they
hold, and which rows of which tensors of the plain checkpoint that is. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from coterie.errors import CorruptCheckpoint, UnsupportedDtype
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.kernel_matrix import KernelMatrix
from coterie.model.disk.encodings.plain import Plain
from coterie.model.disk.encodings.rearranged import Rearranged
from coterie.model.disk.encodings.stacked import Stacked, StackedTensors
from coterie.model.disk.gguf.take import Take
from coterie.model.disk.quantized_source import PackedTensors, QuantizedSource, short
from coterie.model.disk.tensors import Encoding, Packed, TensorInfo, bytes_of

#: ``quant_method`` of a packed folder, and the version of what config.json says of it.
PACK_METHOD, VERSION = "coterie-pack", 1

#: Bytes of which matrices within a record, and records within a file, begin at multiples: vectors and blocks of disks.
PIECE, BLOCK = 64, 4096

#: Bits of a matrix that stays as it is, in bfloat16.
PLAIN_BITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A matrix in a record.

    Attributes:
        bits: of a number: 4, 8, or `PLAIN_BITS`.
        group: columns that share a scale; None for all of a row, and where there is no scale.
        rows: its rows (outputs).
        columns: its columns (inputs).
    """

    bits: int
    group: int | None
    rows: int
    columns: int

    def encoding(self, isa: str | None, dtype: str) -> KernelMatrix | None:
        """Return how it is stored, unpacked to a format; None where it is plain."""
        if self.bits == PLAIN_BITS:
            return None
        return KernelMatrix(bits=self.bits, group=self.group, isa=isa if self.bits == 4 else None, dtype=dtype)

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return format and shape of what is stored of it, by suffix."""
        shape = self.rows, self.columns
        encoding: Encoding = self.encoding("any", "BF16") or Plain(dtype="BF16")
        return encoding.stored(shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Which rows of a tensor on disk a matrix of a record is.

    Attributes:
        matrix: number of the matrix in its record.
        axis: axis of the tensor's matrix along which they lie, 0 or 1.
        start: the first.
        step: from one to the next.
    """

    matrix: int
    axis: int
    start: int
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordTensor:
    """A tensor of the plain checkpoint that matrices of records are.

    Attributes:
        name: its name, with a star for the number of the expert; without one it is a stack of all experts' matrices,
            where there are several records.
        shape: of one expert's matrix.
        parts: what its rows are; every row is in one of them.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Records:
    """Records that hold the same: those of the experts of a layer, or that of a linear layer.

    Attributes:
        name: of a record, with a star for the number of the expert.
        count: how many there are.
        matrices: what each holds, in this order.
        tensors: what that is in the plain checkpoint.
    """

    name: str
    count: int
    matrices: tuple[Matrix, ...]
    tensors: tuple[RecordTensor, ...]

    @cached_property
    def pieces(self) -> tuple[Mapping[str, tuple[int, str, tuple[int, ...]]], ...]:
        """Where the pieces of each matrix begin in a record, their formats and shapes, by suffix."""
        position, pieces = 0, []
        for matrix in self.matrices:
            places = {}
            for suffix, (dtype, shape) in matrix.stored().items():
                places[suffix] = (position, dtype, shape)
                position += round_up(bytes_of(dtype, shape), PIECE)
            pieces.append(places)
        return tuple(pieces)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a record, a multiple of `BLOCK`."""
        begin, dtype, shape = list(self.pieces[-1].values())[-1]
        return round_up(begin + bytes_of(dtype, shape), BLOCK)

    def names(self) -> Iterator[str]:
        """Yield the names of the records."""
        yield from (self.name.replace("*", str(number)) for number in range(self.count))

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return {
            "name": self.name, "count": self.count, "matrices": [asdict(matrix) for matrix in self.matrices],
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }  # fmt: skip

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Records:
        """Read what `content` returned; raises KeyError, TypeError or ValueError where it is something else."""
        count, matrices = content["count"], tuple(Matrix(**each) for each in content["matrices"])
        tensors = tuple(
            RecordTensor(
                name=str(each["name"]), shape=(each["shape"][0], each["shape"][1]),
                parts=tuple(Part(**part) for part in each["parts"]),
            )
            for each in content["tensors"]
        )  # fmt: skip
        parts = [part for each in tensors for part in each.parts]
        numbers = [count, *(n for each in matrices for n in (each.bits, each.rows, each.columns))]
        numbers += [n for part in parts for n in (part.matrix, part.axis, part.start, part.step)]
        if not matrices or not tensors or any(type(n) is not int or n < 0 for n in numbers) or count < 1:
            raise ValueError("there is nothing in it, or a number that is no whole number from 0 on")
        records = cls(name=str(content["name"]), count=count, matrices=matrices, tensors=tensors)
        assert records.num_bytes  # matrices that cannot be show here
        return records


def _check_parts(tensor: RecordTensor, matrices: tuple[Matrix, ...]) -> None:
    """Raise ValueError unless the parts of a tensor are all of its rows, each once."""
    axis = tensor.parts[0].axis if tensor.parts else 0
    rows: list[int] = []
    for part in tensor.parts:
        if part.matrix >= len(matrices) or part.axis != axis or axis > 1 or part.step < 1:
            raise ValueError(f"{tensor.name} has parts that cannot be")
        matrix = matrices[part.matrix]
        if matrix.columns != tensor.shape[1 - axis] or part.start + part.step * (matrix.rows - 1) >= tensor.shape[axis]:
            raise ValueError(
                f"{tensor.name} is {list(tensor.shape)}, and a part has {matrix.rows} rows and {matrix.columns} columns"
            )
        rows += range(part.start, part.start + part.step * matrix.rows, part.step)
    if len(rows) != tensor.shape[axis] or len(set(rows)) != len(rows):
        raise ValueError(f"{tensor.name} is {list(tensor.shape)}, and its parts have other rows")


def pack_config(isa: str | None, records: tuple[Records, ...]) -> dict[str, Any]:
    """Return ``quantization_config`` of a packed folder.

    Args:
        isa: the processor that numbers of 4 bits lie for; None where there are none.
        records: all of them.
    """
    return {
        "quant_method": PACK_METHOD, "version": VERSION, "isa": isa, "records": [each.content() for each in records],
    }  # fmt: skip


def pack_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what config.json of a packed folder says of its records; None of any other."""
    settings = config.get("quantization_config")
    return settings if isinstance(settings, Mapping) and settings.get("quant_method") == PACK_METHOD else None


def records_of(settings: Mapping[str, Any], where: str) -> tuple[Records, ...]:
    """Return the records that config.json names.

    Args:
        settings: its ``quantization_config``.
        where: the folder, for messages.

    Raises:
        CorruptCheckpoint: it says what cannot be.
        UnsupportedDtype: a later version wrote it.
    """
    if settings.get("version") != VERSION:
        raise UnsupportedDtype(
            f"{where} was packed by another version of coterie (its format is {short(settings.get('version'))}, this "
            f"one reads {VERSION}): pack the model again"
        )
    try:
        return tuple(Records.of(content) for content in settings["records"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, UnsupportedDtype) as error:
        raise CorruptCheckpoint(
            f"{where}: quantization_config names records that cannot be ({short(str(error))}); pack the model again"
        ) from None


def find_records(source: QuantizedSource) -> PackedTensors:
    """Find what records hold, as tensors of the plain checkpoint; raises as `records_of`."""
    isa = source.settings.get("isa")
    weights: dict[str, TensorInfo] = {}
    dropped: set[str] = set()
    for records in records_of(source.settings, source.where):
        matrices: list[tuple[TensorInfo, ...]] = []
        for name in records.names():
            info = source.tensors.get(name)
            if info is None:
                raise CorruptCheckpoint(f"{source.where}: the record {name!r} is missing; pack the model again")
            if (info.dtype, info.shape) != ("U8", (records.num_bytes,)):
                raise source.misfit(info, f"a record of {records.num_bytes} bytes was expected")
            try:
                for tensor in records.tensors if not matrices else ():  # of extents that the file has the bytes for
                    _check_parts(tensor, records.matrices)
                matrices.append(_matrices(records, info, isa, source.dtype))
            except (UnsupportedDtype, ValueError) as error:
                raise source.misfit(info, str(error)) from None
            dropped.add(name)
        for tensor in records.tensors:
            each = [_tensor(tensor, numbered, source.dtype) for numbered in matrices]
            if "*" in tensor.name or records.count == 1:
                for number, info in enumerate(each):
                    name = tensor.name.replace("*", str(number))
                    weights[name] = replace(info, name=name)
                continue
            stack = StackedTensors(
                encoding=Stacked(count=records.count, dtype=source.dtype),
                stored={str(number): info for number, info in enumerate(each)},
            )
            weights[tensor.name] = TensorInfo(
                name=tensor.name, dtype=source.dtype, shape=(records.count, *tensor.shape), shard=each[0].shard,
                packed=stack,
            )  # fmt: skip
    return weights, dropped - weights.keys()


def records_apart(checkpoint: Checkpoint) -> Checkpoint:
    """Return a view of a packed folder in which what records hold are tensors of bytes under their plain names.

    For who counts bytes by names; the same object where nothing is packed in records. Each tensor has the bytes of its
    matrices, and all of a record have its place in the file.

    Raises:
        CorruptCheckpoint, UnsupportedDtype: see `find_records`.
    """
    settings = pack_settings(checkpoint.config)
    if settings is None:
        return checkpoint
    tensors = dict(checkpoint.tensors)
    for records in records_of(settings, str(checkpoint.path)):
        sizes = [sum(bytes_of(form, shape) for _, form, shape in pieces.values()) for pieces in records.pieces]
        for number, name in enumerate(records.names()):
            record = checkpoint.tensors.get(name)
            if record is None:
                raise CorruptCheckpoint(f"{checkpoint.path}: the record {name!r} is missing; pack the model again")
            tensors.pop(name, None)
            for tensor in records.tensors:
                size = sum(sizes[part.matrix] for part in tensor.parts)
                plain = tensor.name.replace("*", str(number))
                stack = records.count if "*" not in tensor.name and records.count > 1 else 0
                shape = (2, size // 2)  # of a matrix, for who looks for one
                tensors[plain] = replace(record, name=plain, shape=(stack, *shape) if stack else shape)
    config = {**checkpoint.config, "quantization_config": {**settings, "records": []}}
    return replace(checkpoint, tensors=tensors, config=config)


def _matrices(records: Records, record: TensorInfo, isa: str | None, dtype: str) -> tuple[TensorInfo, ...]:
    """Return the matrices of a record as tensors, each stored at its place in the file."""
    infos = []
    for number, (matrix, pieces) in enumerate(zip(records.matrices, records.pieces, strict=True)):
        stored = {
            suffix: TensorInfo(
                name=f"{record.name}:{number}{suffix}", dtype=form, shape=shape, shard=record.shard,
                begin=record.begin + begin, end=record.begin + begin + bytes_of(form, shape),
            )
            for suffix, (begin, form, shape) in pieces.items()
        }  # fmt: skip
        encoding = matrix.encoding(isa, dtype)
        if encoding is None:
            infos.append(stored[""])
            continue
        packed = Packed(encoding=encoding, stored=stored)
        name, shape = f"{record.name}:{number}", (matrix.rows, matrix.columns)
        infos.append(TensorInfo(name=name, dtype=dtype, shape=shape, shard=record.shard, packed=packed))
    return tuple(infos)


def _tensor(tensor: RecordTensor, matrices: tuple[TensorInfo, ...], dtype: str) -> TensorInfo:
    """Return a tensor, or one expert's matrix of a stack, from the matrices of its record."""
    first = tensor.parts[0]
    if matrices[first.matrix].shape == tensor.shape and first.axis == 0:
        return matrices[first.matrix]
    takes = tuple(
        Take(input_first=part.axis == 1, rows=tuple(range(part.start, part.start + part.step * rows, part.step)))
        for part in tensor.parts
        for rows in (matrices[part.matrix].shape[0],)
    )
    stored = {str(number): matrices[part.matrix] for number, part in enumerate(tensor.parts)}
    packed = Packed(encoding=Rearranged(takes=takes, shape=tensor.shape, dtype=dtype), stored=stored)
    return TensorInfo(
        name=tensor.name, dtype=dtype, shape=tensor.shape, shard=matrices[first.matrix].shard, packed=packed
    )


def round_up(position: int, multiple: int) -> int:
    """Return the first multiple of a number at or behind a position."""
    return -(-position // multiple) * multiple
