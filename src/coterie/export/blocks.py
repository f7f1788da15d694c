"""Numbers and blocks as a GGUF file holds them: sizes, encoding, and what a checkpoint stores in blocks already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from coterie.errors import UnsupportedDtype
from coterie.model.disk.encodings.ggml import SIZES
from coterie.model.disk.encodings.ggml_blocks import GgmlBlocks
from coterie.model.disk.encodings.mxfp4 import BLOCKS, SCALES, Mxfp4
from coterie.model.disk.tensors import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Numbers that are encoded and written at once, and read where rows lie by themselves.
CHUNK = 2**20

#: Bytes that encoding takes for each of them, at most.
ENCODING_BYTES = 32


def block_size(type_: str) -> tuple[int, int]:
    """Return columns and bytes of a block of a GGML type; those of plain numbers are one number."""
    import gguf

    columns, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]]
    return int(columns), int(num_bytes)


def block_type(info: TensorInfo) -> tuple[str, int] | None:
    """Return the GGML type that a tensor is stored in and the axis that blocks run along; None for other encodings.

    Blocks that run on from row to row run along no axis, which is said with 0. Pairs of 4-bit floats in groups of 32
    are MXFP4 there as well, their bytes in another order.
    """
    encoding = None if info.packed is None else info.packed.encoding
    if isinstance(encoding, Mxfp4) and encoding.group == SIZES["MXFP4"][0]:
        return "MXFP4", -2
    if not isinstance(encoding, GgmlBlocks):
        return None
    return encoding.type, encoding.axis if encoding.columns is None else 0


def stored_bytes(info: TensorInfo, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Return the bytes of a matrix that is stored in blocks, where its numbers stood, as a GGUF file holds them.

    Args:
        info: of the tensor that it is, or is one of.
        read: returns the matrix's part of a tensor by the name on disk.
    """
    assert info.packed is not None
    stored = info.packed.stored
    if isinstance(info.packed.encoding, GgmlBlocks):
        return read(stored[""].name)
    return _mxfp4_bytes(read(stored[BLOCKS].name), read(stored[SCALES].name)).T  # the input axis is first


def _mxfp4_bytes(pair_RGb: torch.Tensor, exponent_RG: torch.Tensor) -> torch.Tensor:
    """Return rows of MXFP4 blocks (R, G * 17): an exponent, then numbers j and j + 16 in byte j (``ggml-common.h``).

    Args:
        pair_RGb: numbers 2 j and 2 j + 1 in byte j, the first in its low half (OCP Microscaling Formats 1.0), 16 bytes
            for each of G groups of R rows.
        exponent_RG: powers of two, with the same bias in both.
    """
    import torch

    number_RGB = torch.stack((pair_RGb & 15, pair_RGb >> 4), dim=-1).flatten(-2)
    first_RGb, second_RGb = number_RGB.chunk(2, dim=-1)
    exponent_RG1 = exponent_RG.view(torch.uint8)[..., None]
    return torch.cat((exponent_RG1, first_RGb | second_RGb << 4), dim=-1).flatten(-2)


def encode(tensor: torch.Tensor, type_: str, where: str) -> Iterator[memoryview]:
    """Yield a tensor's bytes in a type, some rows at a time.

    Args:
        tensor: numbers, a vector or matrices.
        type_: F32, F16, BF16 or Q8_0.
        where: name of the tensor, for errors.

    Raises:
        UnsupportedDtype: a number that is too large for the type.
    """
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)
    count = max(1, CHUNK // max(1, rows.shape[-1]))
    for start in range(0, len(rows), count):
        yield _encode_rows(rows[start : start + count], type_, where)


def _encode_rows(tensor: torch.Tensor, type_: str, where: str) -> memoryview:
    import gguf
    import numpy as np
    import torch

    if type_ == "BF16":
        encoded = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    elif type_ == "F16":
        encoded = tensor.to(torch.float16).numpy()
    elif type_ == "F32":
        encoded = tensor.to(torch.float32).numpy()
    else:
        encoded = gguf.quantize(tensor.to(torch.float32).numpy(), gguf.GGMLQuantizationType[type_])
    if type_ in ("F16", "Q8_0"):
        largest = 65504.0 * (127 if type_ == "Q8_0" else 1)  # what is left of a block's scale in half precision
        if bool((tensor.abs() > largest).any()):
            raise UnsupportedDtype(f"{where} holds numbers beyond {largest:.0f}, too large for {type_}; take bf16")
    return bytes_of(np.ascontiguousarray(encoded))


def bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    """Return the bytes of an array, without a copy."""
    return array.data.cast("B")
