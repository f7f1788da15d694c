"""A model folder seen by its headers: what tensors there are, where they lie, and lazy access to them.

Nothing here imports torch until a tensor is read, so looking into a checkpoint of any size takes milliseconds.
All names in this file are names on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coterie.errors import CorruptCheckpoint, NotACheckpoint, UnsupportedDtype
from coterie.model.disk.beside import MODELING_FILE, files_beside
from coterie.model.disk.files import Files, HubId, LocalFiles
from coterie.model.disk.gguf.folder import is_gguf, model_folder, read_tensors
from coterie.model.disk.header import absence
from coterie.model.disk.tensors import TORCH_NAMES, TensorInfo
from coterie.model.disk.weights import find_weights, read_text
from coterie.paths import user_path

if TYPE_CHECKING:
    import torch

#: What of the weights of a hub id is fetched, see `Checkpoint.open`.
Fetch = Literal["weights", "samples", "headers"]

_CONFIG_LIMIT = 16 * 2**20  # bytes; configs have some kilobytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A model folder: its config, its tensors by name on disk, and a digest of both.

    The digest covers the config, every header, every shard's size and evenly spaced samples of every shard's bytes:
    cheap for any size, and different for any two models that were trained differently.

    A checkpoint can also be a view that unpacks what is stored (`coterie.model.disk.quantized.dequantized`): config and
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
    def open(cls, path: str | Path, *, allow_pickle: bool = False, fetch: Fetch = "weights") -> Checkpoint:
        """Open a local model folder, a GGUF file, or a hub id (``org/name`` or ``org/name@revision``).

        Args:
            path: the folder, the file (of one that is split, any part), or the hub id.
            allow_pickle: read ``pytorch_model*.bin`` where there are no safetensors files. torch's reader for
                tensors only is used, yet a pickle stays a program: allow it for sources that you trust.
            fetch: what of a hub id's weights is fetched: "weights", all; "samples", only headers and what the digest is
                made from, a quarter of a MiB of each file; "headers", those alone, and the digest is empty. Tensors
                can be read of the first only. Weights that the local cache has are read there.

        Raises:
            NotACheckpoint: there is no such folder or hub id, or it has no config or no weights that may be read.
            CorruptCheckpoint: a shard is missing, truncated, or its header contradicts the file.
            OutOfSpace: the disk cannot hold what is to be fetched.
        """
        files: Files
        hub_id = None if user_path(path).exists() else HubId.of(path)
        if hub_id is None or fetch == "weights":
            files = LocalFiles(resolve(path, allow_pickle=allow_pickle))
        else:
            from coterie.model.disk.hub import fetch_model

            files = fetch_model(hub_id, weights=False, allow_pickle=allow_pickle)
        folder = files.folder
        config = read_config(folder)
        tensors: dict[str, TensorInfo] = {}
        weights = find_weights(folder, allow_pickle=allow_pickle, elsewhere=files.elsewhere)
        headers: list[dict[str, TensorInfo]]
        if weights.gguf:
            tensors, config = read_tensors(folder, weights.shards, config)
            headers = []
        elif weights.pickled:
            from coterie.model.disk.pickled import read_pickle_header

            headers = [read_pickle_header(folder / shard) for shard in weights.shards]
        else:
            headers = files.headers(weights.shards)
        for shard, header in zip(weights.shards, headers, strict=not weights.gguf):
            for name, info in header.items():
                if name in tensors:
                    raise CorruptCheckpoint(f"{folder}: tensor {name!r} is in both {tensors[name].shard} and {shard}")
                tensors[name] = info
        for name, shard in weights.index.items():
            if name not in tensors or tensors[name].shard != shard:
                raise CorruptCheckpoint(
                    f"{folder / weights.index_name} places tensor {name!r} in {shard}, which does not hold it"
                )
        _check_depth(folder, config, tensors)
        digest = "" if fetch == "headers" else _digest(files, config, tensors)
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
                status = (self.path / name).stat()
            except OSError:
                raise CorruptCheckpoint(f"{self.path / name}: {absence(self.path / name)}; fetch it again") from None
            stamps[name] = [status.st_size, status.st_mtime_ns]
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
        """Files that belong to the model but are neither weights nor config: tokenizer, templates, licence, code.

        Folders are looked into, and links are followed; see `coterie.model.disk.beside.files_beside`.

        Raises:
            CorruptCheckpoint: a link leads nowhere.
        """
        return tuple(file for file in files_beside(self.path) if file != self.path / "config.json")


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
            CorruptCheckpoint: the file was cut off or removed since the checkpoint was opened, or what is packed in it
                contradicts itself.
            UnsupportedDtype: a packed value is too large for the number format that was chosen.
        """
        return self._read(self._checkpoint.tensors[name])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows from `start` to before `stop` of one tensor along its first axis, as ``read(name)[start:stop]``.

        Where a stack holds one expert a row, this is how to read a few of them. Only the bytes of these rows are read
        and counted, packed stacks included. The whole tensor is read, counted and cut where rows do not lie by
        themselves: in pickles, in a single packed matrix (not a stack), in experts that are filled up with zeros along
        this axis, and where rows of 4-bit numbers do not begin at whole bytes.

        Raises:
            ValueError: there are no such rows.
            CorruptCheckpoint: the file was cut off or removed since the checkpoint was opened.
        """
        import torch

        info = self._checkpoint.tensors[name]
        rows = info.slice_rows(start, stop)
        if start == stop:
            return torch.empty((0, *info.shape[1:]), dtype=getattr(torch, TORCH_NAMES[info.dtype]))
        if rows is None or self._checkpoint.pickled:
            return self._read(info)[start:stop].clone()
        return self._read(rows)

    def _read(self, info: TensorInfo) -> torch.Tensor:
        if info.packed is None:
            return self._read_stored(info)
        stored = {suffix: self._read(stored_info) for suffix, stored_info in info.packed.stored.items()}
        try:
            return info.packed.encoding.unpack(stored)
        except (CorruptCheckpoint, UnsupportedDtype) as error:
            raise type(error)(f"{self._checkpoint.path / info.shard}: {info.name!r} {error}") from None

    def _read_stored(self, info: TensorInfo) -> torch.Tensor:
        import torch

        with self._lock:
            self.num_bytes_read += info.num_bytes
        if self._checkpoint.pickled:
            from coterie.model.disk.pickled import read_pickled

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
                    raise CorruptCheckpoint(f"{path}: {absence(path)}; fetch this file again") from None
            file = self._files[info.shard]
        num_read = 0
        while num_read < len(target):
            count = self._read_at(file, target[num_read:], info.begin + num_read)
            if count == 0:
                raise CorruptCheckpoint(
                    f"{path}: ends after {info.begin + num_read} bytes, within tensor {info.name!r}, which ends at "
                    f"byte {info.end}: it was cut off after it was opened; fetch this file again"
                )
            num_read += count

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


def resolve(path: str | Path, *, weights: bool = True, allow_pickle: bool = False) -> Path:
    """Return the folder of a model: a local one as it is, or the one made of a GGUF file, or that a hub id goes to.

    Args:
        path: the folder, a GGUF file, or a hub id like ``org/name``, or with a branch, tag or commit
            ``org/name@revision``.
        weights: fetch all that belongs to a model; else only config, tokenizer and the index of the weights.
        allow_pickle: fetch pickles where there are no safetensors files.

    Raises:
        NotACheckpoint: there is neither.
        OutOfSpace: the disk cannot hold the weights.
    """
    folder = user_path(path)
    if is_gguf(folder):
        return model_folder(folder)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise NotACheckpoint(f"{folder} is a file; pass a *.gguf, or the folder with config.json and *.safetensors")
    hub_id = HubId.of(path)
    if hub_id is not None:
        from coterie.model.disk.hub import fetch_model

        return fetch_model(hub_id, weights=weights, allow_pickle=allow_pickle).folder
    if folder.is_symlink():
        raise NotACheckpoint(f"{folder} {absence(folder)}; pass a folder with config.json and *.safetensors")
    raise NotACheckpoint(f"{folder} does not exist; pass a folder with config.json and *.safetensors, or a hub id")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's config.json; raises NotACheckpoint or CorruptCheckpoint."""
    file = folder / "config.json"
    if not file.is_file():
        if file.is_symlink():
            raise NotACheckpoint(f"{file} {absence(file)}; fetch it again")
        snapshots = sorted(entry.name for entry in folder.glob("snapshots/*"))
        hint = f"; it is a download cache: pass {folder / 'snapshots' / snapshots[0]}" if snapshots else ""
        raise NotACheckpoint(f"{folder} has no config.json, so it is not a Hugging Face model folder{hint}")
    try:
        config = json.loads(read_text(file, _CONFIG_LIMIT))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise NotACheckpoint(f"{file} names no model_type, so transformers cannot tell what model it is")
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise CorruptCheckpoint(
            f"{file} says architectures = {str(named)[:80]}, expected a list with the name of a class; fetch it again"
        )
    return _without_own_code(config)


def _without_own_code(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the name of the code that a result brings along for others: nothing here runs it."""
    named = config.get("auto_map")
    if not isinstance(named, Mapping):
        return config
    others = {name: code for name, code in named.items() if not str(code).startswith(f"{Path(MODELING_FILE).stem}.")}
    rest = {key: value for key, value in config.items() if key != "auto_map"}
    return rest | {"auto_map": others} if others else rest


def _check_depth(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CorruptCheckpoint for a number of layers that no model has, before one is built from it."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
            depth = part.get(key)
            if isinstance(depth, int) and (depth > len(tensors) or (depth < 1 and key == "num_hidden_layers")):
                raise CorruptCheckpoint(
                    f"{folder / 'config.json'} says {key} = {depth}, but the weight files hold {len(tensors)} tensors, "
                    "and every layer has some; config and weights are not of one model: fetch them again"
                )


def _digest(files: Files, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape} {info.shard} {info.begin}\n".encode())
    shards = sorted({info.shard for info in tensors.values()})
    for shard, (size, samples) in zip(shards, files.samples(shards), strict=True):
        digest.update(f"{shard} {size}\n".encode())
        digest.update(samples)
    return digest.hexdigest()
