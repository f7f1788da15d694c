"""Weights in pickles (``pytorch_model*.bin``), read only when asked for, with torch's reader for tensors only.

A file is mapped for one tensor at a time and let go at once, so no more than that tensor stays in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.errors import CorruptCheckpoint
from coterie.model.disk.damage import check_no_pointer
from coterie.model.disk.tensors import TORCH_NAMES, TensorInfo

_NAMES = {getattr(torch, attribute): name for name, attribute in TORCH_NAMES.items() if hasattr(torch, attribute)}


def read_pickle_header(file: Path) -> dict[str, TensorInfo]:
    """List the tensors of one pickle; their byte positions are not known.

    Raises:
        CorruptCheckpoint: the file is missing or damaged, or holds anything but a dictionary of plain tensors.
    """
    infos: dict[str, TensorInfo] = {}
    for name, tensor in _load(file).items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(tensor, Tensor):
            raise CorruptCheckpoint(f"{file}: entry {name!r} is a {type(tensor).__name__}, no tensor with a name")
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.is_quantized:
            raise CorruptCheckpoint(f"{file}: tensor {name!r} is {tensor.dtype} {tensor.layout}, no plain numbers")
        infos[name] = TensorInfo(name=name, dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape), shard=file.name)
    return infos


def read_pickled(file: Path, info: TensorInfo) -> Tensor:
    """Return a copy of one tensor of a pickle.

    Raises:
        CorruptCheckpoint: the file changed since it was listed.
    """
    tensor = _load(file).get(info.name)
    if not isinstance(tensor, Tensor) or _NAMES.get(tensor.dtype) != info.dtype or tuple(tensor.shape) != info.shape:
        raise CorruptCheckpoint(f"{file}: tensor {info.name!r} is not what it was when the checkpoint was opened")
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _load(file: Path) -> dict[Any, Any]:
    if not file.is_file():
        raise CorruptCheckpoint(f"{file}: the shard is missing; fetch this file again")
    check_no_pointer(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile file makes torch raise nearly anything
        first_line = str(error).strip().split("\n")[0]
        raise CorruptCheckpoint(
            f"{file} is not read as a dictionary of tensors ({type(error).__name__}: {first_line}); fetch it again, or "
            "load it where you trust it and save it with save_pretrained as safetensors"
        ) from None
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{file} holds a {type(content).__name__}, expected a dictionary of tensors")
    return content
