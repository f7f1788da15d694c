"""The place that a result goes to: checked before any compute; files that are carried along as they are."""

from __future__ import annotations

import errno
import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from coterie.amounts import format_bytes
from coterie.artifact import write_json
from coterie.compress.integers import compressed_config
from coterie.compress.plan import Plan
from coterie.compress.source import Source
from coterie.compress.weights import encodings_of
from coterie.errors import OutOfSpace
from coterie.model.arch.layers import Architecture
from coterie.model.arch.resize import resized_config
from coterie.model.disk.beside import MODELING_FILE
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings import quantization_config
from coterie.model.disk.manifest import MANIFEST
from coterie.outputs import free_space
from coterie.publish.stock import auto_map, replaced_code, write_modeling_file

log = logging.getLogger(__name__)

#: Files that say what the original is and scores, which is not what its result is and scores: the result gets a card of
#: its own (`coterie.publish.card`), and the licence in files of other names comes along.
_ABOUT_ORIGINAL = (
    "readme", "readme.*", "readme[-_]*.md", "model_card.md", "modelcard.md", "card.json", "modelcard.json",
    "*_results.json", "*-results.json", "eval_results*", "trainer_state.json",
)  # fmt: skip


def _is_about_original(name: Path) -> bool:
    """Tell whether a file at the top of the original's folder speaks of its parameters and scores."""
    return len(name.parts) == 1 and any(fnmatch(name.name.lower(), pattern) for pattern in _ABOUT_ORIGINAL)


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OutOfSpace when the disk under `folder` has less than `num_bytes` (and some for the small files) free."""
    existing, free = free_space(folder)
    needed = num_bytes + 16 * 2**20
    if free < needed:
        raise OutOfSpace(
            errno.ENOSPC, f"the result needs {format_bytes(needed)}, {existing} has {format_bytes(free)} free"
        )


def result_config(source: Source, plan: Plan) -> dict[str, Any]:
    """Return the content of a result's config.json.

    Raises:
        Infeasible, ArchitectureMismatch: config.json cannot say what the plan does.
    """
    architecture = source.architecture
    if plan.integers:
        return dict(architecture.config) | {"quantization_config": compressed_config(source, plan.types)}
    if plan.packed:
        encodings = encodings_of(source.weights, plan)
        named = {"quantization_config": quantization_config(encodings)}
        return dict(architecture.config) | named | _loading_code(architecture)
    if not plan.mapped and not plan.ragged:
        return resized_config(architecture, plan.shape.num_experts, plan.shape.width, plan.shape.top_k)
    # A mapped result keeps the router's E rows, a ragged one the full width, and the config says so, while the files
    # hold less: stock loaders refuse them, but for those who let them run the code beside the weights.
    return dict(architecture.config) | _loading_code(architecture)


def _loading_code(architecture: Architecture) -> dict[str, Any]:
    return {"auto_map": auto_map(architecture.config, type(architecture.model.config))}


def write_config(source: Source, plan: Plan, folder: Path) -> None:
    """Write config.json and, where stock classes cannot load the result, the code that does (`coterie.publish.stock`).

    Raises:
        Infeasible, ArchitectureMismatch: config.json cannot say what the plan does.
        OutOfSpace: the disk filled up.
    """
    write_json(folder / "config.json", result_config(source, plan))
    if plan.integers or not (plan.packed or plan.mapped or plan.ragged):
        return
    write_modeling_file(folder)
    if replaced := replaced_code(source.architecture.config):
        log.warning(
            "auto_map in config.json of the original names code of its own (%s), which loads no %s: that of the result "
            "names %s instead",
            ", ".join(f"{name}: {code}" for name, code in sorted(replaced.items())),
            "weights in blocks" if plan.packed else "mapped or ragged result",
            MODELING_FILE,
        )


def carry_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the tokenizer and all other files that are neither weights nor config, nor about the original's quality.

    What Coterie writes beside weights is no file of the original's either.
    """
    for file in checkpoint.other_files():
        name = file.relative_to(checkpoint.path)
        if name not in (Path(MANIFEST), Path(MODELING_FILE)) and not _is_about_original(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
