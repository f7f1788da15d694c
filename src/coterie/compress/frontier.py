"""The frontier of a model: what can be had for how many bytes, and what it is expected to cost; in seconds.

frontier("model", "prices") lists mixtures of types (`coterie.compress.allocators.mixed_types`) from the largest to the
smallest, and beside each the largest single type that takes no more bytes, with the same prices. For a packed result
experts have widths of their own as well (`coterie.compress.allocators.mixed_widths`), where that costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coterie.amounts import format_bytes, parse_bytes
from coterie.compress.decide import allocate
from coterie.compress.expected import Expected
from coterie.compress.plan import KL_OVER_DAMAGE, NARROWED_KL_OVER_DAMAGE
from coterie.compress.prices import Prices
from coterie.compress.recipes import get_recipe
from coterie.compress.request import Request
from coterie.compress.source import Source
from coterie.compress.target import Reader, Target
from coterie.compress.way import Sized, Ways, as_it_is, mixed_way, single_way, with_fewer_experts
from coterie.compress.weights import at_widths, by_type, smallest_types
from coterie.errors import Infeasible
from coterie.model.arch.inspect import read_headers
from coterie.model.disk.encodings.ggml import SIZES, bits_of

#: Shares of the model's bytes that are listed, where they can be had.
SHARES = (0.5, 0.45, 0.4, 0.35, 0.3, 0.275, 0.25, 0.225, 0.2, 0.185, 0.17, 0.16, 0.15, 0.14)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One result that can be had.

    Attributes:
        name: "mixed", or the type that all matrices get.
        num_bytes: of all its tensors.
        damage: the expected rise of the loss in nats a token.
        types: how many numbers, as a share of all that are stored in blocks, are of which type.
        neurons: the share of the experts' hidden neurons that stays.
    """

    name: str
    num_bytes: int
    damage: float
    types: dict[str, float]
    neurons: float = 1.0

    @property
    def expected_kl(self) -> float:
        """What the divergence from the original is expected to be, nats a token."""
        return (KL_OVER_DAMAGE if self.neurons == 1 else NARROWED_KL_OVER_DAMAGE) * self.damage

    @property
    def expected(self) -> Expected:
        """The same, with what it is known by."""
        return Expected(kl=self.expected_kl, relation="about", basis="prices")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontier:
    """What can be had.

    Attributes:
        original_bytes: of all tensors of the model.
        mixed: mixtures of types, from the largest to the smallest.
        single: one type for all matrices, each, from the largest to the smallest; types that nobody priced are left
            out.
    """

    original_bytes: int
    mixed: tuple[Point, ...]
    single: tuple[Point, ...]

    def plain_within(self, num_bytes: int) -> Point | None:
        """Return the single type that costs least in so many bytes; None where none fits."""
        return _cheapest(self.single, num_bytes)

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""

        def listed(points: Sequence[Point]) -> list[dict[str, Any]]:
            return [
                {
                    "name": point.name,
                    "bytes": point.num_bytes,
                    "share": round(point.num_bytes / self.original_bytes, 4),
                    "damage": point.damage,
                    "expected_kl": point.expected_kl,
                    "types": {name: round(share, 4) for name, share in point.types.items()},
                    **({} if point.neurons == 1 else {"neurons": round(point.neurons, 4)}),
                }
                for point in points
            ]

        return {"original_bytes": self.original_bytes, "mixed": listed(self.mixed), "single": listed(self.single)}


def frontier(
    model: str | Path,
    prices: Prices | str | Path,
    *,
    budgets: Sequence[str | int] | None = None,
    target: Literal["gguf", "packed"] = "gguf",
) -> Frontier:
    """List what a model can become in fewer bits, and what that is expected to cost.

    Args:
        model: a model folder or hub id; only headers are read.
        prices: what types cost (`coterie.price`), or the folder of that.
        budgets: bytes, or amounts like "12GiB", of the mixtures that are listed; `SHARES` of the model when None.
        target: who is to read the result, "gguf" or "packed", see `coterie.compress.target.Target.reader`.

    Raises:
        StaleArtifact: the prices are of another model.
        Infeasible: none of the budgets can be met.
        InputError: the model or a budget is not usable.
    """
    source, prices = _open(model, prices, target)
    original = source.original.num_bytes
    limits = [int(share * original) for share in SHARES] if budgets is None else list(map(parse_bytes, budgets))
    mixed = []
    refused = None
    for limit in sorted(limits, reverse=True):
        try:
            point = _point(source, prices, "mixed", Target(budget=limit, reader=target))
        except Infeasible as error:
            refused = refused or error
        else:
            assert point is not None, "a mixture has types that nobody priced"
            mixed.append(point)
    if not mixed:
        raise refused or Infeasible(f"{format_bytes(original)} leave nothing to store in fewer bits")
    return Frontier(
        original_bytes=original, mixed=_without_twins(mixed), single=_single_types(source, prices)
    )  # fmt: skip


