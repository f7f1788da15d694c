"""The types of planes of bits: names and sizes. No torch here.

What is done with them is in `coterie.model.disk.encodings.plane_groups`, how they lie on disk in
`coterie.model.disk.encodings.bit_planes`.
"""

from __future__ import annotations

#: Bits of the base plane of a number; every plane behind it says one more.
BASE_BITS = 2

#: The most bits that planes say of a number.
MOST_BITS = 4

#: Bytes of a scale, a float16.
SCALE_BYTES = 2

#: (bits of a number in all planes, columns of a group) of each type, from most bits to fewest. The paper has groups of
#: 128 (D2MoE, arXiv:2504.15299); smaller ones are for rows that those do not divide, and for fewer errors.
PLANES = {
    "PLANES4_G32": (4, 32), "PLANES4_G64": (4, 64), "PLANES4_G128": (4, 128),
    "PLANES3_G32": (3, 32), "PLANES3_G64": (3, 64), "PLANES3_G128": (3, 128),
}  # fmt: skip

#: What stands for the type of that many bits with the largest groups that fit.
PLANE_NAMES = {"PLANES4": "PLANES4_G128", "PLANES3": "PLANES3_G128"}


def group_bytes(bits: int, group: int) -> int:
    """Return the bytes of a group of numbers in all planes: their codes, and a scale for each plane."""
    return group * bits // 8 + SCALE_BYTES * (bits - BASE_BITS + 1)


def planes_fitting(name: str, columns: int) -> str | None:
    """Return the type, or that of as many bits with the largest smaller groups that divide rows of so many columns."""
    bits, most = PLANES[name]
    fitting = {
        group: kind for kind, (each, group) in PLANES.items() if each == bits and group <= most and columns % group == 0
    }
    return fitting[max(fitting)] if fitting else None
