"""Tables of text: parquet files, folders that `datasets` saved, and data sets of the hub, row by row. No torch here.

``hf:NAME`` names a data set as ``datasets.load_dataset`` takes it: an id of the hub, which may have a branch, tag or
commit (``hf:NAME@REVISION``), or a folder of parquet, JSON or other files; ``hf:NAME:CONFIG`` and
``hf:NAME:CONFIG:SPLIT`` (or ``hf:NAME::SPLIT``) say which part of it. Rows are read as they are needed, a few at a
time. `pyarrow` and `datasets` are the extra ``coterie[data]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from coterie.errors import InputError, TextError
from coterie.paths import user_path
from coterie.profile.rows import FIELDS

PREFIX = "hf:"

#: Rows of a table that are in memory at a time.
_ROWS = 64

#: A file of one of these names is in every folder that `datasets` saved.
_SAVED = ("state.json", "dataset_dict.json")

_USUAL_SPLIT = "train"

_WAY_OUT = "look whether the name is right and the hub can be reached"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A data set by its name.

    Attributes:
        name: id on the hub, or a local folder.
        config: which of its configurations; None for the only one.
        split: which of its splits; None for "train", or the only one.
        revision: a branch, tag or commit of the hub; None for the main branch, and of a folder.
    """

    name: str
    config: str | None
    split: str | None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> DataSet:
        """Read ``hf:NAME``, ``hf:NAME:CONFIG``, ``hf:NAME:CONFIG:SPLIT`` or ``hf:NAME::SPLIT``, with ``@REVISION`` too.

        Raises:
            TextError: it is none of these.
        """
        name, config, split = (*text.removeprefix(PREFIX).split(":", 2), "", "")[:3]
        if not name.strip() or ":" in split:
            raise TextError(f"{text!r} names no data set; write hf:ORG/NAME, hf:ORG/NAME:CONFIG or hf:ORG/NAME::SPLIT")
        revision = None
        if "@" in name and not user_path(name).is_dir():
            name, _, revision = name.rpartition("@")
            if not name.strip() or not revision.strip():
                raise TextError(f"{text!r} names no data set, or no revision of one; write hf:ORG/NAME@REVISION")
        return cls(name=name, config=config or None, split=split or None, revision=revision)

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        name = self.name if self.revision is None else f"{self.name}@{self.revision}"
        ending = f":{self.config or ''}" if self.config or self.split else ""
        return f"{PREFIX}{name}{ending}" + (f":{self.split}" if self.split else "")

    @property
    def domain(self) -> str:
        """What it is called as a domain: the last part of its name."""
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name.rstrip("/").rpartition("/")[2]

    @property
    def folder(self) -> Path | None:
        """Its folder, if it is a local one."""
        folder = user_path(self.name)
        return folder.resolve() if folder.is_dir() else None

    def pinned(self) -> DataSet:
        """Return it with the commit that the hub has now, so that it reads the same later; a folder with its place.

        Raises:
            TextError: no such data set or revision, or no network.
        """
        if self.folder is not None:
            return replace(self, name=str(self.folder))
        from huggingface_hub import HfApi

        with _one_line(str(self), _WAY_OUT):
            return replace(self, revision=HfApi().dataset_info(self.name, revision=self.revision).sha)

    def rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield (place, row) of each row, as they come from the hub or the disk.

        Raises:
            InputError: `datasets` is not installed.
            TextError: no such data set, configuration or split, or no network.
        """
        datasets: Any = _load("datasets")
        path = self.name if self.folder is None else str(self.folder)
        with _one_line(f"{PREFIX}{self.name}", _WAY_OUT):
            opened = datasets.load_dataset(path, self.config, streaming=True, revision=self.revision)
            yield from _rows_of(_split_of(opened, self.split, PREFIX + self.name), f"{PREFIX}{self.name}")


def is_data_set_name(source: str | Path) -> bool:
    """Tell whether a source of text is ``hf:`` and a name."""
    return str(source).startswith(PREFIX)


def local_place(source: str | Path) -> str | Path:
    """Return where a source of text is, if it is on the disk: without ``hf:`` and what follows the name."""
    return DataSet.parse(str(source)).name if is_data_set_name(source) else source


def is_saved(folder: Path) -> bool:
    """Tell whether a folder is one that ``save_to_disk`` made."""
    return any((folder / name).is_file() for name in _SAVED)


def is_data_set(folder: Path) -> bool:
    """Tell whether a folder without text of its own has parquet files below it, as those of the hub have."""
    return next(folder.glob("*/*.parquet"), None) is not None


def saved_rows(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, row) of each row in a folder that ``save_to_disk`` made; of several splits that named train.

    Raises:
        InputError: `datasets` is not installed.
        TextError: it cannot be read, or has several splits.
    """
    datasets: Any = _load("datasets")
    with _one_line(str(folder), "save it again"):
        yield from _rows_of(_split_of(datasets.load_from_disk(str(folder)), None, str(folder)), str(folder))


def table_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, row) of each row of a parquet file; only what `coterie.profile.rows` knows is read.

    Raises:
        InputError: `pyarrow` is not installed.
        TextError: it is no parquet file.
    """
    parquet: Any = _load("pyarrow.parquet")
    with _one_line(str(file), "make it again"), parquet.ParquetFile(str(file)) as table:
        names = list(table.schema_arrow.names)
        _check_columns(names, str(file))
        known = [name for name in names if name in FIELDS]
        batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=_ROWS, columns=known))
        yield from _numbered(itertools.chain.from_iterable(batches), str(file))


def _split_of(opened: Any, split: str | None, origin: str) -> Any:
    """Return one split of what was opened, which may be a split already."""
    if not isinstance(opened, dict):
        if split is not None:
            raise TextError(f"{origin} has no splits; leave {split!r} out")
        return opened
    names = [str(name) for name in opened]
    chosen = split or (_USUAL_SPLIT if _USUAL_SPLIT in names else names[0] if len(names) == 1 else None)
    if chosen is None or chosen not in names:
        wrong = f"has no split {chosen!r}" if chosen else "has several splits"
        raise TextError(f"{origin} {wrong}: name one of {', '.join(names)}, as in hf:NAME::{names[0]}")
    return opened[chosen]


def _rows_of(split: Any, origin: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    names = split.column_names
    if names is not None:  # known only when rows were read, for some that come from the hub
        _check_columns(names, origin)
        split = split.select_columns([name for name in names if name in FIELDS])
    yield from _numbered(split, origin)


def _check_columns(names: Iterable[str], origin: str) -> None:
    if not {"text", "messages", "conversations", "prompt"} & set(names):
        raise TextError(
            f'{origin} has no column "text", "messages", or "prompt" and "completion", but {", ".join(names)}; rename '
            "the one that holds text"
        )


def _numbered(rows: Iterable[Mapping[str, Any]], origin: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(rows, start=1):
        yield f"{origin}, row {number}", row


def _load(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise InputError(f"{package} is not installed, which reads this: pip install 'coterie[data]'") from None


@contextmanager
def _one_line(origin: str, way_out: str) -> Iterator[None]:
    """Turn whatever a reader of tables raises within the block into a TextError of one line."""
    try:
        yield
    except (InputError, GeneratorExit, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TextError(f"{origin} cannot be read ({reason}); {way_out}") from error
