"""Sums of float64 numbers that are the same to the last bit in whatever order, and in whatever parts, they are added.

Every number is cut into digits of 32 bits at fixed places, multiples of 2**(32 j - 1023), and digits of one place are
added to each other. As these are whole numbers, that is exact in float64 for up to 2**21 addends (batches). An element
keeps the three highest places that any of its addends reaches; what lies lower is cut off, and would have been cut off
in any other order as well. So a sum of n addends is within ``n 2**-64`` times the largest of them, and one rounding, of
the exact one. After Demmel and Nguyen, Parallel Reproducible Summation (IEEE Transactions on Computers 64, 2015), with
digits cut towards zero in place of rounded ones.

Numbers that are infinite or none give NaN.

Legend: K digits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bits of a digit, and digits of a sum.
BITS, DIGITS = 32, 3

#: Bytes of one element of a sum.
ELEMENT_BYTES = 8 * DIGITS + 1

_BASE = 2.0**BITS
#: How many places there are; the highest of a float64 number is below this.
NUM_PLACES = 2048 // BITS

_PLACES = range(NUM_PLACES)
_UP = torch.tensor([2.0 ** (1023 - BITS * place) for place in _PLACES], dtype=torch.float64)
_DOWN = torch.tensor([2.0 ** (BITS * (place - 1) - 1023) for place in _PLACES], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class BinnedSum:
    """A sum of tensors of one shape.

    Attributes:
        digits_K: sums of digits (K, ...), whole numbers in float64, the highest place first.
        place: number j of the highest place of each element, uint8; 0 where all addends were 0.
    """

    digits_K: Tensor
    place: Tensor

    @classmethod
    def zeros(cls, *shape: int) -> BinnedSum:
        """Return the sum of nothing."""
        digits_K = torch.zeros(DIGITS, *shape, dtype=torch.float64)
        return cls(digits_K=digits_K, place=torch.zeros(shape, dtype=torch.uint8))

    @classmethod
    def of(cls, value: Tensor) -> BinnedSum:
        """Return the sum of one addend, whose `value` it is."""
        return cls.zeros(*value.shape).plus(value)

    def plus(self, value: Tensor) -> BinnedSum:
        """Return the sum with one more addend, float64, on the CPU."""
        # Sign, 11 bits of exponent: the upper six of these are the place.
        own = (value.contiguous().view(torch.int64) >> 57).to(torch.uint8) & 63
        place = torch.maximum(self.place, own)
        rest = value * _UP.take(place.long())
        digits = []
        for digit in self._moved(place):
            whole = rest.trunc()
            digits.append(digit + whole)
            rest.sub_(whole).mul_(_BASE)
        return BinnedSum(digits_K=torch.stack(digits), place=place)

    def __add__(self, other: BinnedSum) -> BinnedSum:
        """Return the sum of the addends of both."""
        place = torch.maximum(self.place, other.place)
        return BinnedSum(digits_K=self._moved(place) + other._moved(place), place=place)

    def __getitem__(self, index: int) -> BinnedSum:
        """Return the sums at an index of the first axis."""
        return BinnedSum(digits_K=self.digits_K[:, index], place=self.place[index])

    def value(self) -> Tensor:
        """Return the sum, rounded to float64."""
        digits = list(self.digits_K)
        for low in range(DIGITS - 1, 0, -1):  # at most one digit of a place stays there, so that nothing cancels below
            carry = (digits[low] / _BASE).trunc()
            digits[low] = digits[low] - carry * _BASE
            digits[low - 1] = digits[low - 1] + carry
        total: Tensor = (digits[0] * _BASE + digits[1]) + digits[2] / _BASE
        return total * _DOWN.take(self.place.long())

    def _moved(self, place: Tensor) -> Tensor:
        """Return the digits with another, not lower, highest place."""
        if torch.equal(place, self.place):
            return self.digits_K
        higher = (place - self.place).clamp(max=DIGITS).long()
        source_K = torch.arange(DIGITS, 2 * DIGITS).view(-1, *[1] * place.ndim) - higher
        return torch.cat((torch.zeros_like(self.digits_K), self.digits_K)).gather(0, source_K)


class Totals(Mapping[str, Tensor]):
    """The statistics of a layer by name, read when they are asked for; sums are rounded to float64 then.

    Args:
        names: what there is.
        read: returns one of them: the sum, or a tensor that is not a sum of this kind.
    """

    def __init__(self, names: Collection[str], read: Callable[[str], BinnedSum | Tensor]) -> None:
        self._names = tuple(names)
        self.exact = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        total = self.exact(name)
        return total.value() if isinstance(total, BinnedSum) else total

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
