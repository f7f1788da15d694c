"""Block formats: what a block of numbers is, in bits, and how codes are chosen. Those of GGML are in GGUF files.

A type is a plain object of one of six kinds: numbers times a scale (`scaled`), of which there are three (`ternary`),
numbers times a scale less a minimum (`affine`), entries of a grid of small vectors with signs (`vector`), or with a
shift (`shifted`); and, our own, numbers times a scale that are then rotated (`rotated`). Each says how a block's
scales are fitted, how codes are chosen for columns once they are fixed, and how both become bytes; so nearest
rounding and GPTQ are the same few lines for all of them. Facts of the layouts: llama.cpp's ``ggml-common.h``, and
``quants.py`` of its package gguf.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from coterie.errors import UnknownName

if TYPE_CHECKING:
    from coterie.model.disk.encodings.ggml.block_type import BlockType, Layout

#: (columns of a block, bytes of a block) of every type that can be written: GGML's, from most bits to fewest, and ours.
SIZES = {
    "Q8_0": (32, 34), "Q6_K": (256, 210), "Q5_1": (32, 24), "Q5_0": (32, 22), "Q5_K": (256, 176), "Q4_1": (32, 20),
    "Q4_0": (32, 18), "Q4_K": (256, 144), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17),
    "Q3_K": (256, 110), "IQ3_S": (256, 110), "IQ3_XXS": (256, 98), "Q2_K": (256, 84), "IQ2_S": (256, 82),
    "IQ2_XS": (256, 74), "IQ2_XXS": (256, 66), "TQ2_0": (256, 66), "IQ1_M": (256, 56),
    "TQ1_0": (256, 54), "IQ1_S": (256, 50),
    "TURBO4": (256, 130), "TURBO3": (256, 98), "TURBO2": (256, 66),
}  # fmt: skip

#: Those that no GGUF file can hold. They are chosen where they are named, and never by themselves.
OWN_TYPES = ("TURBO4", "TURBO3", "TURBO2")


#: What a type's name ends with where blocks run on from one row of a matrix to the next: no GGUF file says so.
WRAPPED = ".W"

#: Columns that a row has a multiple of where blocks run on from row to row: sub-blocks of all types divide it.
GRAIN = 32


def unwrapped(name: str) -> str:
    """Return the name of a type without what says that its blocks run on from row to row."""
    return name.removesuffix(WRAPPED)


def rows_together(name: str, columns: int) -> int:
    """Return how many rows of so many columns a type stores together: as few as are whole blocks, 1 as a rule."""
    return math.lcm(columns, SIZES[unwrapped(name)][0]) // columns if name.endswith(WRAPPED) else 1


def bits_of(name: str) -> float:
    """Return the bits of a number in a type, scales counted."""
    block, size = SIZES[unwrapped(name)]
    return 8 * size / block


def numbers_of(name: str) -> int:
    """Return how many float16 numbers a block of a type has that all its values are linear in: 0, 1 or 2."""
    return len(range(SIZES[unwrapped(name)][1])[get_type(unwrapped(name)).numbers_at]) // 2


@cache
def get_type(name: str) -> BlockType:
    """Return a type by its name in GGML, like Q4_K.

    Raises:
        UnknownName: no such type can be written.
    """
    from coterie.model.disk.encodings.ggml import affine, rotated, scaled, shifted, ternary, vector

    types: dict[str, BlockType] = {}
    types.update(scaled.TYPES)
    types.update(ternary.TYPES)
    types.update(affine.TYPES)
    types.update(vector.TYPES)
    types.update(shifted.TYPES)
    types.update(rotated.TYPES)
    if name not in types:
        raise UnknownName("GGML type", name, SIZES)
    return types[name]


def get_layout(name: str) -> Layout:
    """Return a type by its name, and with it how its blocks lie: from row to row where it ends so.

    Raises:
        UnknownName: no such type can be written.
    """
    from coterie.model.disk.encodings.ggml.block_type import Wrapped

    kind = get_type(unwrapped(name))
    return Wrapped(inner=kind) if name.endswith(WRAPPED) else kind
