"""What llama.cpp's `llama-quantize` makes of a model: its types for each tensor, its own code for the numbers.

Which tensor gets which type is a set of rules, stated here as facts read in llama.cpp (src/llama-quant.cpp at commit
007dbbf: `llama_tensor_get_type_impl`, `tensor_type_fallback`, `tensor_allows_quantization`) for models with experts and
an importance matrix; the order of tensors, which some rules count in, is that of `weight_name_comparer`
(src/llama-model-loader.h). The importance matrix is what tools/imatrix collects: the mean square of each input, of each
expert over the tokens that chose it, of all tensors in blocks and not of the head, which it takes only when asked to.
Numbers are rounded by the library that is in the wheel `xllamacpp`, called through ctypes.

Legend: R rows (outputs), C columns (inputs), T tokens, D model width, K bytes of a row.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from coterie.compress.moments import watching
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint

#: The type that most tensors get in each format, as `llama_ftype_get_default_type` has it.
FORMATS = {
    "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "IQ4_XS": "IQ4_XS", "Q3_K_M": "Q3_K",
    "IQ3_M": "IQ3_S", "IQ3_XXS": "IQ3_XXS", "Q2_K": "Q2_K", "IQ2_M": "IQ2_S", "IQ2_XS": "IQ2_XS",
}  # fmt: skip

#: What stands in for types in blocks of 256 where a row is no multiple of that.
STANDS_IN = {
    "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip

#: Formats of two bits, which have rules of their own.
_TWO_BITS = ("IQ2_XS", "IQ2_M")

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)\.weight$")
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file; the matrices of a layer's experts are one.

    Attributes:
        name: as GGUF has it.
        names: the names on disk of what it is made of.
        shape: of each of those.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def layer(self) -> int:
        """Index of its layer, -1 of what is in none."""
        found = _BLOCK.match(self.name)
        return -1 if found is None else int(found[1])

    @property
    def rounded(self) -> bool:
        """Whether it is stored in fewer bits at all; norms, biases and routers are not."""
        return len(self.shape) > 1 and self.name.endswith(".weight") and "ffn_gate_inp" not in self.name

    def num_bytes(self, kind: str) -> int:
        """Return the bytes that it takes in a type."""
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        return len(self.names) * math.prod(self.shape) // block * size


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What the rules ask about a model.

    Attributes:
        num_layers: its layers, also those without experts.
        num_experts: experts of a layer.
        heads_per_kv_head: attention heads that share keys and values.
    """

    num_layers: int
    num_experts: int
    heads_per_kv_head: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Return that of a model with this config.json.

        Raises:
            ValueError: no experts.
        """
        experts = [config[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in config]
        if not experts:
            raise ValueError(
                f"{config['model_type']} has no experts; the rules that are stated here are for such models"
            )
        heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0),
            num_experts=experts[0],
            heads_per_kv_head=heads // (config.get("num_key_value_heads") or heads),
        )


def gguf_tensors(checkpoint: Checkpoint) -> list[GgufTensor]:
    """Return the tensors of a model's GGUF file, in the order in which llama.cpp goes through them.

    A tied head is not among them: its embedding stands for it. (llama.cpp reads no OLMoE whose head is tied; the file
    is reckoned as if it did, which makes it smaller.)

    Raises:
        ValueError: a model or a tensor that gguf has no name for.
    """
    config = checkpoint.config
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    wanted = str(config["model_type"]).replace("_", "")
    if wanted not in known:
        raise ValueError(f"gguf knows no model type {wanted}; it knows {', '.join(sorted(known))}")
    names = gguf.get_tensor_name_map(known[wanted], Shape.of(config).num_layers)
    members: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        if config.get("tie_word_embeddings") and name == "lm_head.weight":
            continue
        expert = _EXPERT.match(name)
        merged = name if expert is None else f"{expert['experts']}.{expert['projection']}.weight"
        merged = merged.replace(".e_score_correction_bias", ".e_score_correction.bias")
        found = names.get_name(merged, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"gguf has no name for {name} of a {wanted}")
        members.setdefault(found, []).append(name)
    tensors = [
        GgufTensor(name=name, names=tuple(sorted(listed, key=_number)), shape=checkpoint.tensors[listed[0]].shape)
        for name, listed in members.items()
    ]
    return sorted(tensors, key=lambda tensor: (tensor.layer, tensor.name))


def _number(name: str) -> int:
    expert = _EXPERT.match(name)
    return -1 if expert is None else int(expert["number"])


def types_of(tensors: Sequence[GgufTensor], shape: Shape, file_format: str) -> dict[str, str]:
    """Return the type of each tensor by its name.

    Args:
        tensors: all of the file, in their order.
        shape: of the model.
        file_format: one of `FORMATS`.
    """
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    attention_v, down = 0, 0
    types = {}
    for tensor in tensors:
        if not tensor.rounded:
            types[tensor.name] = "F32"
            continue
        part = tensor.name.removesuffix(".weight").removeprefix(f"blk.{tensor.layer}.")
        if part == "output" or (part == "token_embd" and tied):
            kind = _of_head(tensor, file_format)
        elif part == "token_embd":
            kind = {"IQ2_XS": "Q2_K", "IQ2_M": "IQ3_S", "IQ3_XXS": "IQ3_S"}.get(file_format, FORMATS[file_format])
        elif part in ("attn_v", "attn_qkv", "attn_kv_b"):
            kind = _of_values(shape, file_format, attention_v, _count_values(tensors))
            attention_v += 1
        elif part.startswith("ffn_down"):
            kind = _of_down(shape, file_format, tensor.layer, down)
            down += 1
        else:
            kind = _of_rest(part, shape, file_format)
        types[tensor.name] = fitting(kind, tensor.shape[-1])
    return types


def fitting(kind: str, columns: int) -> str:
    """Return a type, or what stands in for it where its blocks do not fill a row."""
    if columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0:
        return kind
    return STANDS_IN[kind] if kind in STANDS_IN and columns % 32 == 0 else "F16"


def more_bits(index: int, count: int) -> bool:
    """Tell whether a layer is one of the first or last eighth, or every third in between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _count_values(tensors: Sequence[GgufTensor]) -> int:
    return sum(tensor.name.endswith(("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")) for tensor in tensors)


