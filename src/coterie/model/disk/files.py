"""Where the files of a model are: in a folder, or some of them on the hub (`coterie.model.disk.hub`). No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coterie.model.disk.header import read_header
from coterie.model.disk.tensors import TensorInfo

_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.+-]+(/[\w.+-]+)*))?")
_IN_CACHE = re.compile(r"models--(.+?)--(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubId:
    """The name of a model on the hub.

    Attributes:
        name: like ``org/name``.
        revision: a branch, tag or commit; None for the main branch.
    """

    name: str
    revision: str | None

    @classmethod
    def of(cls, model: str | Path) -> HubId | None:
        """Read ``org/name`` or ``org/name@revision``; None for what can be no hub id."""
        match = _HUB_ID.fullmatch(model) if isinstance(model, str) else None
        if match is None or match["name"].startswith("."):
            return None
        return cls(name=match["name"], revision=match["revision"])

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def name_of_folder(folder: Path) -> str:
    """Return what the model in a folder is called: the folder's name, of one in the cache of the hub its id."""
    real = folder.resolve()
    match = _IN_CACHE.fullmatch(real.parent.parent.name) if real.parent.name == "snapshots" else None
    return real.name if match is None else f"{match[1]}/{match[2]}"


class Files(Protocol):
    """Where the files of a model are."""

    @property
    def folder(self) -> Path:
        """The model folder; everything but weights is there."""

    @property
    def elsewhere(self) -> Collection[str]:
        """Names of the files that belong into it and are not there."""

    def headers(self, names: Sequence[str]) -> list[dict[str, TensorInfo]]:
        """Return what the headers of safetensors files say, of each."""

    def samples(self, names: Sequence[str]) -> list[tuple[int, bytes]]:
        """Return of each file its size and evenly spaced samples of its bytes, see `take_samples`."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """Files that are all in one folder; see `Files`."""

    folder: Path
    elsewhere: Collection[str] = ()

    def headers(self, names: Sequence[str]) -> list[dict[str, TensorInfo]]:
        """Return what headers say; raises CorruptCheckpoint."""
        return [read_header(self.folder / name) for name in names]

    def samples(self, names: Sequence[str]) -> list[tuple[int, bytes]]:
        """Return sizes and samples."""
        return [sample_file(self.folder / name) for name in names]


def sample_file(path: Path) -> tuple[int, bytes]:
    """Return the size of a file and samples of its bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:

        def read(begin: int, length: int) -> bytes:
            file.seek(begin)
            return file.read(length)

        return size, take_samples(size, read)


def take_samples(size: int, read: Callable[[int, int], bytes]) -> bytes:
    """Return evenly spaced samples of a file: 64 of 4 KiB.

    Args:
        size: bytes of the file.
        read: returns bytes of it, from a position on; fewer at its end.
    """
    return b"".join(read(size * step // _NUM_SAMPLES, _SAMPLE_BYTES) for step in range(_NUM_SAMPLES))
