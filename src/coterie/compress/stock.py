"""Load a result in integers as transformers does, and compare its matrices with what was meant.

That it loads, with nothing missing, proves nothing: a scheme that transformers does not expect gives other numbers
without a word. So every tensor is compared with what Coterie's own reader makes of the file, which is what the result
in flight computed with.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_compressed_tensors_available

from coterie.amounts import format_bytes
from coterie.compress.plan import Plan
from coterie.compress.result_model import ResultModel
from coterie.compress.result_steps import LeftOut
from coterie.compress.shards import Shard
from coterie.compress.source import Source
from coterie.errors import ReloadMismatch
from coterie.model.quiet import quiet
from coterie.model.stream.memory import Stage

#: What the check is called where it is left out.
NAME = "loading with transformers"

#: Largest difference of a number, relative to itself and to the largest of its tensor: both readers round products of
#: codes and scales to the number format of the model, bfloat16 at worst, of which half a step is 1/256.
TOLERANCE = 2.0**-7


def prepare_stock(source: Source, plan: Plan, limit: int | None) -> Stage | LeftOut | None:
    """Say what the check takes, or why it cannot be done; None where there is nothing for it.

    Args:
        source: the original.
        plan: what the result is.
        limit: bytes of memory that may be taken; None for as many as are free.
    """
    if not plan.integers:
        return None
    if plan.vllm_only:
        return LeftOut("experts of layers are stored in different types, which vLLM loads and transformers does not")
    if not is_compressed_tensors_available():
        return LeftOut("the package compressed-tensors is not installed; Coterie's own reader loaded the result")
    sizes: dict[int | None, int] = {}
    for weight in source.weights:
        sizes[weight.layer] = sizes.get(weight.layer, 0) + weight.plain_bytes
    layer = max(size for index, size in sizes.items() if index is not None)
    needed = Stage(
        name=NAME,
        lines=(
            ("the model as plain numbers", source.checkpoint.num_bytes),
            ("matrices that are no experts', as integers", plan.predicted_bytes // 4),
            ("experts of a layer, while they are joined and compared", 6 * layer),
        ),
        device=torch.device("cpu"),
    )
    allowed = needed.allowed(limit)
    if allowed is not None and needed.num_bytes > allowed:
        return LeftOut(
            f"transformers has the whole model in memory as plain numbers, {format_bytes(needed.num_bytes)}: more than "
            "there is; Coterie's own reader loaded the result, a layer at a time"
        )
    return replace(needed, device=None)  # what is free was looked at


def check_stock(folder: Path, result: ResultModel, shards: Sequence[Shard], ids_BS: Tensor) -> None:
    """Load what was written with transformers, and compare it tensor by tensor.

    Args:
        folder: the result.
        result: its meta model.
        shards: its weight files.
        ids_BS: a few tokens, which it is run on.

    Raises:
        ReloadMismatch: it does not load, tensors are missing, or one is not what was meant; names it.
    """
    theirs = _loaded(folder, type(result.model), ids_BS)
    places = result.model.state_dict().keys()
    for shard in shards:
        for name, ours in result.read_all(folder, shard).items():
            if name in places:
                _compare(name, ours, theirs.get(name))


def _loaded(folder: Path, model_class: Any, ids_BS: Tensor) -> dict[str, Tensor]:
    """Return all parameters of a result as transformers has them once it has run."""
    try:
        # The package draws bars of its own.
        with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            model, info = model_class.from_pretrained(
                folder, dtype="auto", output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
            model(input_ids=ids_BS, use_cache=False)  # linear modules are unpacked as they are run
    except (ImportError, MemoryError):  # what is written is right all the same, and kept
        raise
    except Exception as error:  # whatever its loader raises
        raise ReloadMismatch(
            f"transformers does not load what was written ({type(error).__name__}: {error}); nothing was kept: take a "
            "type of GGML, and please report it"
        ) from error
    for key in ("missing_keys", "mismatched_keys", "conversion_errors"):
        if info.get(key):
            what = f"{key.replace('_', ' ')}, such as {sorted(map(str, info[key]))[0]}"
            raise ReloadMismatch(f"transformers loads what was written with {what}; nothing was kept, please report it")
    return dict(model.state_dict())


def _compare(name: str, ours: Tensor, theirs: Tensor | None) -> None:
    """Raise ReloadMismatch where a tensor is not what was meant, within `TOLERANCE`."""
    if theirs is None or theirs.shape != ours.shape:
        what = "there is no such tensor" if theirs is None else f"its shape is {list(theirs.shape)}"
        raise ReloadMismatch(f"{name} loads otherwise in transformers ({what}); nothing was kept, please report it")
    ours, theirs = ours.to(torch.float32), theirs.to(torch.float32)
    allowed = TOLERANCE * (ours.abs() + 2.0**-7 * ours.abs().max())
    off = (ours - theirs).abs()
    if not bool((off <= allowed).all()):
        raise ReloadMismatch(
            f"{name} loads as other numbers in transformers, off by up to {float(off.max()):.2e} where the largest is "
            f"{float(ours.abs().max()):.2e}; nothing was kept, please report it"
        )
