"""A GGUF file as a model folder: config.json and tokenizer made from its fields, and a link to the file itself.

Such a folder is made once in a cache of ours and found there later, as what a hub id names is found in the hub's: under
``$COTERIE_CACHE``, by default ``~/.cache/coterie``. It holds no weights and may be removed at any time. A folder that
has config.json and GGUF files, and no other weights, is one already. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.artifact import full_disk
from coterie.errors import CorruptCheckpoint, InputError, NotACheckpoint, OutOfSpace
from coterie.model.disk.beside import TOKENIZER_FILES, files_beside
from coterie.model.disk.encodings import quantization_config
from coterie.model.disk.gguf.families import FAMILIES
from coterie.model.disk.gguf.fields import GgufFields
from coterie.model.disk.gguf.header import PLAIN, GgufHeader, StoredTensor, read_gguf
from coterie.model.disk.gguf.metadata import config_of, model_type_of
from coterie.model.disk.gguf.names import Heads
from coterie.model.disk.gguf.tensors import tensors_on_disk
from coterie.model.disk.gguf.tokens import tokenizer_files
from coterie.model.disk.tensors import TORCH_NAMES, TensorInfo

log = logging.getLogger(__name__)

SUFFIX = ".gguf"

#: Changes when folders are made otherwise, so that older ones are not taken.
_VERSION = 1

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_HUB = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")


def is_gguf(place: Path) -> bool:
    """Tell whether a path is a GGUF file, or a folder with such files that is no model folder yet."""
    if place.is_file():
        return place.suffix == SUFFIX
    return place.is_dir() and not (place / "config.json").exists() and any(place.glob(f"*{SUFFIX}"))


def files_of(place: Path) -> list[Path]:
    """Return the one GGUF file that a path or a folder is, or all parts of the one that is split.

    Raises:
        NotACheckpoint: the folder holds several.
        CorruptCheckpoint: a part is missing.
    """
    there = [place] if place.is_file() else sorted(place.glob(f"*{SUFFIX}"))
    models = {(match["stem"], match["count"]) if (match := _PART.fullmatch(f.name)) else f.name for f in there}
    if len(models) != 1:
        names = ", ".join(file.name for file in there[:4])
        raise NotACheckpoint(
            f"{place} holds {len(models)} GGUF models ({names}); pass the file of the one that is meant"
        )
    match = _PART.fullmatch(there[0].name)
    if match is None:
        return there
    count = int(match["count"])
    parts = [there[0].with_name(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    missing = [part for part in parts if not part.is_file()]
    if missing or there[0] not in parts:
        absent = missing[0] if missing else parts[0]
        raise CorruptCheckpoint(f"{absent}: this part of {count} is missing beside {there[0].name}; fetch it as well")
    return parts


def model_folder(place: Path) -> Path:
    """Return the model folder of a GGUF file, or of a folder with one; made where it is not there yet.

    Raises:
        NotACheckpoint, CorruptCheckpoint: there is not one such file, or a damaged one.
        InputError: its architecture is not known, or the cache cannot be written.
        OutOfSpace: the disk of the cache is full.
    """
    files = [file.absolute() for file in files_of(place)]
    beside = [] if place.is_file() else [file for file in files_beside(place) if file.parent == place]
    name = match["stem"] if (match := _PART.fullmatch(files[0].name)) else files[0].stem
    folder = _cache() / "gguf" / _key([*files, *beside]) / name
    if not (folder / "config.json").is_file():
        headers = read_headers(files)
        content = _content(headers)
        try:
            with full_disk(f"{folder} was written"):
                _write(folder, content, links=[*files, *beside])
            log.info("%s: its config and tokenizer are kept in %s", files[0], folder)
        except OutOfSpace:
            raise
        except OSError as error:
            raise InputError(
                f"{folder}, where config and tokenizer of a GGUF file are kept, cannot be written "
                f"({error.strerror or error}); name another place in COTERIE_CACHE"
            ) from error
    return folder


def place_of(folder: Path) -> Path:
    """Return the GGUF file that a model folder in the cache was made of; any other folder as it is."""
    if folder.parent.parent != _cache() / "gguf":
        return folder
    return next((file.readlink() for file in sorted(folder.glob(f"*{SUFFIX}")) if file.is_symlink()), folder)


def read_headers(files: Sequence[Path]) -> list[GgufHeader]:
    """Read the headers of all parts of a file, the one with the fields first, and check that they are one model's.

    Raises:
        CorruptCheckpoint: they are not.
    """
    headers = [read_gguf(file) for file in files]
    count, total = headers[0].fields.get("split.count", 1), headers[0].fields.get("split.tensors.count")
    if len(files) > 1:
        numbers = [header.fields.get("split.no") for header in headers]
        tensors = sum(len(header.tensors) for header in headers)
        if count != len(files) or numbers != list(range(len(files))) or total not in (None, tensors):
            raise CorruptCheckpoint(
                f"{files[0]}: its parts are numbers {numbers} of {count}, with {tensors} tensors of {total}; fetch all "
                "of one model"
            )
    elif count not in (0, 1):
        raise CorruptCheckpoint(f"{files[0]} is one of {count} parts, and the others are not beside it under its name")
    return headers


def read_tensors(
    folder: Path, shards: Sequence[str], config: dict[str, Any]
) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Return the tensors of a model folder whose weights are GGUF files, and its config with their encodings.

    Args:
        folder: the model folder.
        shards: names of the files in it.
        config: content of its config.json.

    Raises:
        InputError, CorruptCheckpoint: files and config are not of one model, or not of one that is known.
    """
    headers = read_headers([folder / shard for shard in shards])
    where = str(folder / shards[0] if (place := place_of(folder)) == folder else place)
    stored = _stored(headers)
    fields = GgufFields.of(where, headers[0].fields)
    name = model_type_of(fields, {tensor.name: tensor.shape for tensor in stored.values()})
    family = FAMILIES[name]
    said = FAMILIES.get(config["model_type"])
    if said is None or said.architecture != family.architecture:
        raise CorruptCheckpoint(f"{folder / 'config.json'} is of a {config['model_type']}, and {where} of a {name}")
    numbers: list[int] = []
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "qk_nope_head_dim"):
        number = config.get(key, 0)
        if type(number) is not int or number < (key != "qk_nope_head_dim"):
            raise CorruptCheckpoint(f"{folder / 'config.json'} says {key} = {str(number)[:40]}, which cannot be")
        numbers.append(number)
    heads = Heads(queries=numbers[1], keys=numbers[2], latent_keys=numbers[3])
    behind = fields.whole("nextn_predict_layers", 0)
    tensors, encodings = tensors_on_disk(said, heads, numbers[0], behind, stored, where)
    if not encodings:
        return tensors, config
    packing = quantization_config(encodings)
    for group in packing["groups"]:
        del group["dtype"]  # whoever reads it says
    return tensors, config | {"quantization_config": packing}


