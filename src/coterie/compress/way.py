"""A way to meet a budget, what makes one, and which of several is best. No torch here."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from coterie.amounts import format_bytes
from coterie.compress.expected import FEWER_EXPERTS, ONE_TYPE, Expected, expected_at
from coterie.compress.header_weights import weights_of_headers
from coterie.compress.memory_budget import MemoryBudget
from coterie.compress.target import Reader
from coterie.compress.weights import Weight, bytes_saved, one_type
from coterie.model.arch.accounting import Accounting
from coterie.model.arch.inspect import Headers

#: What removing experts is combined with: numbers as they are, and the usual types of 8 and 4 bits.
_WITH_FEWER_EXPERTS = (None, "Q8_0", "Q4_K")

#: A way is better where it costs less than this share of another one's damage: predictions are not finer than that.
_BETTER = 0.98


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to meet a budget.

    Attributes:
        name: what is done.
        options: of `coterie compress`; where there are several, one run after the other.
        num_bytes: of all tensors of the result.
        experts: that stay in each layer.
        bits: of a number of a matrix, on average, scales counted.
        expected: what it is about to cost; None where nothing is known.
    """

    name: str
    options: tuple[str, ...]
    num_bytes: int
    experts: int
    bits: float
    expected: Expected | None

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        expected = self.expected
        return {
            "name": self.name,
            "options": list(self.options),
            "bytes": self.num_bytes,
            "experts": self.experts,
            "bits": round(self.bits, 3),
            "expected_kl": None if expected is None else expected.kl,
            "relation": None if expected is None else expected.relation,
            "basis": None if expected is None else expected.basis,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Ways:
    """The ways to meet a budget.

    Attributes:
        limit: bytes that all tensors may take.
        original_bytes: of all tensors of the model, as it is read.
        least_bytes: of all experts in the smallest types.
        num_experts: of a layer of the model.
        ways: those that meet it, the simplest first.
        refused: why the model cannot be compressed at all, such as a result in fewer bits; else None.
        memory: where the whole budget goes, where it is for the memory of a run; `limit` is what it leaves for weights.
    """

    limit: int
    original_bytes: int
    least_bytes: int
    num_experts: int
    ways: tuple[Way, ...]
    refused: str | None = None
    memory: MemoryBudget | None = None

    @property
    def best(self) -> Way | None:
        """The way that is expected to cost least; of those about as good the simplest.

        What was measured on the model itself goes before what is known of others. None where nothing is known, or where
        another one may cost less, since only a bound from below is known of it.
        """
        best = None
        for way, kl in self._comparable():
            if best is None or kl < _BETTER * best[1]:
                best = way, kl
        if best is None or any(bound < best[1] for bound in self._bounds()):
            return None
        return best[0]

    def _bounds(self) -> list[float]:
        return [expected.kl for _, expected in self._of_one_basis() if not expected.is_known]

    def _comparable(self) -> list[tuple[Way, float]]:
        return [(way, expected.kl) for way, expected in self._of_one_basis() if expected.is_known]

    def _of_one_basis(self) -> list[tuple[Way, Expected]]:
        """Return the ways that can be compared: those with prices where there are any, else all."""
        known = [(way, way.expected) for way in self.ways if way.expected is not None]
        priced = [(way, expected) for way, expected in known if expected.basis == "prices"]
        return priced or known

    def verdict(self) -> str:
        """Say which way is best, and by how much, in a sentence."""
        best = self.best
        if self.refused is not None:
            return f"there is no way: {self.refused}"
        if not self.ways:
            return (
                f"no way meets it: with all experts in the smallest types it takes {format_bytes(self.least_bytes)}, "
                "and with fewer experts as well it is too large"
            )
        if best is None:
            return "which way is best is not known: nothing so small was measured"
        if not best.options:
            return f"best: {best.name}, it fits"
        command = ", then ".join(f"coterie compress {options}" for options in best.options)
        others = [(way, kl) for way, kl in self._comparable() if way is not best]
        assert best.expected is not None
        said = f"best: {best.name} ({command})"
        if not others or best.expected.relation == "below":
            return said
        other, kl = min(others, key=lambda each: each[1])
        if kl < best.expected.kl / _BETTER:
            return f"{said}; {other.name} is not expected to be better"
        return f"{said}; {other.name} costs {float(f'{kl / best.expected.kl:.2g}'):g} times as much"

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        best = self.best
        return {
            "limit": self.limit,
            "original_bytes": self.original_bytes,
            "least_bytes": self.least_bytes,
            "ways": [way.content() for way in self.ways],
            "best": None if best is None else best.name,
            "refused": self.refused,
            **({} if self.memory is None else {"memory": self.memory.content()}),
            "verdict": self.verdict(),
        }


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A model whose ways are looked for.

    Attributes:
        headers: of its checkpoint, as plain numbers.
        accounting: says how large results are.
        weights: the matrices that can be stored in fewer bits.
    """

    headers: Headers
    accounting: Accounting
    weights: tuple[Weight, ...]

    @classmethod
    def of(cls, headers: Headers, target: Reader = "gguf") -> Sized:
        """Describe a model by its headers alone, for results that `target` is to read."""
        accounting = headers.accounting()
        return cls(headers=headers, accounting=accounting, weights=weights_of_headers(headers, accounting, target))

    @property
    def num_experts(self) -> int:
        """Experts of the layer that has most."""
        return max(layer.num_experts for layer in self.headers.moe_layers)

    def num_bytes(self, types: Mapping[str, str], experts: int | None = None) -> int:
        """Return the bytes of all tensors in some types, by pattern, with so many experts in each layer or all."""
        count = self.num_experts if experts is None else experts
        plain = self.headers.num_bytes(self.accounting, count)
        return plain - bytes_saved([self._kept(weight, count) for weight in self.weights], types)

    def share(self, num_bytes: int, experts: int | None = None) -> float:
        """Return bytes over those in bfloat16, with so many experts in each layer or all."""
        count = self.num_experts if experts is None else experts
        removed = sum(
            weight.num_elements - self._kept(weight, count).num_elements
            for weight in self.weights
            if weight.layer is not None
        )
        total = sum(info.num_elements for info in self.headers.checkpoint.tensors.values())
        return num_bytes / (2 * (total - removed))

    def bits(self, num_bytes: int, experts: int | None = None) -> float:
        """Return the bits of a number of the matrices, where all tensors take so many bytes."""
        count = self.num_experts if experts is None else experts
        kept = [self._kept(weight, count) for weight in self.weights]
        beside = self.num_bytes({}, count) - sum(weight.plain_bytes for weight in kept)
        return 8 * (num_bytes - beside) / max(1, sum(weight.num_elements for weight in kept))

    def _kept(self, weight: Weight, experts: int) -> Weight:
        """Return a weight of a layer that keeps so many experts."""
        if weight.layer is None:
            return weight
        total = self.headers.moe_layers[weight.layer].num_experts
        count = min(experts, total)
        if count == total:
            return weight
        if len(weight.names) > 1:
            return weight.only(weight.names[:count])
        shape = (count, *weight.shape[1:])
        return replace(weight, shape=shape, plain_bytes=weight.plain_bytes // total * count)


def as_it_is(model: Sized, limit: int) -> tuple[Way, ...]:
    """Return the way of doing nothing, where it fits."""
    size = model.num_bytes({})
    if size > limit:
        return ()
    nothing = Expected(kl=0.0, relation="about", basis="bundled")
    return (
        Way(
            name="as it is", options=(), num_bytes=size, experts=model.num_experts, bits=model.bits(size),
            expected=nothing,
        ),
    )  # fmt: skip


def single_way(model: Sized, name: str, size: int, expected: Expected) -> Way:
    """Return the way of one type for all matrices."""
    return Way(
        name=f"one type for all, {name}", options=(f"--type {name}",), num_bytes=size, experts=model.num_experts,
        bits=model.bits(size), expected=expected,
    )  # fmt: skip


def mixed_way(model: Sized, limit: int, size: int, expected: Expected, *, narrower: bool = False) -> Way:
    """Return the way of a type for each matrix; of narrower experts besides."""
    name = "a type for each matrix" + (", a width for each expert" if narrower else "")
    return Way(
        name=name, options=(f"--budget {limit}",), num_bytes=size, experts=model.num_experts,
        bits=model.bits(size), expected=expected,
    )  # fmt: skip


def with_fewer_experts(model: Sized, limit: int) -> Iterator[Way]:
    """Yield, for numbers as they are and in 8 and 4 bits, the most experts that fit, where that is not all of them."""
    routable: Sequence[int] = model.headers.routable()
    for name in _WITH_FEWER_EXPERTS:
        types = {} if name is None else one_type(model.weights, name)
        # More experts are never fewer bytes.
        fitting = bisect_right(routable, limit, key=partial(model.num_bytes, types))
        if not fitting or routable[fitting - 1] == model.num_experts:
            continue
        count = routable[fitting - 1]
        size, keep = model.num_bytes(types, count), count / model.num_experts
        expected = expected_at(FEWER_EXPERTS, keep)
        options: tuple[str, ...] = (f"--keep {keep:.3g}",)
        then = ""
        if name is not None:
            expected += expected_at(ONE_TYPE, model.share(size, count))
            options, then = (*options, f"--type {name}"), f", then {name}"
        yield Way(
            name=f"{count} of {model.num_experts} experts{then}", options=options, num_bytes=size,
            experts=count, bits=model.bits(size, count), expected=expected,
        )  # fmt: skip
