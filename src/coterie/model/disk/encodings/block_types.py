"""Every type that matrices are stored in block by block, with codes that a quantiser chooses. No torch here.

Those of GGML, which GGUF files hold, and a few of our own (`coterie.model.disk.encodings.ggml`); integers in groups of
columns (`coterie.model.disk.encodings.integer_types`), which compressed-tensors stores; and planes of bits, which are
our own as well (`coterie.model.disk.encodings.plane_types`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coterie.model.disk.encodings import ggml
from coterie.model.disk.encodings.integer_types import INTEGERS, SCALE_BYTES
from coterie.model.disk.encodings.plane_types import PLANES, group_bytes

if TYPE_CHECKING:
    from coterie.model.disk.encodings.ggml.block_type import BlockType, Layout

#: (columns of a block, bytes of a block) of every type.
SIZES = {
    **ggml.SIZES,
    **{name: (group, SCALE_BYTES + group * bits // 8) for name, (bits, group) in INTEGERS.items()},
    **{name: (group, group_bytes(bits, group)) for name, (bits, group) in PLANES.items()},
}


def bits_of(name: str) -> float:
    """Return the bits of a number in a type, scales counted."""
    block, size = SIZES[name]
    return 8 * size / block


def get_type(name: str) -> BlockType:
    """Return a type by its name, like Q4_K, INT4_G128 or PLANES4_G128.

    Raises:
        UnknownName: no such type can be written.
    """
    if name in INTEGERS:
        from coterie.model.disk.encodings.integer_groups import IntegerGroups

        bits, group = INTEGERS[name]
        return IntegerGroups(name=name, bits=bits, block=group)
    if name in PLANES:
        from coterie.model.disk.encodings.plane_groups import Planes

        bits, group = PLANES[name]
        return Planes(name=name, bits=bits, block=group)
    return ggml.get_type(name)


def get_layout(name: str) -> Layout:
    """Return a type by its name, and with it how its blocks lie, see `coterie.model.disk.encodings.ggml.get_layout`.

    Raises:
        UnknownName: no such type can be written.
    """
    return get_type(name) if name in INTEGERS or name in PLANES else ggml.get_layout(name)
