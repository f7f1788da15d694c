"""Which tensors a GGUF file holds, and from which rows of which tensors on disk each is put together.

A file's tensor is a row of parts, one after the other: a stack of experts has a part for each of them. A part is a
matrix on disk, or one of a stack, as it is or with its rows in another order. Nothing is read here but headers.

E experts, F width of an expert, D model width, H heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coterie.errors import InputError
from coterie.export import blocks
from coterie.model.disk.encodings.bit_planes import BitPlanes
from coterie.model.disk.encodings.ggml import OWN_TYPES
from coterie.model.disk.encodings.shared_base import SharedBase
from coterie.model.disk.gguf.names import Target
from coterie.model.disk.gguf.take import Take
from coterie.model.disk.tensors import TensorInfo

#: Kinds of tensors that llama.cpp wants in float32: small ones that everything hangs on.
_FULL_PRECISION = re.compile(r"(_norm|_gate_inp|_gate_inp_shexp|exp_probs_b|attn_sinks)\.weight$|\.bias$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A matrix of a file's tensor.

    Attributes:
        source: name on disk.
        index: which matrix of a stack on disk; None where it is no stack.
        take: how it is taken.
    """

    source: str
    index: int | None
    take: Take


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A tensor of the file.

    Attributes:
        name: its name there.
        shape: its shape, output axis first as on disk.
        type: number format or block type, by its name in GGML.
        parts: what it is put together from.
        copied: bytes of blocks go over as they are.
        unpacked: it is stored in blocks that cannot go over, and becomes numbers first.
        block: columns of a block of its type.
        block_bytes: bytes of a block.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    parts: tuple[Part, ...]
    copied: bool
    unpacked: bool
    block: int
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // self.block * self.block_bytes


def plan_outputs(
    tensors: Mapping[str, TensorInfo],
    targets: Mapping[str, tuple[Target, ...] | None],
    *,
    number_type: str,
) -> list[Output]:
    """Return the tensors of the file, in the order of the model.

    Args:
        tensors: the checkpoint's, by name on disk.
        targets: where each goes; nothing for one that is left out, None where no place is known.
        number_type: type of matrices of plain numbers, by its name in GGML.

    Raises:
        InputError: a tensor that has no place there, or experts that do not make a stack.
    """
    by_name: dict[str, list[tuple[int | None, str, Take]]] = {}
    for source in tensors:
        places = targets[source]
        if places is None:
            raise InputError(
                f"{source}: llama.cpp has no place for such a tensor in this architecture, so the model would be "
                "computed without it"
            )
        for target in places:
            by_name.setdefault(target.name, []).append((target.expert, source, target.take))
    outputs = [_output(name, entries, tensors, number_type) for name, entries in by_name.items()]
    return sorted(outputs, key=lambda output: _place(output.name))


def takes_numbers(name: str) -> bool:
    """Tell whether llama.cpp wants a tensor in float32, whatever the others are stored as."""
    return _FULL_PRECISION.search(name) is not None


