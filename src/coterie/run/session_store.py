"""Keys and values on the disk, for another time: a folder with a bounded number of bytes.

One sequence is one safetensors file: its tokens, what each layer holds, and a digest of all that, which is compared
before anything of it is used. A file is written whole or not at all. What is of another model or computed in another
way is left alone, what cannot be read is passed over with a word, and what was used longest ago goes when there is no
room: nothing that happens to the folder ends a generation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from coterie.amounts import format_bytes, parse_bytes
from coterie.artifact import atomic_path, digest_of
from coterie.errors import CorruptCheckpoint, CoterieError, InputError
from coterie.model.disk.header import header_of, read_header
from coterie.model.disk.tensors import DTYPE_NAMES, TORCH_NAMES, TensorInfo
from coterie.run.cache_layers import cache_tokens, common, cut_layer, is_known, is_whole, parts_of, put_together

log = logging.getLogger(__name__)

#: Bytes of a folder of sessions, where nothing else is said.
SIZE = "1GiB"

#: What names of files begin and end with, and what they say of how they are written.
_BEGIN, _END, _FORMAT = "session-", ".safetensors", "coterie session 1"

#: Bytes that are read or written at once.
_PIECE = 2**22

#: Names of the tensors beside those of layers: the tokens, and the digest of all bytes before it.
_IDS, _DIGEST = "ids", "sha256"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Stored:
    """A sequence on the disk.

    Attributes:
        file: where.
        ids_S: its tokens.
        tensors: what the file holds, by name.
        numbers: numbers that layers hold, as `coterie.run.cache_layers.parts_of` gives them, layer by layer.
    """

    file: Path
    ids_S: Tensor
    tensors: dict[str, TensorInfo]
    numbers: list[dict[str, int | None]]


def check_folder(folder: str | Path, size: int | str) -> tuple[Path, int]:
    """Return a folder that sessions can be written to, which is made where it is not there, and how many bytes.

    Args:
        folder: the folder.
        size: bytes, or an amount like "1GiB".

    Raises:
        InputError: it is no folder, or nothing can be written there; or no amount.
    """
    path, num_bytes = Path(folder), parse_bytes(size)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--sessions {str(path)!r}: {error}; name a folder") from None
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"--sessions {path}: nothing can be written there; name another folder")
    return path, num_bytes


class SessionStore:
    """A folder of sessions."""

    def __init__(
        self, folder: str | Path, size: int | str, *, key: str, context: int, new_cache: Callable[[], Cache]
    ) -> None:
        """Look at what is there.

        Args:
            folder: made where it is not there.
            size: bytes, or an amount like "1GiB", that sessions in it may take.
            key: names what keys and values hang on beside tokens: model, number formats, versions.
            context: tokens of a sequence at most, since there is memory for no layer of more.
            new_cache: makes an empty cache.

        Raises:
            InputError: it is no folder, or nothing can be written there; or no amount.
        """
        self._folder, self._size = check_folder(folder, size)
        self._key, self._context, self._new_cache = key, context, new_cache
        # Where layers can be cut back, the beginning of a sequence serves as well.
        self._whole = all(map(is_whole, new_cache().layers))
        self._stored = [stored for file, _ in self._files() if (stored := self._look(file)) is not None]

    @property
    def sequences(self) -> list[Tensor]:
        """Tokens of each sequence of this model that is there."""
        return [stored.ids_S for stored in self._stored]

    def best(self, ids_S: Tensor) -> int:
        """Return how many of the first ids, of which one is left to compute, are there."""
        return max((self._usable(stored, ids_S) for stored in self._stored), default=0)

    def load(self, ids_S: Tensor) -> tuple[Cache, int] | None:
        """Return keys and values of as many of the first ids as are there, and for how many tokens they are.

        They are read layer by layer, so that no more of a sequence is in memory than is asked for, and a layer.

        Args:
            ids_S: the prompt.

        Returns: None where a file is damaged or gone, which is said.
        """
        stored = max(self._stored, key=lambda stored: self._usable(stored, ids_S))
        tokens = self._usable(stored, ids_S)
        try:
            cache = self._read(stored, tokens)
            os.utime(stored.file)
        # What is damaged may be anything until its digest is compared, which is when all of it was read.
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            log.warning("%s is not used: %s", stored.file, error)
            self._stored.remove(stored)
            return None
        return cache, tokens

    def save(self, ids_S: Tensor, cache: Cache) -> None:
        """Write a sequence, if it is not there and there is room; let go what was used longest ago.

        Args:
            ids_S: its tokens.
            cache: their keys and values.
        """
        if not is_known(cache) or self._covers(ids_S):
            return
        parts = [parts_of(layer) for layer in cache.layers]
        tensors = {_IDS: ids_S.to(torch.int64)} | {
            f"{number}.{name}": tensor for number, (own, _) in enumerate(parts) for name, tensor in own.items()
        }
        head = _header(
            tensors, {"format": _FORMAT, "key": self._key, "numbers": json.dumps([each for _, each in parts])}
        )
        num_bytes = len(head) + sum(tensor.nbytes for tensor in tensors.values()) + hashlib.sha256().digest_size
        if num_bytes > self._size:
            log.info("a session of %s is not kept: there is room for %s", format_bytes(num_bytes),
                     format_bytes(self._size))  # fmt: skip
            return
        file = self._folder / f"{_BEGIN}{digest_of([self._key, ids_S.tolist()])}{_END}"
        try:
            self._make_room(num_bytes)
            with atomic_path(file) as temporary, temporary.open("wb") as stream:
                _write(stream, head, tensors)
            file.chmod(0o600)  # it is what somebody wrote
        except (OSError, CoterieError) as error:
            log.warning("a session is not kept in %s: %s", self._folder, error)
            return
        stored = self._look(file)
        if stored is not None:
            for other in [each for each in self._stored if self._whole and _begins(ids_S, each.ids_S)]:
                self._forget(other.file)
            self._stored.append(stored)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """Return sessions of all models that are there, the one that was used longest ago first."""
        files = []
        for file in self._folder.glob(f"{_BEGIN}*{_END}"):
            try:
                files.append((file, file.stat()))
            except OSError:
                continue  # another process let it go
        return sorted(files, key=lambda each: each[1].st_mtime_ns)

    def _look(self, file: Path) -> _Stored | None:
        """Return a session of this model; None where it is of another one or cannot be read, which is said."""
        try:
            tensors = read_header(file)
            with file.open("rb") as stream:
                said = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))["__metadata__"]
                if said["format"] != _FORMAT or said["key"] != self._key:
                    return None
                info = tensors[_IDS]
                if info.dtype != "I64" or len(info.shape) != 1 or not info.shape[0]:
                    raise ValueError(f"tokens are {info.dtype} {info.shape}")
                ids_S = _read_tensor(stream, info, hashlib.sha256())
            numbers = json.loads(said["numbers"])
            if [type(each) for each in numbers] != [dict] * len(self._new_cache().layers):
                raise ValueError("it has other layers")
            return _Stored(file=file, ids_S=ids_S, tensors=tensors, numbers=numbers)
        except (OSError, ValueError, LookupError, TypeError, CorruptCheckpoint) as error:
            log.warning("%s is not used: %s", file, error)
            return None

    def _usable(self, stored: _Stored, ids_S: Tensor) -> int:
        tokens = min(common(stored.ids_S, ids_S), len(ids_S) - 1)
        if len(stored.ids_S) > self._context:
            return 0
        return tokens if self._whole or tokens == len(stored.ids_S) else 0

    def _covers(self, ids_S: Tensor) -> bool:
        """Return whether a sequence serves in the place of another one, and note that it was used."""
        for stored in self._stored:
            if (self._whole or len(stored.ids_S) == len(ids_S)) and _begins(stored.ids_S, ids_S):
                try:
                    os.utime(stored.file)
                except OSError:
                    continue  # another process let it go
                return True
        return False

    def _read(self, stored: _Stored, tokens: int) -> Cache:
        """Return the first tokens of a sequence.

        Raises:
            ValueError: the file is damaged.
        """
        cache, digest = self._new_cache(), hashlib.sha256()
        begin = min(info.begin for info in stored.tensors.values())
        order = sorted(stored.tensors.values(), key=lambda info: info.begin)
        if order[-1].name != _DIGEST or order[-1].dtype != "U8" or order[0].name != _IDS:
            raise ValueError("it is no session")
        with stored.file.open("rb") as stream:
            digest.update(stream.read(begin))
            ids_S = _read_tensor(stream, order[0], digest)
            for number, layer in enumerate(cache.layers):
                prefix = f"{number}."
                tensors = {
                    info.name.removeprefix(prefix): _read_tensor(stream, info, digest)
                    for info in order if info.name.startswith(prefix)
                }  # fmt: skip
                put_together(layer, tensors, stored.numbers[number])
                if self._whole:
                    cut_layer(layer, tokens)
            expected = _read_tensor(stream, order[-1], hashlib.sha256())
        if bytes(expected.tolist()) != digest.digest() or not torch.equal(ids_S, stored.ids_S):
            raise ValueError("it is damaged: its digest is another")
        if cache_tokens(cache) != tokens:
            raise ValueError(f"it holds {cache_tokens(cache)} tokens and not {tokens}")
        return cache

    def _make_room(self, num_bytes: int) -> None:
        """Let go what was used longest ago, of whatever model, until so many bytes are free."""
        files = self._files()
        total = sum(stat.st_size for _, stat in files)
        for file, stat in files:
            if total + num_bytes <= self._size:
                return
            self._forget(file)
            total -= stat.st_size

    def _forget(self, file: Path) -> None:
        self._stored = [stored for stored in self._stored if stored.file != file]
        file.unlink(missing_ok=True)


def session_key(model: PreTrainedModel, digest: str, cache: Cache, kv: str) -> str:
    """Return what names all that keys and values of tokens hang on.

    Args:
        model: what computes them.
        digest: of its checkpoint.
        cache: an empty one.
        kv: how they are kept.
    """
    layers = [type(layer).__name__ for layer in cache.layers]
    attention = model.config._attn_implementation
    return digest_of([digest, str(model.dtype), layers, kv, attention, transformers.__version__])


def _begins(whole_S: Tensor, part_S: Tensor) -> bool:
    """Return whether a sequence begins with another one."""
    return common(whole_S, part_S) == len(part_S)


def _header(tensors: dict[str, Tensor], said: dict[str, str]) -> bytes:
    """Return the header of a safetensors file of some tensors, and a digest behind them."""
    all_of_it = {
        name: (DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    return header_of(all_of_it | {_DIGEST: ("U8", (hashlib.sha256().digest_size,))}, metadata=said)


def _write(stream: BinaryIO, head: bytes, tensors: dict[str, Tensor]) -> None:
    """Write a session, tensor by tensor."""
    digest = hashlib.sha256(head)
    stream.write(head)
    for tensor in tensors.values():
        for piece in _pieces(tensor.detach().cpu().contiguous()):
            digest.update(piece)
            stream.write(piece)
    stream.write(digest.digest())


def _read_tensor(stream: BinaryIO, info: TensorInfo, digest: Any) -> Tensor:
    """Read a tensor, and let a digest see its bytes.

    Raises:
        ValueError: the file ends before it.
    """
    tensor = torch.empty(info.shape, dtype=getattr(torch, TORCH_NAMES[info.dtype]))
    stream.seek(info.begin)
    for piece in _pieces(tensor):
        if stream.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise ValueError(f"it ends before the end of {info.name}")
        digest.update(piece)
    return tensor


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the memory of a tensor, piece by piece."""
    if tensor.numel():
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(view), _PIECE):
            yield view[begin : begin + _PIECE]
