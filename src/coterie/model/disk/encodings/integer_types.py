"""The types of integers in groups of columns, which compressed-tensors stores: names, sizes, encodings. No torch here.

What is done with them is in `coterie.model.disk.encodings.integer_groups`.
"""

from __future__ import annotations

from collections.abc import Iterable

from coterie.model.disk.encodings.packed_integers import PackedIntegers

#: (bits of a number, columns of a group) of each type, from most bits to fewest. Only 4 and 8 bits: bytes of 3, 5, 6
#: and 7 differ between releases of compressed-tensors.
INTEGERS = {
    "INT8_G32": (8, 32), "INT8_G64": (8, 64), "INT8_G128": (8, 128),
    "INT4_G32": (4, 32), "INT4_G64": (4, 64), "INT4_G128": (4, 128),
}  # fmt: skip

#: What stands for the type of that many bits with the largest groups that fit.
INTEGER_BITS = {"INT8": 8, "INT4": 4}

#: Bytes of a group's scale.
SCALE_BYTES = 2


def integer_encoding(name: str) -> PackedIntegers:
    """Return how matrices of a type are stored; they are read in bfloat16, as the scales are."""
    bits, group = INTEGERS[name]
    return PackedIntegers(bits=bits, group=group, scales="BF16", shapes="I64", dtype="BF16")


def integers_of_bits(bits: int) -> list[str]:
    """Return the types of so many bits, from the largest groups to the smallest."""
    names = [name for name, (each, _) in INTEGERS.items() if each == bits]
    return sorted(names, key=lambda name: -INTEGERS[name][1])


def are_integers(names: Iterable[str]) -> bool:
    """Tell whether there are names, and all are of these types."""
    listed = list(names)
    return bool(listed) and all(name in INTEGERS for name in listed)
