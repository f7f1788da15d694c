"""The header of a safetensors file: made; read, and checked against the file. No torch here."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.errors import CorruptCheckpoint
from coterie.model.disk.damage import check_no_pointer
from coterie.model.disk.tensors import DTYPE_BITS, TensorInfo, bytes_of

HEADER_LIMIT = 100_000_000  # bytes; the limit that safetensors itself sets
_NUMBER_LIMIT = 2**63  # what a file position or a number of elements can be
_RANK_LIMIT = 64  # axes of one tensor; torch sets the same limit


def header_of(
    tensors: Mapping[str, tuple[str, Sequence[int]]], *, metadata: Mapping[str, str] | None = None, multiple: int = 8
) -> bytes:
    """Return what a safetensors file begins with: all that stands before its first tensor.

    Args:
        tensors: number format and shape by name, in the order of the file, which has them without gaps.
        metadata: what the file says of itself; nothing when None.
        multiple: bytes of which the place of the first tensor is a multiple.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + bytes_of(dtype, tuple(shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return struct.pack("<Q", len(text)) + text


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Raises:
        CorruptCheckpoint: the header is cut off, is no JSON, is absurdly long, or its byte ranges overlap, leave
            gaps, exceed the file or contradict the shapes; or the file is a Git LFS pointer.
    """
    try:
        there = file.is_file()
    except OSError as error:  # a name that no file can have
        raise CorruptCheckpoint(
            f"{file.parent}: its index names the shard {file.name[:80]!r}: {error.strerror}; fetch the index again"
        ) from None
    if not there:
        raise CorruptCheckpoint(f"{file}: the shard {absence(file)}; fetch this file again")
    check_no_pointer(file)
    with file.open("rb") as stream:

        def read(begin: int, length: int) -> bytes:
            stream.seek(begin)
            return stream.read(length)

        return parse_header(str(file), file.name, file.stat().st_size, read)


def parse_header(where: str, shard: str, size: int, read: Callable[[int, int], bytes]) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file, wherever it is.

    Args:
        where: what to name in an error.
        shard: the file's name.
        size: its bytes.
        read: returns bytes of it, from a position on.

    Raises:
        CorruptCheckpoint: see `read_header`.
    """

    def corrupt(what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{where}: {what}; fetch this file again")

    prefix = read(0, min(8, size))
    if len(prefix) < 8:
        raise corrupt(f"only {size} bytes, too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, HEADER_LIMIT):
        raise corrupt(f"the header claims {length} bytes, the file has {size}")
    raw = read(8, length)
    try:
        header = parse_json(raw)
        infos = [
            _tensor_info(name, entry, shard, data=8 + length)
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise corrupt(f"the header is not readable ({type(error).__name__}: {error})") from None
    position = 8 + length
    for info in sorted(infos, key=lambda info: (info.begin, info.end)):
        if info.begin != position or info.end < info.begin:
            raise corrupt(f"tensor {info.name!r} starts at byte {info.begin}, expected {position}")
        if info.dtype not in DTYPE_BITS or min(info.shape, default=1) < 0:
            raise corrupt(f"tensor {info.name!r} has dtype {info.dtype!r} and shape {info.shape}")
        # Extents of a tensor without elements count too: torch computes strides from them.
        if len(info.shape) > _RANK_LIMIT or math.prod(extent or 1 for extent in info.shape) >= _NUMBER_LIMIT:
            raise corrupt(f"tensor {info.name!r} has {len(info.shape)} axes, more elements than a file can hold")
        if info.num_bytes != info.end - info.begin or (info.dtype == "F4" and info.num_elements % 2):
            raise corrupt(f"tensor {info.name!r}: {info.end - info.begin} bytes for {info.dtype} {info.shape}")
        position = info.end
    if position != size:
        raise corrupt(f"the header describes {position} bytes, the file has {size}: it is truncated or has a tail")
    return {info.name: info for info in infos}


def _tensor_info(name: str, entry: Any, shard: str, *, data: int) -> TensorInfo:
    """Return one entry of a header whose tensors begin at byte `data` of the file."""
    name.encode()  # what is no Unicode text (half of a surrogate pair) cannot be written or hashed later
    begin, end = (data + _whole(offset) for offset in entry["data_offsets"])
    shape = tuple(_whole(extent) for extent in entry["shape"])
    return TensorInfo(name=name, dtype=str(entry["dtype"]), shape=shape, shard=shard, begin=begin, end=end)


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) >= _NUMBER_LIMIT:
        raise ValueError(f"{str(value)[:40]!r} is not a whole number below 2**63")
    return value


def parse_json(raw: bytes) -> Any:
    """Parse JSON in UTF-8 in which no object names a key twice (readers differ in which of the two they take)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the name {twice!r} occurs twice")
        return parsed

    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)


def absence(file: Path) -> str:
    """Say why there is no file at a path."""
    if not file.is_symlink():
        return "is missing" if not file.exists() else "is no regular file"
    return f"is a link to {file.readlink()}, which " + ("is no regular file" if file.exists() else "does not exist")
