"""How tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from coterie.errors import InputError
from coterie.fields import shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen; None leaves what the model's generation_config.json says.

    Attributes:
        temperature: what scores are divided by; 0 for the likeliest token each time.
        top_k: how many of the likeliest tokens are drawn from.
        top_p: the share of probability of the likeliest tokens that are drawn from.
        min_p: the share of the likeliest token's probability that others need.
        repetition_penalty: what scores of tokens that were there are divided by.
        seed: seed of the draws.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raise InputError for what is out of range."""
        ranges = {
            "temperature": (self.temperature, 0.0, 100.0), "top-k": (self.top_k, 1, 2**31),
            "top-p": (self.top_p, 0.0, 1.0), "min-p": (self.min_p, 0.0, 1.0),
            "repetition-penalty": (self.repetition_penalty, 0.01, 100.0),
        }  # fmt: skip
        for name, (value, least, most) in ranges.items():
            if value is not None and not least <= value <= most:
                given = f"{value:g}" if isinstance(value, float) else shown(value)
                raise InputError(f"--{name} {given} is out of range: {least:g} to {most:g}")

    def settings(self) -> dict[str, Any]:
        """Return them as transformers has them."""
        given = {
            name: value
            for name in ("top_k", "top_p", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if self.temperature == 0:
            return {"do_sample": False, "repetition_penalty": given.get("repetition_penalty")}
        if self.temperature is not None:
            given |= {"temperature": self.temperature, "do_sample": True}
        return given

    def counted_on(self, number: int) -> Sampling:
        """Return that of the answer of a number, from 0: its seed counts on from this one, if there is one."""
        return self if self.seed is None else replace(self, seed=self.seed + number)


def check_tokens(max_tokens: int) -> None:
    """Raise InputError where an answer would have no tokens."""
    if max_tokens < 1:
        raise InputError(f"--max-tokens {max_tokens} must be 1 or more")
