"""A model folder seen by its headers: what tensors there are, where they lie, and lazy access to them.

Nothing here imports torch until a tensor is read, so looking into a checkpoint of any size takes milliseconds.
All names in this file are names on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import CorruptCheckpoint, NotACheckpoint

if TYPE_CHECKING:
    import torch

#: Bits of one element, by the name that safetensors gives the number format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # bytes; the limit that safetensors itself sets


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; `begin` and `end` are byte positions in the shard file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model folder: its config, its tensors by name on disk, and a digest of both.

    The digest covers the config, every header, every shard's size and evenly spaced samples of every shard's bytes:
    cheap for any size, and different for any two models that were trained differently.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    digest: str

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a local model folder, or a hub id (``org/name``), which is fetched through huggingface_hub.

        Raises:
            NotACheckpoint: there is no such folder, or it has no config or no safetensors weights.
            CorruptCheckpoint: a shard is missing, truncated, or its header contradicts the file.
        """
        folder = _resolve(path)
        config = _read_config(folder)
        tensors: dict[str, TensorInfo] = {}
        index = _index_of(folder)
        for shard in _shard_names(folder, index):
            for name, info in read_header(folder / shard).items():
                if name in tensors:
                    raise CorruptCheckpoint(f"{folder}: tensor {name!r} is in both {tensors[name].shard} and {shard}")
                tensors[name] = info
        for name, shard in index.items():
            if name not in tensors or tensors[name].shard != shard:
                raise CorruptCheckpoint(
                    f"{folder / INDEX_NAME} places tensor {name!r} in {shard}, which does not hold it"
                )
        return cls(path=folder, config=config, tensors=tensors, digest=_digest(folder, config, tensors))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    @contextmanager
    def reader(self) -> Iterator[TensorReader]:
        """Yield a reader whose files stay open while the block runs."""
        reader = TensorReader(self)
        try:
            yield reader
        finally:
            reader.close()

    def other_files(self) -> tuple[Path, ...]:
        """Files that belong to the model but are neither weights nor config: tokenizer, templates, model card."""
        skipped = {"config.json", INDEX_NAME}
        weights = re.compile(r"\.(safetensors|bin|pt|pth|gguf|onnx|h5|msgpack|ot)(\.index\.json)?$")
        return tuple(
            sorted(
                file
                for file in self.path.iterdir()
                if file.is_file()
                and file.name not in skipped
                and not file.name.startswith(".")
                and not weights.search(file.name)
            )
        )


class TensorReader:
    """Reads tensors of one checkpoint by their names on disk; files are mapped read-only and kept open."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[str, Any] = {}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in its own dtype, on the CPU."""
        from safetensors import safe_open

        shard = self._checkpoint.tensors[name].shard
        if shard not in self._files:
            self._files[shard] = safe_open(self._checkpoint.path / shard, framework="pt", device="cpu")
        tensor: torch.Tensor = self._files[shard].get_tensor(name)
        return tensor

    def close(self) -> None:
        """Let go of all files."""
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
        raise corrupt("the shard is missing")
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
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        infos = [
            TensorInfo(
                name=name,
                dtype=str(entry["dtype"]),
                shape=tuple(int(extent) for extent in entry["shape"]),
                shard=file.name,
                begin=8 + length + int(entry["data_offsets"][0]),
                end=8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
        ]
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise corrupt(f"the header is not readable ({type(error).__name__}: {error})") from None
    position = 8 + length
    for info in sorted(infos, key=lambda info: (info.begin, info.end)):
        if info.begin != position or info.end < info.begin:
            raise corrupt(f"tensor {info.name!r} starts at byte {info.begin}, expected {position}")
        bits = DTYPE_BITS.get(info.dtype)
        if bits is None or min(info.shape, default=1) < 0:
            raise corrupt(f"tensor {info.name!r} has dtype {info.dtype!r} and shape {info.shape}")
        if info.num_bytes != -(-info.num_elements * bits // 8):
            raise corrupt(f"tensor {info.name!r}: {info.num_bytes} bytes for {info.dtype} {info.shape}")
        position = info.end
    if position != size:
        raise corrupt(f"the header describes {position} bytes, the file has {size}: it is truncated or has a tail")
    return {info.name: info for info in infos}


def _resolve(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise NotACheckpoint(f"{folder} is a file; pass the folder that holds config.json and *.safetensors")
    if isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return Path(
                snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise NotACheckpoint(
                f"{path} is no local folder and could not be fetched as a hub id ({type(error).__name__}: {first_line})"
            ) from None
    raise NotACheckpoint(f"{folder} does not exist; pass a folder with config.json and *.safetensors, or a hub id")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise NotACheckpoint(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise NotACheckpoint(f"{file} names no model_type, so transformers cannot tell what model it is")
    return config


def _index_of(folder: Path) -> dict[str, str]:
    """Return the shard of each tensor as the index says, empty without one; like stock loaders, a single file wins."""
    index = folder / INDEX_NAME
    if (folder / SINGLE_NAME).is_file() or not index.is_file():
        return {}
    return _weight_map(index)


def _shard_names(folder: Path, index: Mapping[str, str]) -> list[str]:
    if index:
        return sorted(set(index.values()))
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; it has {pickles[0]}: convert it with transformers' save_pretrained first" if pickles else ""
        raise NotACheckpoint(f"{folder} has no *.safetensors weights{hint}")
    raise NotACheckpoint(
        f"{folder} has {names[0]}, but neither {SINGLE_NAME} nor {INDEX_NAME}: fetch the index as well"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{index} is not a weight index: {type(error).__name__}: {error}") from None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CorruptCheckpoint(f"{index} is not a weight index: weight_map must map names to files")
    for name in weight_map.values():
        if Path(name).name != name:
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
