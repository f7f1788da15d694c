"""How a result is to run, where a budget is for the memory of that. Nothing is imported here that takes time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from coterie.errors import InputError

CacheType = Literal["f16", "q8_0"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """How a result is to run.

    Attributes:
        context: tokens of one sequence.
        batch: sequences at once.
        kv_type: how keys and values are stored, "f16" or "q8_0".
    """

    context: int = 8192
    batch: int = 1
    kv_type: CacheType = "f16"

    def check(self) -> None:
        """Raise InputError for what nothing can run."""
        for name, value in (("context", self.context), ("batch", self.batch)):
            if not 0 < value <= 2**31:
                raise InputError(f"--{name} {value} is out of range: it must be 1 or more")
        if self.kv_type not in get_args(CacheType):
            raise InputError(f"--kv-type {self.kv_type!r} is none of {', '.join(get_args(CacheType))}")
