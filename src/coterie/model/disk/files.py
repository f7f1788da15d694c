"""Where the files of a model are: in a folder, or some of them on the hub (`coterie.model.disk.hub`). No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coterie.model.disk.header import read_header
from coterie.model.disk.tensors import TensorInfo
from coterie.paths import user_path

_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
_HUB_PART = r"\w([\w.-]{0,94}\w)?"
_HUB_ID = re.compile(rf"{_HUB_PART}/{_HUB_PART}", re.ASCII)
_REVISION = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


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
        name, at, revision = model.partition("@") if isinstance(model, str) else ("", "", "")
        if not is_hub_id(name) or (at and not _REVISION.fullmatch(revision)):
            return None
        return cls(name=name, revision=revision or None)

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def is_hub_id(text: str, *, owner: bool = True) -> bool:
    """Tell whether the hub allows a text as the id of a repository: ``owner/name``; without `owner`, or ``name``."""
    whole = text if owner or "/" in text else f"x/{text}"
    return bool(_HUB_ID.fullmatch(whole)) and "--" not in text and ".." not in text and not text.endswith(".git")


def id_in_cache(folder: Path) -> str | None:
    """Return the hub id of what a folder is part of, where it is in a cache of the hub; None anywhere else.

    In such a cache, ``models--OWNER--NAME/snapshots/COMMIT`` are the files of one commit.
    """
    real = folder.resolve()
    for commit in (real, *real.parents):
        kind, _, rest = commit.parent.parent.name.partition("--")
        name = rest.replace("--", "/")
        if commit.parent.name == "snapshots" and kind == "models" and is_hub_id(name):
            return name
    return None


def name_of_model(model: str | Path) -> str:
    """Return what a model is called: its folder's name, of a folder in the cache of the hub its id, or its hub id.

    A GGUF file is called by its name without the ending.
    """
    folder = user_path(model)
    if folder.is_file():
        return folder.stem
    if not folder.is_dir():
        return str(model)
    return id_in_cache(folder) or folder.resolve().name


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
