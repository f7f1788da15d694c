"""Files beside the weights: what belongs to a model and is carried along, and what holds the weights once more."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    consolidated = any(re.match(r"consolidated.*\.(safetensors|pth)$", entry.name) for entry in entries)
    for entry in entries:
        if is_weights(entry.name) or entry.name in _NOT_OURS or (consolidated and entry.name == "params.json"):
            continue
        if entry.is_symlink() and not entry.exists():
            raise CorruptCheckpoint(f"{entry}: {absence(entry)}; fetch it again or remove the link")
        if entry.is_file():
            yield entry
        elif entry.is_dir() and (inner := entry.resolve()) not in on_the_way:
            yield from _files(entry, on_the_way | {inner}, top=False)
