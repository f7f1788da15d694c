"""Load a whole model into memory: stock transformers for plain checkpoints, and the loaders of mapped and ragged ones.

A mapped checkpoint (``--router map``) keeps the router's E rows and points them at M experts. Its config counts E
experts while its files hold M, so stock loaders refuse it instead of computing something else. A ragged checkpoint has
experts of different widths (`coterie.model.disk.filled`). The code that a result has beside it, for transformers alone,
does the same in its own words (`coterie.publish.modeling_coterie`) and is never run here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from coterie.errors import CorruptCheckpoint, CoterieError
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.head import model_config
from coterie.model.arch.layers import Architecture
from coterie.model.arch.mapped import attach_maps, maps_of, widen_routers
from coterie.model.arch.meta import make_buffers, meta_model, parse_config
from coterie.model.arch.resize import resized_config
from coterie.model.arch.structure import check_chosen
from coterie.model.device import check_device
from coterie.model.disk.checkpoint import Checkpoint, TensorReader
from coterie.model.disk.filled import filled_up
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.disk.quantized import dequantized, is_read_by_us_alone
from coterie.model.disk.tensors import WHOLE_NUMBERS
from coterie.model.quiet import in_a_line, quiet

log = logging.getLogger(__name__)

#: The switch by which transformers loads in the order of need; it has no other.
_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"


def load_model(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a checkpoint, plain, mapped or ragged, with nothing missing; what its class has no place for is logged.

    What is stored quantised becomes plain numbers: transformers unpacks FP8 and MXFP4, Coterie all else, in bfloat16.

    Args:
        model: a model folder or a hub id.
        dtype: number format in memory; float32 on the CPU and the checkpoint's own elsewhere when None.
        device: where the model goes.

    Raises:
        CorruptCheckpoint: tensors are missing or of the wrong shape.
        NotACheckpoint: no such model.
        InputError: no such device.
    """
    target = check_device(device)
    stored = Checkpoint.open(model)
    chosen: Any = dtype or (torch.float32 if target.type == "cpu" else "auto")
    manifest = Manifest.read(stored.path)
    if is_read_by_us_alone(stored):
        stored = dequantized(stored)
    checkpoint = stored if manifest is None else filled_up(stored, manifest.ragged)
    check_chosen(checkpoint.config, str(checkpoint.path))
    config = model_config(checkpoint)
    meta = meta_model(config, where=str(checkpoint.path))
    if "quantization_config" not in config and any(info.dtype in WHOLE_NUMBERS for info in checkpoint.tensors.values()):
        WeightConversion(checkpoint, meta).check_fractions(meta)
    loaded: PreTrainedModel
    info: dict[str, Any]
    with quiet():
        try:
            if manifest is not None and manifest.form is ResultForm.MAPPED:
                loaded, info = _load_mapped(checkpoint, manifest, chosen)
            elif "quantization_config" not in config:
                loaded, info = _load_plain(checkpoint, type(meta), parse_config(config), chosen)
            else:  # transformers unpacks it as it loads
                loaded, info = type(meta).from_pretrained(  # type: ignore[misc]
                    checkpoint.path,
                    config=parse_config(config),
                    dtype=chosen,
                    output_loading_info=True,
                    local_files_only=True,
                    trust_remote_code=False,
                )
        except (CoterieError, MemoryError):
            raise
        except Exception as error:  # quantisers check what they are told in their own ways
            raise CorruptCheckpoint(f"{checkpoint.path} does not load: {in_a_line(error)}") from error
    wrong = {key: info[key] for key in ("missing_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        listed = "; ".join(f"{key.replace('_', ' ')}: {sorted(map(str, names))[:3]}" for key, names in wrong.items())
        raise CorruptCheckpoint(f"{checkpoint.path} does not match its config: {listed}")
    if info.get("unexpected_keys"):
        # As in transformers: heads for multi-token prediction and the like stay on disk.
        unexpected = sorted(info["unexpected_keys"])
        rest = f" and {len(unexpected) - 20} more" if len(unexpected) > 20 else ""
        log.warning("%s: not part of the model class, not loaded: %s%s", checkpoint.path, unexpected[:20], rest)
    loaded.to(target)  # type: ignore[arg-type]
    loaded.eval()  # type: ignore[no-untyped-call]
    return loaded


def checkpoint_meta_model(checkpoint: Checkpoint, *, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model of a checkpoint, plain or mapped, without its weights.

    Parameters and saved buffers are on the meta device; what a checkpoint does not hold (rotary frequencies and the
    like) is there, on the CPU, as a stock loader would make it.

    Raises:
        NotACheckpoint, CorruptCheckpoint: no model can be built from the config.
    """
    manifest = Manifest.read(checkpoint.path)
    if manifest is not None and manifest.form is ResultForm.MAPPED:
        architecture = Architecture.of(checkpoint)
        maps = maps_of(manifest, architecture.layers)
        return result_meta_model(architecture, manifest.layers[0].num_experts_after, maps=maps, dtype=dtype)
    check_chosen(checkpoint.config, str(checkpoint.path))
    model = meta_model(model_config(checkpoint), where=str(checkpoint.path), dtype=dtype)
    make_buffers(model)
    return model


def result_meta_model(
    architecture: Architecture,
    num_experts: int,
    *,
    maps: Sequence[Tensor] | None,
    dtype: torch.dtype,
    width: int | None = None,
    top_k: int | None = None,
) -> PreTrainedModel:
    """Build what a compression of a model makes, without its weights; see `checkpoint_meta_model`.

    Args:
        architecture: the original model's.
        num_experts: experts in each layer of the result.
        maps: for a mapped result, the expert that stands for each router row of each layer; else None.
        dtype: number format of the parameters.
        width: expert width of the result; None for the original's.
        top_k: experts that a token chooses in the result; None for the original's.
    """
    model = meta_model(resized_config(architecture, num_experts, width, top_k), dtype=dtype)
    if maps is not None:
        widen_routers(model, meta_model(architecture.config, dtype=dtype), architecture.layers)
        attach_maps(model, architecture.layers, maps)
    make_buffers(model)
    return model


def _load_mapped(checkpoint: Checkpoint, manifest: Manifest, dtype: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a mapped checkpoint through the stock class, its routers widened before the weights come in."""
    architecture = Architecture.of(checkpoint)
    maps = maps_of(manifest, architecture.layers)
    small = meta_model(resized_config(architecture, manifest.layers[0].num_experts_after))
    base = type(small)
    wide, layers = architecture.model, architecture.layers

    class Mapped(base):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            widen_routers(self, base._from_config(wide.config), layers)  # type: ignore[no-untyped-call]

    # The conversion of names is looked up by class name and by the module that the class lives in.
    Mapped.__name__, Mapped.__module__ = base.__name__, base.__module__
    model, info = _load_plain(checkpoint, Mapped, small.config, dtype)
    attach_maps(model, layers, maps)
    return model, info


def _load_plain(
    checkpoint: Checkpoint, stock: Any, config: PreTrainedConfig, dtype: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint through a stock class, which is handed tensors to read when it wants them instead of files.

    It would map whole files, whose pages count as memory of this process, and convert tensors ahead of their use.
    """
    with checkpoint.reader() as reader, _one_after_the_other():
        tensors = {name: _LazyTensor(reader, name) for name in checkpoint.tensors}
        model, info = stock.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    model.name_or_path = model.config.name_or_path = str(checkpoint.path)
    if (checkpoint.path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    return model, info


@dataclass(frozen=True, slots=True)
class _LazyTensor:
    """A tensor of a checkpoint that is read when it is indexed, as slices of safetensors are."""

    reader: TensorReader
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.reader.read(self.name)[index]


@contextmanager
def _one_after_the_other() -> Iterator[None]:
    """Let transformers read tensors when it needs them, not in threads that run ahead of it."""
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before
