"""What results are about to cost, by measurements of the bundled models: a rule of thumb until a model is measured.

Every table says which command printed it. Between two points the logarithm of the divergence is read off the straight
line; beyond the last one only a bound is known. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Points = Sequence[tuple[float, float]]

#: Share of the bytes in bfloat16 -> KL(original || result), nats a token, all matrices at 8 bits
#: (benchmarks/plain_quantisation.py, "8-bit rounding": of the experts, which are most of the model).
_EIGHT_BITS = (0.53, 0.000052)

#: The same of a type for each matrix: benchmarks/bits.py on reference/qwen3_moe, "coterie-bits KL".
MIXED: Points = (
    (0.160, 0.0366), (0.173, 0.0263), (0.192, 0.0161), (0.214, 0.0104), (0.284, 0.00252), (0.314, 0.00163),
    _EIGHT_BITS,
)  # fmt: skip

#: The same of llama.cpp's own formats, which give one type to nearly all matrices: as above, "llama.cpp KL". What
#: IQ3_XXS lost in more bytes than IQ2_M (0.0555 at 0.214) is left out: more bytes never cost more here.
ONE_TYPE: Points = (
    (0.173, 0.1227), (0.192, 0.0496), (0.284, 0.0121), (0.314, 0.00923), _EIGHT_BITS,
)  # fmt: skip

#: Share of the experts' parameters that stays -> the same, by the recipe coterie, which trains the result:
#: benchmarks/methods.py on reference/model. Rounding adds what it costs by itself (benchmarks/plain_quantisation.py:
#: 0.049 for half removed, 0.003 for 4 bits, 0.051 for both).
FEWER_EXPERTS: Points = ((0.25, 0.128), (0.375, 0.070), (0.5, 0.040), (0.75, 0.013))


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """A divergence from the original that is expected.

    Attributes:
        kl: KL(original || result) in nats a token.
        relation: whether it is "about" that, "below" or "above".
        basis: what it is known by: "prices" of the very model (`coterie.price`), or the "bundled" models' tables.
    """

    kl: float
    relation: Literal["about", "below", "above"]
    basis: Literal["prices", "bundled"]

    @property
    def is_known(self) -> bool:
        """Whether it can be compared: a bound from below cannot."""
        return self.relation != "above"

    def __str__(self) -> str:
        sign = {"about": "", "below": "< ", "above": "> "}[self.relation]
        digits = max(0, 1 - math.floor(math.log10(self.kl))) if self.kl else 0
        return f"{sign}{self.kl:.{digits}f}"

    def __add__(self, other: Expected) -> Expected:
        relations = {self.relation, other.relation}
        relation: Literal["about", "above"] = "above" if "above" in relations else "about"
        return Expected(kl=self.kl + other.kl, relation=relation, basis=self.basis)


def expected_at(points: Points, share: float) -> Expected:
    """Read a table of measured points off.

    Args:
        points: (share, KL) with shares that rise and KL that falls.
        share: where.
    """
    first, last = points[0], points[-1]
    if share < first[0]:
        return Expected(kl=first[1], relation="above", basis="bundled")
    if share > last[0]:
        return Expected(kl=last[1], relation="below", basis="bundled")
    for (left, kl), (right, next_kl) in pairwise(points):
        if share <= right:
            way = (share - left) / (right - left)
            value = math.exp((1 - way) * math.log(kl) + way * math.log(next_kl))
            return Expected(kl=value, relation="about", basis="bundled")
    raise AssertionError("shares rise")