def check_tokenizer(folder: Path) -> None:
    """Raise InputError where a model folder was made from a GGUF file whose tokenizer is not known, and say why."""
    file = place_of(folder)
    if file != folder and not any(TOKENIZER_FILES.search(beside.name) for beside in folder.iterdir()):
        tokenizer_files(GgufFields.of(str(file), read_gguf(file).fields))


def _stored(headers: Sequence[GgufHeader]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for header in headers:
        twice = stored.keys() & header.tensors.keys()
        if twice:
            name = min(twice)
            raise CorruptCheckpoint(f"{header.path}: tensor {name!r} is also in {stored[name].shard}")
        stored |= header.tensors
    if not stored:
        raise CorruptCheckpoint(f"{headers[0].path}: it holds no tensors; fetch this file again, or take another")
    return stored


def _content(headers: Sequence[GgufHeader]) -> dict[str, Any]:
    """Return what is in the files of a model folder, by name."""
    stored = _stored(headers)
    fields = GgufFields.of(str(headers[0].path), headers[0].fields)
    config = config_of(fields, {name: tensor.shape for name, tensor in stored.items()}, _dtype(stored))
    if original := _original(fields):
        config["_name_or_path"] = original
    content: dict[str, Any] = {"config.json": config}
    try:
        content |= tokenizer_files(fields)
    except InputError as error:
        log.info("%s", error)
    if license_ := _short(fields, "general.license"):
        content["README.md"] = f"---\nlicense: {json.dumps(license_)}\n---\n"
    return content


def _dtype(stored: dict[str, StoredTensor]) -> str:
    """Return the number format that most plain numbers are in; the usual one where anything is in blocks."""
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.end - tensor.begin
    most = max(sizes, key=lambda kind: sizes[kind])
    return TORCH_NAMES[most] if sizes.keys() <= PLAIN.keys() else TORCH_NAMES["BF16"]


def _original(fields: GgufFields) -> str | None:
    """Return the hub id of the model that a file was made from, where it says one."""
    match = _HUB.fullmatch(_short(fields, "general.base_model.0.repo_url") or "")
    return match[1] if match else None


def _short(fields: GgufFields, key: str) -> str | None:
    value = fields.fields.get(key)
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 300 else None


def _cache() -> Path:
    said = os.environ.get("COTERIE_CACHE")
    if said:
        return Path(said).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"


def _key(files: Sequence[Path]) -> str:
    """Return what tells apart files, and the same file before and after it was written to."""
    stamps = [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([_VERSION, stamps]).encode()).hexdigest()[:16]


def _write(folder: Path, content: dict[str, Any], links: Sequence[Path]) -> None:
    """Write a model folder, as a whole or not at all."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent.parent))
    try:
        inner = temporary / folder.name
        inner.mkdir()
        for link in links:
            (inner / link.name).symlink_to(link.absolute())
        for name, said in content.items():
            if not (inner / name).exists():
                # A vocabulary would have hundreds of thousands of lines.
                indent = None if name == "tokenizer.json" else 2
                text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, indent=indent)
                (inner / name).write_text(text + "\n", encoding="utf-8")
        try:
            temporary.rename(folder.parent)
        except OSError:
            if not (folder / "config.json").is_file():  # unless another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