def _of_head(tensor: GgufTensor, file_format: str) -> str:
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[FORMATS[file_format]]]
    if tensor.shape[-1] % block or file_format == "Q8_0":
        return "Q8_0"
    return "Q5_K" if file_format in (*_TWO_BITS, "IQ3_XXS") else "Q6_K"


def _of_values(shape: Shape, file_format: str, index: int, count: int) -> str:
    shared = shape.heads_per_kv_head >= 4
    if file_format in _TWO_BITS:
        if shared or shape.num_experts >= 4:
            return "Q4_K"
        return "IQ3_S" if file_format == "IQ2_M" else "Q2_K"
    if shape.num_experts == 8:
        return "Q8_0"
    if file_format in ("Q4_K_M", "Q5_K_M") and more_bits(index, count):
        return "Q6_K"
    rules = {
        "Q2_K": "Q4_K" if shared else "Q3_K", "IQ3_XXS": "Q4_K" if shared else "IQ3_XXS", "IQ3_M": "Q4_K",
        "Q3_K_M": "Q5_K" if index < 2 else "Q4_K", "IQ4_XS": "Q5_K" if shared else "IQ4_XS",
    }  # fmt: skip
    return rules.get(file_format, FORMATS[file_format])


def _of_down(shape: Shape, file_format: str, layer: int, index: int) -> str:
    """Two-bit formats count tensors where the others count layers."""
    first = shape.num_layers // 8
    if file_format in _TWO_BITS:
        early = "IQ3_S" if file_format == "IQ2_M" else "Q2_K"
        return early if index < first else FORMATS[file_format]
    if file_format in ("Q4_K_M", "Q5_K_M") and more_bits(layer, shape.num_layers):
        return "Q6_K"
    if file_format == "IQ3_M" and (layer < first or (shape.num_experts == 8 and more_bits(layer, shape.num_layers))):
        return "Q4_K"
    rules = {"Q2_K": "Q3_K", "Q3_K_M": "Q5_K" if layer < shape.num_layers // 16 else "Q4_K"}
    return rules.get(file_format, FORMATS[file_format])


def _of_rest(part: str, shape: Shape, file_format: str) -> str:
    """Queries, keys, what attention puts out, and gate and up of feed-forward parts."""
    eight = shape.num_experts == 8
    if part == "attn_output":
        rules = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "IQ3_M": "Q4_K", "IQ2_M": "IQ3_S"}
        if eight and file_format not in ("Q8_0", "Q6_K", "Q5_K_M"):
            return "Q5_K"
        return rules.get(file_format, FORMATS[file_format])
    if part == "attn_k" and eight:
        return "Q4_K" if file_format in _TWO_BITS else "Q8_0"
    if part in ("attn_k", "attn_q") and file_format == "IQ3_XXS":
        return "IQ2_S"
    return FORMATS[file_format]


def plain_bytes(tensors: Sequence[GgufTensor]) -> int:
    """Return the bytes of the tensors in a file whose matrices are BF16, and all else F32."""
    return sum(tensor.num_bytes("BF16" if tensor.rounded else "F32") for tensor in tensors)


