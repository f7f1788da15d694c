"""A model folder seen by its headers: what tensors there are, where they lie, and lazy access to them.

Nothing here imports torch until a tensor is read, so looking into a checkpoint of any size takes milliseconds.
All names in this file are names on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from coterie.errors import CorruptCheckpoint, NotACheckpoint

if TYPE_CHECKING:
    import torch

#: Bits of one element, by the name that safetensors gives the number format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip

#: The torch dtype of each number format, by its attribute name.
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "F64": "float64", "I64": "int64",
    "U64": "uint64", "C64": "complex64",
}  # fmt: skip

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
_HEADER_LIMIT = 100_000_000  # bytes; the limit that safetensors itself sets
_CONFIG_LIMIT = 16 * 2**20  # bytes; configs have some kilobytes
_NUMBER_LIMIT = 2**63  # what a file position or a number of elements can be
_RANK_LIMIT = 64  # axes of one tensor; torch sets the same limit


class Packed(Protocol):
    """How the value of a tensor that is not on disk as such is made from tensors that are."""

    def unpack(self, read: Callable[[TensorInfo], torch.Tensor]) -> torch.Tensor:
        """Return the value; `read` reads one tensor as it is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it.

    Attributes:
        name: its name on disk.
        dtype: its number format, a key of `DTYPE_BITS`.
        shape: its shape.
        shard: the file that holds it.
        begin: where its bytes begin in that file; 0 in a pickle and for a packed tensor.
        end: where they end; 0 in a pickle and for a packed tensor.
        packed: how to make it, when the file holds it packed (`coterie.model.quantized`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int = 0
    end: int = 0
    packed: Packed | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that this number format and shape take."""
        return -(-self.num_elements * DTYPE_BITS[self.dtype] // 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model folder: its config, its tensors by name on disk, and a digest of both.

    The digest covers the config, every header, every shard's size and evenly spaced samples of every shard's bytes:
    cheap for any size, and different for any two models that were trained differently.

    A checkpoint can also be a view that unpacks what is stored (`coterie.model.quantized.dequantized`): config and
    tensors are then those of the unpacked model, path and digest those of the folder.

    Attributes:
        path: the folder.
        config: content of config.json.
        tensors: what can be read, by name on disk.
        digest: identifies the folder's content.
        pickled: the weights are pickles, not safetensors.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    digest: str
    pickled: bool = False

    @classmethod
    def open(cls, path: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
        """Open a local model folder, or a hub id (``org/name``), which is fetched through huggingface_hub.

        Args:
            path: the folder or the hub id.
            allow_pickle: read ``pytorch_model*.bin`` where there are no safetensors files. torch's reader for
                tensors only is used, yet a pickle stays a program: allow it for sources that you trust.

        Raises:
            NotACheckpoint: there is no such folder, or it has no config or no weights that may be read.
            CorruptCheckpoint: a shard is missing, truncated, or its header contradicts the file.
        """
        folder = resolve(path, allow_pickle=allow_pickle)
        config = read_config(folder)
        tensors: dict[str, TensorInfo] = {}
        weights = _find_weights(folder, allow_pickle=allow_pickle)
        if weights.pickled:
            from coterie.model.pickled import read_pickle_header as read
        else:
            read = read_header
        for shard in weights.shards:
            for name, info in read(folder / shard).items():
                if name in tensors:
                    raise CorruptCheckpoint(f"{folder}: tensor {name!r} is in both {tensors[name].shard} and {shard}")
                tensors[name] = info
        for name, shard in weights.index.items():
            if name not in tensors or tensors[name].shard != shard:
                raise CorruptCheckpoint(
                    f"{folder / weights.index_name} places tensor {name!r} in {shard}, which does not hold it"
                )
        digest = _digest(folder, config, tensors)
        return cls(path=folder, config=config, tensors=tensors, digest=digest, pickled=weights.pickled)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as this checkpoint gives them: of a view, unpacked."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the weight files."""
        return tuple(sorted({info.shard for info in self.tensors.values()}))

    def file_stamps(self) -> dict[str, list[int]]:
        """Return size in bytes and time of last change in nanoseconds of config.json and of every weight file.

        Links are followed. Two equal stamps mean that nobody wrote to the file in between.

        Raises:
            CorruptCheckpoint: a file is gone.
        """
        stamps: dict[str, list[int]] = {}
        for name in ("config.json", *self.shards):
            try:
                found = (self.path / name).stat()
            except OSError:
                raise CorruptCheckpoint(f"{self.path / name}: {_absence(self.path / name)}; fetch it again") from None
            stamps[name] = [found.st_size, found.st_mtime_ns]
        return stamps

    @contextmanager
    def reader(self) -> Iterator[TensorReader]:
        """Yield a reader whose files stay open while the block runs."""
        reader = TensorReader(self)
        try:
            yield reader
        finally:
            reader.close()

    def other_files(self) -> tuple[Path, ...]:
        """Files that belong to the model but are neither weights nor config: tokenizer, templates, model card.

        Links to files count as the files they lead to; folders and links to folders do not count.

        Raises:
            CorruptCheckpoint: a link leads nowhere.
        """
        skipped = {"config.json", INDEX_NAME}
        weights = re.compile(r"\.(safetensors|bin|pt|pth|gguf|onnx|h5|msgpack|ot)(\.index\.json)?$")
        found: list[Path] = []
        for file in self.path.iterdir():
            if file.name in skipped or file.name.startswith(".") or weights.search(file.name):
                continue
            if file.is_symlink() and not file.exists():
                raise CorruptCheckpoint(f"{file}: {_absence(file)}; fetch it again or remove the link")
            if file.is_file():
                found.append(file)
        return tuple(sorted(found))


class TensorReader:
    """Reads tensors of one checkpoint by their names on disk.

    The files are opened read-only, kept open and read, not mapped: pages of a mapped file would count as memory of
    this process for as long as the mapping lives. Several threads may read at once.

    Attributes:
        num_bytes_read: bytes of tensors that were read from the files so far.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.num_bytes_read = 0
        self._checkpoint = checkpoint
        self._files: dict[str, FileIO] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the number format and shape that the checkpoint states for it.

        Raises:
            CorruptCheckpoint: the file was cut off or removed since the checkpoint was opened.
        """
        info = self._checkpoint.tensors[name]
        return self._read_stored(info) if info.packed is None else info.packed.unpack(self._read_stored)

    def _read_stored(self, info: TensorInfo) -> torch.Tensor:
        import torch

        with self._lock:
            self.num_bytes_read += info.num_bytes
        if self._checkpoint.pickled:
            from coterie.model.pickled import read_pickled

            return read_pickled(self._checkpoint.path / info.shard, info)
        buffer = torch.empty(info.num_bytes, dtype=torch.uint8)
        if info.num_bytes:
            self._fill(buffer.numpy().data, info)
        shape = info.shape
        if info.dtype == "F4":  # torch counts pairs of these
            shape = (*shape[:-1], shape[-1] // 2)
        return buffer.view(getattr(torch, TORCH_NAMES[info.dtype])).view(shape)

    def _fill(self, target: memoryview, info: TensorInfo) -> None:
        """Read the bytes of a tensor to where they are wanted, with no copy in between."""
        path = self._checkpoint.path / info.shard
        with self._lock:
            if info.shard not in self._files:
                try:
                    self._files[info.shard] = FileIO(path)
                except FileNotFoundError:
                    raise CorruptCheckpoint(f"{path}: {_absence(path)}; fetch this file again") from None
            file = self._files[info.shard]
        done = 0
        while done < len(target):
            count = self._read_at(file, target[done:], info.begin + done)
            if count == 0:
                raise CorruptCheckpoint(
                    f"{path}: ends after {info.begin + done} bytes, within tensor {info.name!r}, which ends at byte "
                    f"{info.end}: it was cut off after it was opened; fetch this file again"
                )
            done += count

    def _read_at(self, file: FileIO, target: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [target], position)
        with self._lock:  # where a file has one position that all threads share
            file.seek(position)
            return file.readinto(target) or 0

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file.

    Raises:
        CorruptCheckpoint: the header is cut off, is no JSON, is absurdly long, or its byte ranges overlap, leave
            gaps, exceed the file or contradict the shapes.
    """

    def corrupt(what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{file}: {what}; fetch this file again")

    if not file.is_file():
        raise corrupt(f"the shard {_absence(file)}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise corrupt(f"only {size} bytes, too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _HEADER_LIMIT):
            raise corrupt(f"the header claims {length} bytes, the file has {size}")
        raw = stream.read(length)
    try:
        header = _parse(raw)
        infos = [
            _tensor_info(name, entry, file.name, data=8 + length)
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


def _parse(raw: bytes) -> Any:
    """Parse JSON in UTF-8 in which no object names a key twice (readers differ in which of the two they take)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the name {twice!r} occurs twice")
        return found

    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)


def _absence(file: Path) -> str:
    """Say why there is no file at a path."""
    if not file.is_symlink():
        return "is missing" if not file.exists() else "is no regular file"
    return f"is a link to {file.readlink()}, which " + ("is no regular file" if file.exists() else "does not exist")


def resolve(path: str | Path, *, allow_pickle: bool = False) -> Path:
    """Return the folder of a model: a local one as it is, or the one that a hub id is fetched into.

    Raises:
        NotACheckpoint: there is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise NotACheckpoint(f"{folder} is a file; pass the folder that holds config.json and *.safetensors")
    if isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        try:
            folder = Path(snapshot_download(path, allow_patterns=patterns))
            if allow_pickle and not list(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(path, allow_patterns=[*patterns, "pytorch_model*.bin"]))
            return folder
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise NotACheckpoint(
                f"{path} is no local folder and could not be fetched as a hub id ({type(error).__name__}: {first_line})"
            ) from None
    if folder.is_symlink():
        raise NotACheckpoint(f"{folder} {_absence(folder)}; pass a folder with config.json and *.safetensors")
    raise NotACheckpoint(f"{folder} does not exist; pass a folder with config.json and *.safetensors, or a hub id")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's config.json; raises NotACheckpoint or CorruptCheckpoint."""
    file = folder / "config.json"
    if not file.is_file():
        if file.is_symlink():
            raise NotACheckpoint(f"{file} {_absence(file)}; fetch it again")
        snapshots = sorted(entry.name for entry in folder.glob("snapshots/*"))
        hint = f"; it is a download cache: pass {folder / 'snapshots' / snapshots[0]}" if snapshots else ""
        raise NotACheckpoint(f"{folder} has no config.json, so it is not a Hugging Face model folder{hint}")
    try:
        config = json.loads(_read_text(file, _CONFIG_LIMIT))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise NotACheckpoint(f"{file} names no model_type, so transformers cannot tell what model it is")
    return config


def _read_text(file: Path, limit: int) -> bytes:
    with file.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise CorruptCheckpoint(f"{file} has {file.stat().st_size} bytes, at most {limit} are believed; fetch it again")
    return content


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weights:
    """The weight files of a folder, and the index that assigns tensors to them, if there is one."""

    shards: list[str]
    index: Mapping[str, str]
    index_name: str = ""
    pickled: bool = False


def _find_weights(folder: Path, *, allow_pickle: bool) -> _Weights:
    """Find the weight files as stock loaders do: a single file before an index, safetensors before pickles."""
    kinds = [(SINGLE_NAME, INDEX_NAME, False)]
    if allow_pickle:
        kinds.append((PICKLE_NAME, PICKLE_INDEX_NAME, True))
    for single, index_name, pickled in kinds:
        if _is_there(folder / single):
            return _Weights(shards=[single], index={}, pickled=pickled)
        if _is_there(folder / index_name):
            index = _weight_map(folder / index_name)
            return _Weights(shards=sorted(set(index.values())), index=index, index_name=index_name, pickled=pickled)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if names:
        raise NotACheckpoint(
            f"{folder} has {names[0]}, but neither {SINGLE_NAME} nor {INDEX_NAME}: fetch the index as well"
        )
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    hint = ""
    if pickles and allow_pickle:
        hint = f"; it has {pickles[0]}, but neither {PICKLE_NAME} nor {PICKLE_INDEX_NAME}"
    elif pickles:
        hint = (
            f"; it has {pickles[0]}, a pickle, and reading a pickle can run code: convert it with transformers' "
            "save_pretrained, or pass --allow-pickle (allow_pickle=True) if you trust where it comes from"
        )
    raise NotACheckpoint(f"{folder} has no *.safetensors weights{hint}")


def _is_there(file: Path) -> bool:
    if file.is_symlink() and not file.exists():
        raise CorruptCheckpoint(f"{file}: {_absence(file)}; fetch this file again")
    return file.is_file()


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = _parse(_read_text(index, _HEADER_LIMIT))["weight_map"]
    except CorruptCheckpoint:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{index} is not a weight index: {type(error).__name__}: {error}") from None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CorruptCheckpoint(f"{index} is not a weight index: weight_map must map names to files")
    for name in weight_map.values():
        if Path(name).name != name or not name.isprintable():
            raise CorruptCheckpoint(f"{index} points outside its folder: {name!r}")
    return weight_map


def _digest(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape} {info.shard} {info.begin}\n".encode())
    for shard in sorted({info.shard for info in tensors.values()}):
        size = (folder / shard).stat().st_size
        digest.update(f"{shard} {size}\n".encode())
        with (folder / shard).open("rb") as file:
            for step in range(64):
                file.seek(size * step // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()