def priced_ways(model: str | Path, prices: Prices | str | Path, limit: int, target: Reader = "gguf") -> Ways:
    """List the ways to meet a budget, those in fewer bits with what they cost by prices; see `coterie.compress.ways`.

    Args:
        model: a model folder or hub id; only headers are read.
        prices: what types cost (`coterie.price`), or the folder of that.
        limit: bytes that all tensors may take.
        target: who is to read the result, "gguf" or "packed".
    """
    source, prices = _open(model, prices, target)
    sized = Sized(headers=read_headers(source.checkpoint), accounting=source.accounting, weights=source.weights)
    listed = [*as_it_is(sized, limit)]
    if not listed:
        plain = _cheapest(_single_types(source, prices), limit)
        if plain is not None:
            listed.append(single_way(sized, plain.name, plain.num_bytes, plain.expected))
        try:
            mixed = _point(source, prices, "mixed", Target(budget=limit, reader=target))
        except Infeasible:
            mixed = None
        if mixed is not None and (len(mixed.types) > 1 or mixed.neurons < 1):
            narrower = mixed.neurons < 1
            listed.append(mixed_way(sized, limit, mixed.num_bytes, mixed.expected, narrower=narrower))
        listed += with_fewer_experts(sized, limit)
    return Ways(
        limit=limit, original_bytes=sized.num_bytes({}), least_bytes=sized.num_bytes(smallest_types(sized.weights)),
        num_experts=sized.num_experts, ways=tuple(listed),
    )  # fmt: skip


def _cheapest(points: Sequence[Point], limit: int) -> Point | None:
    """Return the point that costs least in so many bytes; None where none fits."""
    return min((point for point in points if point.num_bytes <= limit), key=lambda point: point.damage, default=None)


def _open(model: str | Path, prices: Prices | str | Path, target: Reader) -> tuple[Source, Prices]:
    source = Source.open(model, fetch="samples", target=target)
    if not isinstance(prices, Prices):
        prices = Prices.load(prices, model_digest=source.checkpoint.digest)
    return source, prices


def _single_types(source: Source, prices: Prices) -> tuple[Point, ...]:
    """Return one type for all matrices, each that is priced, from the largest to the smallest."""
    priced = {kind for by_type in prices.damages.values() for kind in by_type}
    ladder = sorted(priced & SIZES.keys(), key=bits_of, reverse=True)
    single = [point for kind in ladder if (point := _point(source, prices, kind, Target(type=kind))) is not None]
    return _without_twins(sorted(single, key=lambda point: -point.num_bytes))


def _point(source: Source, prices: Prices, name: str, target: Target) -> Point | None:
    """Return what a target comes to; None where a matrix gets a type that it has no price for."""
    request = Request(recipe=get_recipe(target.usual_recipe), target=target, router="plain", seed=0)
    allocation = allocate(source, request, prices=prices)
    numbers: dict[str, int] = {}
    damage = 0.0
    weights = at_widths(source.weights, allocation.layers)
    for weight, kind in by_type(weights, allocation.types):
        numbers[kind] = numbers.get(kind, 0) + weight.num_elements
        if allocation.damage is None:  # one type for all
            if kind not in prices.damages.get(weight.pattern, {}):
                return None
            damage += prices.damages[weight.pattern][kind]
    damage = allocation.damage if allocation.damage is not None else damage
    total = sum(numbers.values())
    types = {kind: numbers[kind] / total for kind in sorted(numbers, key=bits_of, reverse=True)}
    if target.type is not None:  # what stands in where blocks are wider than a row
        name = max(numbers, key=lambda kind: numbers[kind], default=name)
    stays, whole = (
        sum(weight.num_elements for weight in each if weight.kind == "expert") for each in (weights, source.weights)
    )
    return Point(
        name=name, num_bytes=allocation.num_bytes, damage=damage, types=types, neurons=stays / whole if whole else 1.0
    )  # fmt: skip


def _without_twins(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return points of which no two have equal bytes and damage, as types have that stand in for each other."""
    seen: dict[tuple[int, float], Point] = {}
    for point in points:
        seen.setdefault((point.num_bytes, point.damage), point)
    return tuple(seen.values())