@torch.no_grad()
def importance(model: Path, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the mean square of what comes into each matrix (C,), by its name on disk; ones where no token came.

    Args:
        model: a model folder.
        batches: token ids (B, S) each.
    """
    checkpoint = Checkpoint.open(model)
    layers = {layer.experts: layer for layer in Architecture.of(checkpoint).layers}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    linear = [
        name for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight") and not _EXPERT.match(name)
        and isinstance(_module(loaded, name.removesuffix(".weight")), torch.nn.Linear)
    ]  # fmt: skip
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(key: str, input_TC: Tensor) -> None:
        square_C = input_TC.double().square().sum(0)
        sums[key] = sums[key] + square_C if key in sums else square_C
        counts[key] = counts.get(key, 0) + len(input_TC)

    for ids_BS in batches:
        with watching(loaded, "", loaded, linear, tuple(layers.values())) as seen:
            loaded(ids_BS)
        for name, input_TC in seen.linear.items():
            add(name, input_TC)
        for module, layer in layers.items():
            experts, hidden_TD, index_TK, _ = seen.experts[layer.index]
            for expert in range(layer.num_experts):
                input_ND = hidden_TD[(index_TK == expert).any(-1)]
                if len(input_ND):
                    add(f"{module}.{expert}", input_ND)
                    add(f"{module}.{expert}.down", experts.hidden(expert, input_ND))
    found = {}
    for tensor in gguf_tensors(checkpoint):
        for name in tensor.names:
            expert = _EXPERT.match(name)
            key = name
            if expert is not None:
                down = ".down" if "ffn_down" in tensor.name else ""
                key = f"{expert['experts']}.{expert['number']}{down}"
                sums.setdefault(key, torch.ones(tensor.shape[-1], dtype=torch.float64))
            if key in sums and tensor.layer >= 0:
                found[name] = (sums[key] / max(1, counts.get(key, 1))).float()
    return found


def _module(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


class Library:
    """The functions of ggml that the wheel `xllamacpp` brings along."""

    def __init__(self) -> None:
        """Load it.

        Raises:
            ImportError: the wheel is not installed.
        """
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("llama.cpp's quantiser comes with a package: pip install xllamacpp")
        [file] = [file for place in spec.submodule_search_locations for file in Path(place).glob("xllamacpp*.so")]
        self._ggml = ctypes.CDLL(str(file))
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
        self._ggml.ggml_validate_row_data.restype = ctypes.c_bool

    def quantise(self, weight_RC: Tensor, kind: str, importance_C: Tensor | None = None) -> np.ndarray:
        """Return the bytes (R, K) of a matrix in a type, rounded as `llama-quantize` does it.

        Raises:
            ValueError: columns that are no whole blocks, or an importance for other columns.
            RuntimeError: bytes that are not what a type's can be.
        """
        weight = weight_RC.detach().to(torch.float32).contiguous()
        rows, columns = weight.shape
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        if columns % block:
            raise ValueError(f"{columns} columns are no whole blocks of {kind}, which have {block}")
        if importance_C is not None and importance_C.shape != (columns,):
            raise ValueError(f"an importance of shape {tuple(importance_C.shape)} for {columns} columns")
        weighing = None if importance_C is None else importance_C.to(torch.float32).contiguous()
        out = np.empty((rows, columns // block * size), dtype=np.uint8)
        written = self._ggml.ggml_quantize_chunk(
            int(number), weight.data_ptr(), out.ctypes.data, 0, rows, columns,
            None if weighing is None else weighing.data_ptr(),
        )  # fmt: skip
        if written != out.nbytes or not self._ggml.ggml_validate_row_data(int(number), out.ctypes.data, out.nbytes):
            raise RuntimeError(
                f"{kind}: {written} bytes were written where {out.nbytes} should be, or they are no numbers"
            )
        return out

    def dequantise(self, byte_RK: np.ndarray, kind: str) -> Tensor:
        """Return the values (R, C), float32, of the bytes of a matrix."""
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        value_RC = torch.empty(len(byte_RK), byte_RK.shape[1] // size * block)
        function = getattr(self._ggml, "dequantize_row_" + kind.lower().replace("_k", "_K"))
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        function(byte_RK.ctypes.data, value_RC.data_ptr(), value_RC.numel())
        return value_RC

    def round(self, weight_RC: Tensor, kind: str, importance_C: Tensor | None = None) -> Tensor:
        """Return a matrix as a file holds it: in plain numbers, or quantised and read again; float32."""
        if kind in ("F32", "F16", "BF16"):
            dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
            return weight_RC.to(dtypes[kind]).float()
        return self.dequantise(self.quantise(weight_RC, kind, importance_C), kind)


def check_library(library: Library) -> None:
    """Check that the right functions are called in the right way.

    What is written is read as gguf's own reader reads it, and inputs that weigh more get less error.

    Raises:
        RuntimeError: it is not so.
    """
    generator = torch.Generator().manual_seed(0)
    weight_RC = torch.randn(4, 512, generator=generator)
    importance_C = torch.randn(512, generator=generator).mul(1.5).exp()
    for kind in sorted({*FORMATS.values(), *STANDS_IN.values()}):
        errors = []
        for weighing in (importance_C, torch.ones(512)):
            byte_RK = library.quantise(weight_RC, kind, weighing)
            value_RC = library.dequantise(byte_RK, kind)
            other = gguf.quants.dequantize(byte_RK, gguf.GGMLQuantizationType[kind])
            if not np.array_equal(value_RC.numpy(), other):
                raise RuntimeError(f"{kind} is read otherwise than gguf reads it")
            errors.append(float(((value_RC - weight_RC).square() * importance_C).sum()))
        # Eight bits are rounded alike whatever weighs more.
        if not (errors[0] < errors[1] or (kind == "Q8_0" and errors[0] == errors[1])):
            raise RuntimeError(f"{kind}: the importance matrix does not lower the error that it weighs: {errors}")
