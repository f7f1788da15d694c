"""Load a whole model into memory: stock transformers for plain checkpoints, and the loaders of mapped and ragged ones.

A mapped checkpoint (``--router map``) keeps the router's E rows and points them at M experts. Its config counts E
experts while its files hold M, so stock loaders refuse it instead of computing something else. A ragged checkpoint has
experts of different widths (`coterie.model.filled`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import GENERATION_CONFIG_NAME

from coterie.artifact import read_artifact
from coterie.errors import CorruptCheckpoint, InputError
from coterie.model.checkpoint import Checkpoint, read_config, resolve
from coterie.model.filled import filled_up
from coterie.model.layers import Architecture, MoELayer, empty_model, quiet
from coterie.model.quantized import dequantized
from coterie.model.units import format_bytes

log = logging.getLogger(__name__)

MANIFEST = "coterie.json"
_MAPPED = "coterie_mapped"


def load_model(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a checkpoint, plain, mapped or ragged, with nothing missing; what its class has no place for is logged.

    Args:
        model: a model folder or a hub id.
        dtype: number format in memory; float32 on the CPU and the checkpoint's own elsewhere when None.
        device: where the model goes.

    Raises:
        CorruptCheckpoint: tensors are missing or of the wrong shape.
        NotACheckpoint: no such model.
    """
    stored = Checkpoint.open(model)
    target = torch.device(device)
    chosen: Any = dtype or (torch.float32 if target.type == "cpu" else "auto")
    manifest = read_manifest(stored.path)
    checkpoint = filled_up(stored, _ragged(manifest))
    mapped = manifest is not None and manifest["router"] == "map"
    empty = empty_model(checkpoint.config, where=str(checkpoint.path))
    loaded: PreTrainedModel
    info: dict[str, Any]
    with quiet():
        try:
            if mapped:
                assert manifest is not None
                loaded, info = _load_mapped(checkpoint, manifest, chosen)
            elif checkpoint is not stored:
                loaded, info = _load_filled_up(checkpoint, empty, chosen)
            else:
                loaded, info = type(empty).from_pretrained(  # type: ignore[misc]
                    checkpoint.path, dtype=chosen, output_loading_info=True, local_files_only=True
                )
        except (RuntimeError, OSError) as error:
            raise CorruptCheckpoint(f"{checkpoint.path} does not load: {error}") from error
    wrong = {key: info[key] for key in ("missing_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        listed = "; ".join(f"{key.replace('_', ' ')}: {sorted(map(str, names))[:3]}" for key, names in wrong.items())
        raise CorruptCheckpoint(f"{checkpoint.path} does not match its config: {listed}")
    if info.get("unexpected_keys"):
        # As in transformers: heads for multi-token prediction and the like stay on disk.
        log.warning("%s: not part of the model class, not loaded: %s", checkpoint.path, sorted(info["unexpected_keys"]))
    loaded.to(target)  # type: ignore[arg-type]
    loaded.eval()  # type: ignore[no-untyped-call]
    return loaded


def hollow_model(checkpoint: Checkpoint, *, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model of a checkpoint, plain or mapped, without its weights.

    Parameters and saved buffers are on the meta device; what a checkpoint does not hold (rotary frequencies and the
    like) is there, on the CPU, as a stock loader would make it.

    Raises:
        NotACheckpoint, CorruptCheckpoint: no model can be built from the config.
    """
    manifest = read_manifest(checkpoint.path)
    if manifest is not None and manifest["router"] == "map":
        count = manifest["layers"][0]["num_experts_after"]
        return hollow_result(Architecture.of(checkpoint), count, maps=_maps_of(manifest), dtype=dtype)
    model = empty_model(checkpoint.config, where=str(checkpoint.path), dtype=dtype)
    _make_buffers(model)
    return model


def hollow_result(
    architecture: Architecture,
    num_experts: int,
    *,
    maps: Sequence[Tensor] | None,
    dtype: torch.dtype,
    width: int | None = None,
    top_k: int | None = None,
) -> PreTrainedModel:
    """Build what a compression of a model makes, without its weights; see `hollow_model`.

    Args:
        architecture: the original model's.
        num_experts: experts in each layer of the result.
        maps: for a mapped result, the expert that stands for each router row of each layer; else None.
        dtype: number format of the parameters.
        width: expert width of the result; None for the original's.
        top_k: experts that a token chooses in the result; None for the original's.
    """
    model = empty_model(architecture.resized_config(num_experts, width, top_k), dtype=dtype)
    if maps is not None:
        widen_routers(model, empty_model(architecture.config, dtype=dtype), architecture.layers)
        attach_maps(model, architecture.layers, maps)
    _make_buffers(model)
    return model


def _make_buffers(model: PreTrainedModel) -> None:
    """Compute, on the CPU, the buffers that checkpoints do not hold, by the model's own initialisation."""
    owners: dict[str, nn.Module] = {}
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            owners[owner] = model.get_submodule(owner)
            owners[owner]._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    families = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    with torch.no_grad():
        for name, module in owners.items():
            inner = max((key for key in families if not key or f"{name}.".startswith(f"{key}.")), key=len)
            families[inner]._init_weights(module)  # type: ignore[no-untyped-call]


def open_checkpoint(model: str | Path, *, output_dtype: str = "bfloat16", allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint as one of plain numbers: what is stored in 8 or 4 bits is dequantised as it is read.

    Experts of a ragged checkpoint are filled up with zeros to the same width.

    Args:
        model: a model folder or a hub id.
        output_dtype: number format that quantised tensors are given; others keep theirs.
        allow_pickle: read weights that are stored as pickles.

    Raises:
        NotACheckpoint, CorruptCheckpoint: no such model, or a damaged one.
        UnsupportedDtype: quantised in a way that cannot be undone here, or an unknown `output_dtype`.
    """
    stored = Checkpoint.open(model, allow_pickle=allow_pickle)
    plain = dequantized(stored, output_dtype)
    if plain is not stored:
        sizes = f"{format_bytes(stored.num_bytes)} there, {format_bytes(plain.num_bytes)} as {output_dtype}"
        log.info("%s is stored quantised and read as plain numbers: %s", stored.path, sizes)
    return filled_up(plain, _ragged(read_manifest(plain.path)))


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        InputError: the folder has none.
    """
    path = resolve(model)
    read_config(path)
    with quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise InputError(
                f"{path} has no tokenizer that loads ({first_line}); put its files beside the weights"
            ) from error
    # Where a family has a tokenizer class of its own, transformers makes an empty one out of nothing.
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise InputError(
            f"{path} has no tokenizer: what loads knows {len(tokenizer)} special tokens and no text; "
            "put tokenizer.json or the vocabulary files beside the weights"
        )
    return tokenizer


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the body of the manifest of a checkpoint that Coterie wrote, or None for any other checkpoint."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    return read_artifact(path, kind="manifest")[0]


def _ragged(manifest: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if manifest is None else manifest.get("ragged")


def attach_maps(model: PreTrainedModel, layers: Sequence[MoELayer], maps: Sequence[Tensor]) -> None:
    """Make every experts module of `model` translate the router's choice through its map before it computes.

    Args:
        model: a model whose routers have E rows and whose experts modules hold M experts.
        layers: its MoE layers.
        maps: for each layer, the expert (below M) that stands for each of E router rows, int64.
    """
    inner = {layer.index: model.get_submodule(layer.experts).config._experts_implementation for layer in layers}  # type: ignore[union-attr]
    for layer, expert_map_E in zip(layers, maps, strict=True):
        experts = model.get_submodule(layer.experts)
        parameter = next(experts.parameters())
        device = "cpu" if parameter.is_meta else parameter.device
        experts.register_buffer("coterie_expert_map", expert_map_E.to(device), persistent=False)
        experts.coterie_inner = inner[layer.index]
        # Every experts module looks into its own config; several may share one.
        experts.config._experts_implementation = _MAPPED  # type: ignore[union-attr]


def _mapped_experts(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Translate original expert numbers through the module's map, then run the implementation that was set before."""
    own: Any = type(module).forward
    function = ALL_EXPERTS_FUNCTIONS.get_interface(str(module.coterie_inner), own.__wrapped__)
    return function(module, hidden_TD, module.coterie_expert_map[index_TK], weight_TK)  # type: ignore[index,no-any-return]


ALL_EXPERTS_FUNCTIONS.register(_MAPPED, _mapped_experts)


def widen_routers(model: PreTrainedModel, wide: PreTrainedModel, layers: Sequence[MoELayer]) -> None:
    """Give `model` (M experts) the routers of `wide` (E experts), module and tensors."""
    for layer in layers:
        if layer.router is not None:
            model.set_submodule(layer.router, wide.get_submodule(layer.router))
        for name, _ in layer.router_tensors:
            owner, _, leaf = name.rpartition(".")
            if layer.router is None or not name.startswith(layer.router + "."):
                source = wide.get_submodule(owner)
                store = "_parameters" if leaf in source._parameters else "_buffers"
                getattr(model.get_submodule(owner), store)[leaf] = getattr(source, store)[leaf]


def _load_mapped(
    checkpoint: Checkpoint, manifest: Mapping[str, Any], dtype: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a mapped checkpoint through the stock class, its routers widened before the weights come in."""
    architecture = Architecture.of(checkpoint)
    counts = {entry["num_experts_after"] for entry in manifest["layers"]}
    small = empty_model(architecture.resized_config(counts.pop()))
    base = type(small)
    wide, layers = architecture.model, architecture.layers

    class Mapped(base):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            widen_routers(self, base._from_config(wide.config), layers)  # type: ignore[no-untyped-call]

    # The conversion of names is looked up by class name and by the module that the class lives in.
    Mapped.__name__, Mapped.__module__ = base.__name__, base.__module__
    model, info = Mapped.from_pretrained(
        checkpoint.path, config=small.config, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    attach_maps(model, layers, _maps_of(manifest))
    return model, info


def _load_filled_up(
    checkpoint: Checkpoint, empty: PreTrainedModel, dtype: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a view of a checkpoint through the stock class, which is handed the tensors instead of reading files."""
    with checkpoint.reader() as reader:
        tensors = {name: reader.read(name) for name in checkpoint.tensors}
    stock: Any = type(empty)
    model, info = stock.from_pretrained(
        None, config=empty.config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    if (checkpoint.path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    return model, info


def _maps_of(manifest: Mapping[str, Any]) -> list[Tensor]:
    return [torch.tensor(entry["expert_map"], dtype=torch.int64) for entry in manifest["layers"]]
