"""Load this checkpoint with transformers: ``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)``.

Coterie (https://github.com/coterie-moe/coterie, Apache-2.0) compressed the model and put this file beside its weights.
What comes out is a model of transformers' own class for the family, so all that is done with one can be done with it;
this file only reads what that class cannot:

- packed: matrices in blocks of GGML types (``quantization_config`` in config.json says which), which are unpacked as
  they are read. The package gguf does that, but for Coterie's own types, whose blocks are rotated. They may be in
  planes of bits as well, and experts stored as a base that all of a layer share, and factors of what is to be added to
  it for each.
- ragged: experts of differing widths (coterie.json says along which axes), which are filled up with zeros: a hidden
  neuron whose weights are zero adds nothing.
- mapped: a router with a row for each expert of the original, and a map from those to the experts that there are
  (coterie.json).

``save_pretrained`` then writes an ordinary checkpoint of the family, which needs no code: matrices in the number format
in memory, experts at their full width and, of a mapped one, an expert for each row of the router.

Legend: R rows, K bytes in a row, G blocks, B numbers in a block, T tokens, D model width.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

_METHOD = "coterie"
_PLAIN, _SHARED, _PLANES = "plain", "shared-base", "bit-planes"
_MAP = "coterie_expert_map"

#: Options that say which files of a repository are meant, and where they are kept.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

#: Bytes of blocks that are unpacked at once; their numbers, of two bits and more, pass through float32.
_BYTES_AT_ONCE = 2**22

#: Coterie's own types: the positive levels that codes of 2, 3 and 4 bits stand for, in units of a block's scale.
_LEVELS = {
    "TURBO2": (0.4527800, 1.5104176),
    "TURBO3": (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    "TURBO4": (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}

#: A bit for each of 256 numbers, the first the highest: 1 where the rotation of a block turns its sign.
_SIGNS = 0x243F6A8885A308D313198A2E03707344A4093822299F31D0082EFA98EC4E6C89

#: The switch by which transformers reads tensors when it wants them, not in threads that run ahead of it.
_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"


class CoterieModel:
    """What ``auto_map`` in config.json names. There are no objects of it: a model of the stock class is returned."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Do nothing: what ``save_pretrained`` writes needs no code."""

    @classmethod
    def from_pretrained(cls, name: str | Path, *arguments: Any, config: Any = None, **options: Any) -> Any:
        """Load the checkpoint as ``from_pretrained`` of its stock class does.

        Args:
            name: its folder or its id on the hub.
            *arguments: passed on to that class.
            config: the config as transformers has it; that of the folder when None.
            **options: as there, for example ``dtype`` or ``device_map``.

        Raises:
            ImportError: weights are in blocks, and the package gguf is not installed; or transformers is too old.
            ValueError: files are missing, or contradict each other; or an option that asks for what cannot be.
        """
        _check_possible(name, options)
        folder = _folder(name, options)
        packed, manifest = _packed(folder), _manifest(folder)
        if any(kind not in _LEVELS for group in packed.values() for kind in _types(group)):
            _gguf()
        plain = _plain(AutoConfig.from_pretrained(folder, trust_remote_code=False) if config is None else config)
        stock = _stock_class(plain)
        layers = manifest["layers"] if manifest["form"] == "mapped" else []
        tensors = _tensors(folder, packed, manifest["ragged"])
        if options.get("dtype", options.get("torch_dtype")) in (None, "auto") and plain.dtype is None:
            values = (stored[...] for stored in tensors.values())
            options["dtype"] = next(each.dtype for each in values if each.is_floating_point())
        if options.get("generation_config") is None and (folder / "generation_config.json").is_file():
            options["generation_config"] = GenerationConfig.from_pretrained(folder)
        wants_info = options.pop("output_loading_info", False)
        options.pop("trust_remote_code", None)
        with _one_after_the_other():
            model, info = (_mapped_class(stock, layers) if layers else stock).from_pretrained(
                None,
                *arguments,
                config=plain,
                state_dict=tensors,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
        if info["missing_keys"]:  # which transformers makes up
            raise ValueError(f"{name} has no tensors for {sorted(info['missing_keys'])[:3]}; fetch its files again")
        for layer in layers:
            _attach_map(model, layer)
        model.name_or_path = model.config.name_or_path = str(name)
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        """Make a model of the stock class with random weights, as ``AutoModelForCausalLM.from_config`` does."""
        plain = _plain(config)
        return _stock_class(plain)._from_config(plain, **options)


def _check_possible(name: str | Path, options: dict[str, Any]) -> None:
    """Refuse early what would fail late, and without a word on why."""
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(
            f"{name} takes transformers 5 or newer, and {transformers.__version__} is installed: upgrade it"
        )
    adapter = (options.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")
    if adapter is not None:
        raise ValueError(f"{adapter} is an adapter: load {name} first, and then the adapter with its load_adapter()")
    places = options.get("device_map")
    if isinstance(places, Mapping) and "disk" in places.values():
        raise ValueError(
            f"device_map puts parts of {name} on the disk, where tensors are not as they are needed: load it without "
            "that, save_pretrained() it, and load what was saved"
        )


def _folder(name: str | Path, options: dict[str, Any]) -> Path:
    """Return the folder of a checkpoint, fetched from the hub where it is not here; takes its options out."""
    where = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
    options.pop("proxies", None)
    part = options.pop("subfolder", None) or ""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"], **where))
    return folder / part


def _plain(config: Any) -> Any:
    """Return a config without what it says of this file and of blocks: as the stock class writes it."""
    plain = copy.deepcopy(config)
    for entry in ("auto_map", "quantization_config"):
        plain.__dict__.pop(entry, None)
    return plain


def _stock_class(config: Any) -> Any:
    """Return the class of transformers that a config names, or that belongs to its family."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    mappings: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    classes = [named, *(mapping[type(config)] for mapping in mappings if type(config) in mapping)]
    stock = next((each for each in classes if each is not None and each.__module__.startswith("transformers.")), None)
    if stock is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no language model of the type {config.model_type!r}; a newer "
            "one may"
        )
    return stock


def _packed(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return how tensors are packed: name, or pattern with a star for one number in it -> type, axis, dtype.

    Of experts that share a base: base and factors in place of the type, each with its own, and their rank.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if settings.get("quant_method", _METHOD) != _METHOD:
        raise ValueError(
            f"{folder}: config.json says {settings['quant_method']!r} of its weights, which is not Coterie's"
        )
    return {pattern: group for group in settings.get("groups", ()) for pattern in group["tensors"]}


def _types(group: Mapping[str, Any]) -> list[str]:
    """Return the types of blocks that weights of a group are stored in; planes of bits have none."""
    inner = (group["base"], group["factors"]) if group["encoding"] == _SHARED else (group,)
    return [each["type"] for each in inner if each["encoding"] not in (_PLAIN, _PLANES)]


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / "coterie.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no coterie.json, which says how its experts are stored; fetch it again")
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["body"]
    return manifest


def _tensors(folder: Path, packed: Mapping[str, Mapping[str, Any]], ragged: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return all tensors by name, each to be read when it is wanted."""
    opened: Any = lru_cache(maxsize=1)(partial(safe_open, framework="pt"))  # one file at a time
    index, single = folder / "model.safetensors.index.json", "model.safetensors"
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        files = dict.fromkeys(opened(folder / single).keys(), single)
    groups, bases = dict(packed), {}
    for pattern, group in packed.items():
        if group["encoding"] == _SHARED:
            bases[pattern] = ".".join("0" if part == "*" else part for part in pattern.split(".")) + "_base"
            groups |= {bases[pattern]: group["base"]} | dict.fromkeys(
                (f"{pattern}_left", f"{pattern}_right"), group["factors"]
            )
    tensors: dict[str, Any] = {}
    for name, file in files.items():
        axis = None if ragged is None else _of_pattern(name, ragged["axes"])
        tensors[name] = _StoredTensor(
            partial(opened, folder / file),
            name,
            group=_of_pattern(name, groups),
            full=None if ragged is None or axis is None else (axis, ragged["width"]),
        )
    parts: set[str] = set()
    for left in [name for name in tensors if name.endswith("_left")]:
        name = left.removesuffix("_left")
        if (base := _of_pattern(name, bases)) is not None:
            stored = (base, left, f"{name}_right")
            if missing := [each for each in stored if each not in tensors]:
                raise ValueError(f"{folder} has no {missing[0]}, which is a part of {name}; fetch its files again")
            tensors[name] = _SharedTensor(*(tensors[each] for each in stored), axis=_of_pattern(name, packed)["axis"])
            parts.update(stored)
    return {name: tensor for name, tensor in tensors.items() if name not in parts}


def _of_pattern(name: str, patterns: Mapping[str, Any]) -> Any:
    """Return what a table says of a tensor, by its name or by a pattern with a star in place of one number."""
    parts = name.split(".")
    stars = (".".join((*parts[:n], "*", *parts[n + 1 :])) for n in reversed(range(len(parts))) if parts[n].isdigit())
    return next((patterns[each] for each in (name, *stars) if each in patterns), None)


class _StoredTensor:
    """A tensor that is read when it is indexed, as slices of safetensors are."""

    def __init__(
        self,
        file: Callable[[], Any],
        name: str,
        *,
        group: Mapping[str, Any] | None,
        full: tuple[int, int] | None,
    ) -> None:
        self.file, self.name, self.group, self.full = file, name, group, full

    def __getitem__(self, index: Any) -> Tensor:
        tensor: Tensor = self.file().get_tensor(self.name)
        if self.group is not None:
            tensor = _unpacked(tensor, self.group)
        if self.full is not None:
            tensor = _filled_up(tensor, *self.full)
        return tensor[index]


class _SharedTensor:
    """Matrices of experts (R, C), or (E, R, C): a base that all of a layer share, and factors of what is added to it.

    The columns of the left factor and the rows of the right one are stored as rows, one for each rank.
    """

    def __init__(self, base: _StoredTensor, left: _StoredTensor, right: _StoredTensor, *, axis: int) -> None:
        self.base, self.left, self.right, self.axis = base, left, right, axis

    def __getitem__(self, index: Any) -> Tensor:
        base, left, right = (each[...].float() for each in (self.base, self.left, self.right))
        if left.ndim == 2:
            tensor = base + left.T @ right
        else:
            tensor = torch.stack([base + each.T @ other for each, other in zip(left, right, strict=True)])
        return tensor.transpose(self.axis, -1).contiguous()[index]


def _gguf() -> tuple[Any, Any]:
    """Return the types of blocks, and the function that unpacks them."""
    try:  # at the top of this file transformers would ask for it also where nothing is packed
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ImportError(
            "the weights of this checkpoint are in blocks of GGML types, which the package gguf unpacks: pip install "
            "gguf"
        ) from error
    return GGMLQuantizationType, dequantize


def _unpacked(blocks: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the numbers of a tensor of bytes, in whose rows along one axis lie blocks.

    Where the group says how many columns there are, several rows of numbers are one of bytes.
    """
    if group["encoding"] == _PLAIN:
        return blocks
    if group["encoding"] == _PLANES:
        return _from_planes(blocks, group)
    kind, dtype = group["type"], _DTYPES[group["dtype"]]
    unpack = _rotated_back if kind in _LEVELS else _dequantized
    byte_RK = blocks.transpose(group["axis"], -1).contiguous()
    if not blocks.numel():  # of an expert without neurons
        row = byte_RK.new_zeros(1, byte_RK.shape[-1])
        columns = (group.get("columns") or unpack(row, kind).shape[-1]) if row.numel() else 0
        return torch.empty((*byte_RK.shape[:-1], columns), dtype=dtype).transpose(group["axis"], -1)
    rows = byte_RK.reshape(-1, byte_RK.shape[-1])
    count = max(_BYTES_AT_ONCE // rows.shape[-1], 1)
    values = [unpack(rows[start : start + count], kind).to(dtype) for start in range(0, len(rows), count)]
    numbers = torch.cat(values).reshape(*byte_RK.shape[:-1], -1)
    if "columns" in group:
        numbers = numbers.reshape(*numbers.shape[:-2], -1, group["columns"])
    return numbers.transpose(group["axis"], -1).contiguous()


def _dequantized(byte_RK: Tensor, kind: str) -> Tensor:
    """Return the numbers of rows of blocks of a GGML type, float32."""
    types, dequantize = _gguf()
    return torch.from_numpy(dequantize(byte_RK.numpy(), types[kind]))


def _rotated_back(byte_RK: Tensor, kind: str) -> Tensor:
    """Return the numbers of rows of blocks of one of Coterie's own types, float32.

    A block is a scale in float16 and codes of 256 numbers, of three bits the lower two first. What codes stand for was
    rotated: signs were turned, and a Hadamard matrix applied, which undoes itself.
    """
    upper = torch.tensor(_LEVELS[kind])
    levels, bits = torch.cat((-upper.flip(0), upper)), len(upper).bit_length()
    byte_GK = byte_RK.reshape(-1, 2 + 32 * bits)
    scale_G1 = byte_GK[:, :2].contiguous().view(torch.float16).float()
    if bits == 3:
        code_GB = _codes(byte_GK[:, 2:66], 2) | _codes(byte_GK[:, 66:], 1) << 2
    else:
        code_GB = _codes(byte_GK[:, 2:], bits)
    value_GB: Tensor = levels[code_GB.long()] * scale_G1
    for _ in range(8):
        even, odd = value_GB[:, 0::2], value_GB[:, 1::2]
        value_GB = torch.cat((even + odd, even - odd), dim=-1)
    turned = torch.tensor([_SIGNS >> place & 1 for place in reversed(range(256))], dtype=torch.float32)
    return (value_GB / 16 * (1 - 2 * turned)).reshape(len(byte_RK), -1)


def _from_planes(bytes_: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the numbers of a tensor in planes of bits, each of which is of the whole tensor.

    A plane is a scale in float16 for each group of numbers along the axis, and then the bits of all groups. The first
    one has two bits a number, -1.5 to 1.5 times the scale; those behind it one, which is 1 for less and 0 for more.
    """
    size, bits, axis = group["group"], group["bits"], group["axis"]
    of_group = size * bits // 8 + 2 * (bits - 1)
    count = bytes_.numel() // of_group
    byte_K, at = bytes_.flatten(), 0
    value_GB = torch.zeros(count, size)
    for plane in range(bits - 1):
        width = 2 if plane == 0 else 1
        run = size * width // 8
        scale_G1 = byte_K[at : at + 2 * count].view(torch.float16).float()[:, None]
        bit_Gk = byte_K[at + 2 * count : at + (2 + run) * count].reshape(count, run)
        at += (2 + run) * count
        rows = max(_BYTES_AT_ONCE // run, 1)
        for start in range(0, count, rows):
            some = slice(start, start + rows)
            code_GB = _codes(bit_Gk[some], width, run).float()
            value_GB[some] += (code_GB - 1.5 if plane == 0 else 1 - 2 * code_GB) * scale_G1[some]
    shape = list(bytes_.shape)
    shape[axis] = shape[axis] // of_group * size
    shape[axis], shape[-1] = shape[-1], shape[axis]
    return value_GB.reshape(shape).to(_DTYPES[group["dtype"]]).transpose(axis, -1).contiguous()


def _codes(byte_GK: Tensor, bits: int, run: int = 32) -> Tensor:
    """Return codes in bytes: those of a run of bytes in their lowest bits are followed by those in the bits above."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    code_GB: Tensor = (byte_GK.reshape(len(byte_GK), -1, 1, run) >> shifts & 2**bits - 1).flatten(1)
    return code_GB


def _filled_up(tensor: Tensor, axis: int, width: int) -> Tensor:
    """Return an expert's tensor in the full width."""
    filled = tensor.new_zeros((*tensor.shape[:axis], width, *tensor.shape[axis + 1 :]))
    filled.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return filled


def _experts(model: nn.Module, layer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the experts of a layer that transformers calls through its interface, by name in the model."""
    for name, module in model.get_submodule(layer["block"]).named_modules(prefix=layer["block"]):
        if hasattr(module, "is_transposed") and hasattr(module, "num_experts"):
            yield name, module


def _mapped_class(stock: Any, layers: list[Mapping[str, Any]]) -> Any:
    """Return the stock class with as many experts as there are, beside routers of as many as there were."""

    def make(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        stock.__init__(self, config, *arguments, **options)
        for layer in layers:
            for _, module in _experts(self, layer):
                for name, parameter in module.named_parameters(recurse=False):
                    fewer = parameter.detach()[: layer["num_experts_after"]].clone()
                    module.register_parameter(name, nn.Parameter(fewer))
                module.num_experts = layer["num_experts_after"]

    def save_pretrained(self: Any, save_directory: Any, **options: Any) -> None:
        if options.get("state_dict") is None:
            tensors = self.state_dict()
            for layer in layers:
                for path, module in _experts(self, layer):
                    for name, parameter in module.named_parameters(recurse=False):
                        tensors[f"{path}.{name}"] = parameter.detach()[getattr(module, _MAP)]
            options["state_dict"] = tensors
        stock.save_pretrained(self, save_directory, **options)

    # Names of weights are converted by the name of the class and the module that it lives in.
    contents = {"__init__": make, "save_pretrained": save_pretrained, "__module__": stock.__module__}
    return type(stock.__name__, (stock,), contents)


def _attach_map(model: nn.Module, layer: Mapping[str, Any]) -> None:
    for _, module in _experts(model, layer):
        device = next(module.parameters()).device
        expert_map = torch.tensor(layer["expert_map"], device="cpu" if device.type == "meta" else device)
        module.register_buffer(_MAP, expert_map, persistent=False)
        module.register_forward_pre_hook(_translate)


def _translate(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put the expert that stands for a router's row in its place, in (hidden_TD, index, weight)."""
    hidden_TD, index, *rest = inputs
    return (hidden_TD, getattr(module, _MAP).to(index.device)[index], *rest)


@contextmanager
def _one_after_the_other() -> Iterator[None]:
    """Let transformers read tensors when it needs them: of the model and of what it is made from no two copies."""
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before
