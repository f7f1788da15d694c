"""What an allocator is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, Protocol

from coterie.amounts import format_bytes, format_count, parse_bytes, parse_count
from coterie.compress.allocators import ALLOCATORS
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.sizes import Sizing
from coterie.compress.target import Target
from coterie.compress.weights import Weight, at_widths, bytes_saved
from coterie.compress.width_prices import WidthPrices
from coterie.errors import Infeasible, UnknownName
from coterie.model.arch.layers import Architecture
from coterie.profile.profile import Profile


class Meter(Protocol):
    """Measures matrices, unit by unit."""

    def measure(self, skip: Collection[str] = ()) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
        """Yield what was measured last, and numbers by name and by what they are; what is to be skipped is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What the sum of a structure may come to at most.

    Attributes:
        most: bytes or parameters.
        measure: adds up what layers come to, in the same unit.
        name: what is limited, with the limit: "a budget of 12.0 GiB".
        show: writes an amount for a reader.
    """

    most: int
    measure: Callable[[Sequence[LayerPlan]], int]
    name: str
    show: Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be shared out.

    Attributes:
        architecture: of the original.
        sizing: says what layers weigh.
        target: how small the result is to be; one that the allocator understands.
        passes: what will be done to each layer, with options.
        profile: what was measured; None where nothing was yet. An allocator that cannot do without then shares out
            evenly, which only serves to see whether the target can be met, and in how many bytes.
        find_weights: what finds the matrices that can be stored in fewer bits.
        damages: what the allocator's meter measured, by name and by what it is: for most what each matrix would cost in
            each type, nats a token, by pattern; None before that is measured.
        widths: what experts would cost at other widths, see `coterie.compress.width_prices`.
        shares: by the pattern of a matrix of a layer's experts, the share of each expert in what it costs; empty where
            the experts of a layer have their types together, as they do in a GGUF file.
    """

    architecture: Architecture
    sizing: Sizing
    target: Target
    passes: Sequence[tuple[str, Mapping[str, Any]]]
    profile: Profile | None = None
    find_weights: Callable[[], tuple[Weight, ...]] = tuple
    damages: Mapping[str, Mapping[str, float]] | None = None
    widths: WidthPrices = field(default_factory=dict)
    shares: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The matrices that can be stored in fewer bits."""
        return self.find_weights()

    def num_bytes(self, layers: Sequence[LayerPlan], types: Mapping[str, str]) -> int:
        """Return the bytes of all tensors when layers become what their plans say, and matrices get these types."""
        return self.sizing.num_bytes(layers) - bytes_saved(at_widths(self.weights, layers), types)

    def room(self, *, num_elements: int, beside: int) -> int:
        """Return the bytes that some matrices may take, by the budget or by bits a number, whichever the target is.

        Args:
            num_elements: numbers in the matrices.
            beside: bytes of all other tensors.
        """
        if self.target.budget is not None:
            return parse_bytes(self.target.budget) - beside
        assert self.target.bits is not None
        return int(num_elements * self.target.bits / 8)

    def option(self, name: str) -> Any:
        """Return an option of the first pass that has one of that name."""
        return next(options[name] for _, options in self.passes if name in options)

    def whole(self) -> tuple[LayerPlan, ...]:
        """Return the plans of layers that stay as they are."""
        return tuple(LayerPlan(num_experts=layer.num_experts) for layer in self.architecture.layers)

    def same_count(self, count: int) -> tuple[LayerPlan, ...]:
        """Return the plans of layers with so many experts each."""
        return tuple(LayerPlan(num_experts=count) for _ in self.architecture.layers)

    def same_width(self, width: int) -> tuple[LayerPlan, ...]:
        """Return the plans of layers that keep all experts, each with that width."""
        return tuple(LayerPlan(num_experts=layer.num_experts, width=width) for layer in self.architecture.layers)

    def full_width(self) -> int:
        """Return the width of the experts; raises Infeasible where layers differ in it."""
        widths = sorted({layer.width for layer in self.architecture.layers})
        if len(widths) > 1:
            raise Infeasible(f"the layers have experts of different widths ({widths}); slimming them is not supported")
        return widths[0]

    def multiples(self, values: Sequence[int], what: str) -> list[int]:
        """Return those of the feasible values that are multiples of what the target asks for.

        Raises:
            Infeasible: none is.
        """
        step = self.target.multiple_of or 1
        chosen = [value for value in values if value % step == 0]
        if not chosen:
            raise Infeasible(
                f"--multiple-of {step}: no {what} that this model can have is a multiple; possible are "
                f"{', '.join(map(str, values[-8:]))}"
            )
        return chosen

    @property
    def limit(self) -> Limit | None:
        """What the target allows in bytes or parameters; None where it says something else."""
        target = self.target
        if target.budget is not None:
            return self.byte_limit(parse_bytes(target.budget))
        if target.params is not None:
            most = parse_count(target.params)
            return Limit(
                most=most, measure=self.sizing.num_parameters, name=f"--params {format_count(most)}",
                show=_parameters,
            )  # fmt: skip
        if target.active_params is not None:
            most = parse_count(target.active_params)
            return Limit(
                most=most, measure=self._active, name=f"--active-params {format_count(most)}",
                show=lambda count: f"{_parameters(count)} a token",
            )  # fmt: skip
        return None

    def byte_limit(self, most: int) -> Limit:
        """Return the limit of so many bytes."""
        return Limit(
            most=most, measure=self.sizing.num_bytes, name=f"a budget of {format_bytes(most)}", show=format_bytes
        )

    def _active(self, layers: Sequence[LayerPlan]) -> int:
        return self.sizing.num_active(layers, [layer.top_k for layer in self.architecture.layers])

    def largest_within(self, options: Mapping[int, tuple[LayerPlan, ...]], limit: Limit, way: str, least: str) -> int:
        """Return the largest key whose layers come to no more than a limit.

        Args:
            options: layers by a number that grows with what they come to.
            limit: the most.
            way: what is done to meet it, for the message.
            least: what the smallest option is, with ``{}`` for its key.

        Raises:
            Infeasible: none does; says what the smallest takes.
        """
        fitting = [value for value, layers in options.items() if limit.measure(layers) <= limit.most]
        if not fitting:
            smallest = min(options)
            raise Infeasible(
                f"{limit.name} cannot be met by {way}: the least {least.format(smallest)}, takes "
                f"{limit.show(limit.measure(options[smallest]))}"
            )
        return max(fitting)


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """What an allocator decided.

    Attributes:
        layers: what each layer becomes, in order.
        num_bytes: bytes of all tensors of the result.
        damage: expected rise of the loss in nats a token; None where the allocator predicts none.
        types: GGML type of each matrix that is stored in blocks, by its pattern.
        gap: by which share of its own `damage` may exceed the least that is possible, 0 to 1; None where no such bound
            is known.
    """

    layers: tuple[LayerPlan, ...]
    num_bytes: int
    damage: float | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    gap: float | None = None


def load_allocator(name: str) -> Callable[[Problem], Allocation]:
    """Return an allocator by name; raises UnknownName."""
    if name not in ALLOCATORS:
        raise UnknownName("allocator", name, ALLOCATORS)
    function: Callable[[Problem], Allocation] = _load(ALLOCATORS[name].function)
    return function


def load_meter(name: str) -> Callable[..., Meter]:
    """Return what makes the meter of an allocator, of a stream, a source, batches of text and which tokens count.

    Raises:
        UnknownName: no such allocator.
        ValueError: one that measures nothing.
    """
    if name not in ALLOCATORS:
        raise UnknownName("allocator", name, ALLOCATORS)
    where = ALLOCATORS[name].meter
    if where is None:
        raise ValueError(f"the allocator {name} has no meter")
    make: Callable[..., Meter] = _load(where)
    return make


def _load(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(import_module(module), attribute)


def _parameters(count: int) -> str:
    return f"{format_count(count)} parameters"
