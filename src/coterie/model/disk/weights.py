"""Which files of a model folder are its weights: the single file, or those that an index names. No torch here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import CorruptCheckpoint, NotACheckpoint
from coterie.model.disk.damage import check_no_pointer
from coterie.model.disk.header import HEADER_LIMIT, absence, parse_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"


def read_text(file: Path, limit: int) -> bytes:
    """Return the content of a small file; raises CorruptCheckpoint for a pointer, or one beyond `limit` bytes."""
    check_no_pointer(file)
    with file.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise CorruptCheckpoint(f"{file} has {file.stat().st_size} bytes, at most {limit} are believed; fetch it again")
    return content


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The weight files of a folder, and the index that assigns tensors to them, if there is one.

    Attributes:
        shards: names of the files.
        index: file of each tensor by its name, as the index says; empty where there is one file and no index.
        index_name: the index.
        pickled: they are pickles.
        gguf: they are GGUF files.
    """

    shards: list[str]
    index: Mapping[str, str]
    index_name: str = ""
    pickled: bool = False
    gguf: bool = False


def find_weights(folder: Path, *, allow_pickle: bool, elsewhere: Collection[str] = ()) -> Weights:
    """Find the weight files as stock loaders do: a single file before an index, safetensors before pickles.

    Args:
        folder: the model folder.
        allow_pickle: whether pickles may be read.
        elsewhere: names of files that belong there and are not fetched yet.

    Raises:
        NotACheckpoint: there are none that may be read.
        CorruptCheckpoint: the index is damaged, or a link leads nowhere.
    """
    kinds = [(SINGLE_NAME, INDEX_NAME, False)]
    if allow_pickle:
        kinds.append((PICKLE_NAME, PICKLE_INDEX_NAME, True))
    for single, index_name, pickled in kinds:
        if single in elsewhere or _is_there(folder / single):
            return Weights(shards=[single], index={}, pickled=pickled)
        if _is_there(folder / index_name):
            index = _weight_map(folder / index_name)
            return Weights(shards=sorted(set(index.values())), index=index, index_name=index_name, pickled=pickled)
    there = {file.name for file in folder.iterdir()} | {name for name in elsewhere if "/" not in name}
    names = sorted(name for name in there if name.endswith(".safetensors"))
    if names:
        raise NotACheckpoint(
            f"{folder} has {names[0]}, but neither {SINGLE_NAME} nor {INDEX_NAME}: fetch the index as well"
        )
    pickles = sorted(name for name in there if name.endswith(".bin"))
    parts = sorted(file.name for file in folder.glob("*.gguf"))
    if not pickles and (len(parts) == 1 or (parts and re.fullmatch(r".+-\d{5}-of-\d{5}\.gguf", parts[0]))):
        return Weights(shards=parts, index={}, gguf=True)
    hint = ""
    if pickles and allow_pickle:
        hint = f"; it has {pickles[0]}, but neither {PICKLE_NAME} nor {PICKLE_INDEX_NAME}"
    elif pickles:
        hint = (
            f"; it has {pickles[0]}, a pickle, and reading a pickle can run code: convert it with transformers' "
            "save_pretrained, or pass --allow-pickle (allow_pickle=True) if you trust where it comes from"
        )
    elif parts:
        hint = f"; it has {parts[0]} and other GGUF files: pass the file of the one that is meant"
    raise NotACheckpoint(f"{folder} has no *.safetensors weights{hint}")


def _is_there(file: Path) -> bool:
    if file.is_symlink() and not file.exists():
        raise CorruptCheckpoint(f"{file}: {absence(file)}; fetch this file again")
    return file.is_file()


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = parse_json(read_text(index, HEADER_LIMIT))["weight_map"]
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
