"""Files beside the weights: what belongs to a model and is carried along, and what holds the weights once more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from coterie.errors import CorruptCheckpoint
from coterie.model.disk.header import absence

#: Patterns of files that hold weights, or say where weights are, in any format.
WEIGHT_PATTERNS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.distcp",
    "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.h5", "*.h5.index.json", "*.msgpack", "*.msgpack.index.json", "*.ot",
    "*.npz", "*.nemo", "*.tflite",
)  # fmt: skip

#: Folders with the weights once more, in the format of another program; and what programs leave behind.
_NOT_OURS = frozenset(("original", "__pycache__"))
_CONSOLIDATED = re.compile(r"consolidated.*\.(safetensors|pth)$")

#: The code with which stock transformers loads a result that its own classes cannot (`coterie.publish.stock`).
MODELING_FILE = "modeling_coterie.py"

#: Files that a tokenizer may be made from.
TOKENIZER_FILES = re.compile(r"token|vocab|merges|chat_template|\.(model|tiktoken|jinja)$")

#: What looking at a model and planning its compression reads beside that.
_SMALL = frozenset(
    ("config.json", "generation_config.json", "coterie.json", "model.safetensors.index.json",
     "pytorch_model.bin.index.json")
)  # fmt: skip


def is_small(name: str) -> bool:
    """Tell by its name whether a file is config, tokenizer or index: all that a model is looked at with but headers."""
    if "/" in name or name.startswith("."):
        return False
    return name in _SMALL or (TOKENIZER_FILES.search(name) is not None and not is_weights(name))


def belongs(names: Iterable[str]) -> list[str]:
    """Return of the names of a model's files, with folders, those that `files_beside` takes, sorted."""
    parts = {name: name.split("/") for name in names}
    # Folders with weights in them; the model's own is named by no part.
    copies = {"/".join(path[:-1]) for path in parts.values() if len(path) > 1 and is_weights(path[-1])}
    consolidated = {path[0] for path in parts.values() if len(path) == 1 and _CONSOLIDATED.match(path[0])}
    return sorted(
        name
        for name, path in parts.items()
        if not any(component.startswith(".") or component in _NOT_OURS for component in path)
        and not is_weights(path[-1])
        and not any("/".join(path[:depth]) in copies for depth in range(1, len(path)))
        and not (consolidated and name == "params.json")
    )


def is_weights(name: str) -> bool:
    """Tell by its name whether a file holds weights, or says where they are."""
    return any(Path(name).match(pattern) for pattern in WEIGHT_PATTERNS)


def files_beside(folder: Path) -> tuple[Path, ...]:
    """Return the files that belong to a model and hold no weights, in folders too, sorted; links are followed.

    Left out are hidden files and folders, folders that hold weights (second copies in other formats, checkpoints of a
    training), and ``params.json`` beside ``consolidated*`` weights, which sizes those.

    Args:
        folder: the model folder; paths begin with it.

    Raises:
        CorruptCheckpoint: a link leads nowhere.
    """
    return tuple(sorted(_files(folder, {folder.resolve()}, top=True)))


def _files(folder: Path, on_the_way: set[Path], *, top: bool) -> Iterator[Path]:
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if not top and any(is_weights(entry.name) for entry in entries):
        return
    consolidated = any(_CONSOLIDATED.match(entry.name) for entry in entries)
    for entry in entries:
        if is_weights(entry.name) or entry.name in _NOT_OURS or (consolidated and entry.name == "params.json"):
            continue
        if entry.is_symlink() and not entry.exists():
            raise CorruptCheckpoint(f"{entry}: {absence(entry)}; fetch it again or remove the link")
        if entry.is_file():
            yield entry
        elif entry.is_dir() and (inner := entry.resolve()) not in on_the_way:
            yield from _files(entry, on_the_way | {inner}, top=False)