def _place(name: str) -> tuple[int, str]:
    """Return where a tensor stands: those before the layers, the layers by number, those behind."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1 if name.startswith("token_embd") else 2**31, name)


def _output(
    name: str, entries: list[tuple[int | None, str, Take]], tensors: Mapping[str, TensorInfo], number_type: str
) -> Output:
    experts = [expert for expert, _, _ in entries]
    if len(entries) > 1 and sorted(experts, key=lambda e: -1 if e is None else e) != list(range(len(entries))):
        raise InputError(f"{name} would be made of {len(entries)} tensors that are no stack, such as {entries[0][1]}")
    entries = sorted(entries, key=lambda entry: entry[0] or 0)
    parts: list[Part] = []
    shapes: set[tuple[int, ...]] = set()
    is_stack = experts[0] is not None
    for _, source, take in entries:
        extents = tensors[source].shape
        # A bias of a stack is a stack of vectors, and no matrix.
        inner = extents[1:] if len(extents) == 3 or (len(extents) == 2 and name.endswith("_exps.bias")) else extents
        indices: Iterable[int | None] = range(extents[0]) if inner is not extents else (None,)
        is_stack = is_stack or inner is not extents
        shape = take.shape(*(*inner, 1)[:2]) if inner else (1, 1)
        shapes.add(shape if len(inner) > 1 else (math.prod(shape),))
        parts += [Part(source=source, index=index, take=take) for index in indices]
    if len(shapes) > 1:
        raise InputError(
            f"{name}: experts have different shapes, {' and '.join(str(list(s)) for s in sorted(shapes)[:2])}; "
            "a GGUF file has one width for all"
        )
    [shape] = shapes
    if is_stack:
        shape = (len(parts), *shape)
    elif len(shape) == 2 and shape[0] == 1 and "_gate_inp_shexp" in name:
        shape = shape[1:]  # the gate of a shared expert is a vector there
    stored = {blocks.block_type(tensors[part.source]) for part in parts}
    for part in parts:
        kind, packed = blocks.block_type(tensors[part.source]), tensors[part.source].packed
        if packed is not None and isinstance(packed.encoding, BitPlanes | SharedBase):
            what = (
                "planes of bits" if isinstance(packed.encoding, BitPlanes) else "a base that experts share and factors"
            )
            raise InputError(
                f"{part.source} is stored as {what}, which no GGUF file can hold; compress the original again with "
                "types of GGML, like --type Q4_K"
            )
        if kind is not None and kind[0] in OWN_TYPES:
            raise InputError(
                f"{part.source} is stored as {kind[0]}, a type of Coterie's own, which no GGUF file can hold; compress "
                "the original again with types of GGML, like --type Q4_K"
            )
    copied, type_ = False, number_type
    if len(shape) < 2 or takes_numbers(name):
        type_ = "F32"
    elif None not in stored and all(part.take.keeps_blocks(axis) for part in parts for _, axis in _known(stored)):
        types = {kind for kind, _ in _known(stored)}
        if len(types) > 1:
            raise _mixed(name, types)
        copied, type_ = True, types.pop()
    elif len(stored) > 1:
        raise _mixed(name, {kind for kind, _ in _known(stored)} | {"plain numbers"})
    elif shape[-1] % blocks.block_size(number_type)[0]:
        type_ = "BF16"
    block, block_bytes = blocks.block_size(type_)
    return Output(
        name=name, shape=shape, type=type_, parts=tuple(parts), copied=copied, unpacked=not copied and stored != {None},
        block=block, block_bytes=block_bytes,
    )  # fmt: skip


def _known(stored: Iterable[tuple[str, int] | None]) -> list[tuple[str, int]]:
    return [kind for kind in stored if kind is not None]


def _mixed(name: str, types: Iterable[str]) -> InputError:
    said = " and ".join(sorted(types))
    return InputError(f"{name}: its experts are stored as {said}, and a tensor of a GGUF file has one type")


def biggest_piece(outputs: Iterable[Output], tensors: Mapping[str, TensorInfo]) -> int:
    """Return the bytes of weights that are in memory at once while these are written, at most."""
    return max(_piece_bytes(output, tensors) for output in outputs) + blocks.CHUNK * blocks.ENCODING_BYTES


def _piece_bytes(output: Output, tensors: Mapping[str, TensorInfo]) -> int:
    part = output.parts[0]
    info = tensors[part.source]
    elements = info.num_elements // (info.shape[0] if part.index is not None else 1)
    if part.take.is_whole and part.index is None and len(info.shape) == 2:
        elements = min(elements, max(blocks.CHUNK, info.shape[1]))
    # As it is stored, as numbers, and once more with its rows in another order.
    return elements * 4 * (1 + (info.packed is not None) + (not part.take.is_whole))
