"""Damage that a header does not show: files that are not there but stood in for, and numbers that are none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

#: How a file begins that git leaves in place of a large one (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_LIMIT = 1024  # bytes; the format's own
_EXPERT = re.compile(r"experts?\.(\d+)\.")


def check_no_pointer(file: Path) -> None:
    """Raise CorruptCheckpoint for a file that is a Git LFS pointer; one that cannot be read is left to its reader."""
    try:
        if file.stat().st_size > _POINTER_LIMIT:
            return
        content = file.read_bytes()
    except OSError:
        return
    if content.startswith(_POINTER):
        size = re.search(rb"^size (\d+)$", content, re.MULTILINE)
        meant = f"a file of {size[1].decode()} bytes" if size else "the file"
        raise CorruptCheckpoint(
            f"{file}: this is a pointer that git left in place of {meant} (Git LFS); run git lfs pull in {file.parent}"
        )


def check_finite(path: Path, name: str, tensor: Tensor, *, infinity: bool) -> None:
    """Check that a tensor holds numbers; a pass over it that takes no memory.

    Args:
        path: the file that it comes from.
        name: of the tensor.
        tensor: what was read.
        infinity: whether infinity is a number here, as in masks.

    Raises:
        CorruptCheckpoint: it holds NaN or infinity; says which file, tensor, expert and the first index.
    """
    import torch

    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return  # formats of 8 bits and less are read as others, or not computed with
    least, largest = torch.aminmax(tensor)
    if torch.isfinite(least) and torch.isfinite(largest):
        return
    wrong = torch.isnan(tensor) if infinity else ~torch.isfinite(tensor)
    if not wrong.any():
        return
    index = torch.nonzero(wrong)[0].tolist()
    value = tensor[tuple(index)].item()
    raise CorruptCheckpoint(
        f"{path}: {name} {list(tensor.shape)} holds {value} at {index}{_expert_of(name, index)}, and "
        f"{int(wrong.sum()) - 1} more entries that are no finite numbers; fetch this file again, or ask who made it"
    )


def _expert_of(name: str, index: list[int]) -> str:
    single = _EXPERT.search(name)
    if single:
        return f", in expert {single[1]}"
    stacked = len(index) > 2 and any("expert" in component for component in name.split("."))
    return f", in expert {index[0]}" if stacked else ""
