"""The width of every expert and the types of its matrices, so that the expected rise of the loss is least.

A layer's experts are one item of the knapsack: for each of some widths (`coterie.compress.width_prices`) the types of
their projections. What types cost falls with the widths, by the share of what all neurons would cost that is left: of a
down projection that is what its columns weigh, and gate and up are taken to be like it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from coterie.compress.allocators import mixed_types
from coterie.compress.allocators.knapsack import Option, choose_within, gap_of, lower_hull
from coterie.compress.allocators.mixed_types import GAP, options_of, room_of, too_small
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.layer_plan import LayerPlan, ragged_plan
from coterie.compress.weights import Weight, at_widths, smallest_types
from coterie.compress.width_prices import Narrowing, narrowings, priced_widths
from coterie.errors import Infeasible
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.encodings.ggml import WRAPPED


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What an option of an item stands for: types by pattern, and widths where it is a layer's."""

    types: dict[str, str]
    widths: tuple[int, ...] | None = None


def allocate(problem: Problem) -> Allocation:
    """Choose widths and types, or types alone where experts cannot have widths of their own.

    Before anything was measured it is types alone or, where these take too much, one width.

    Raises:
        Infeasible: a budget below the smallest result; says what that takes.
    """
    if problem.damages is None:
        return _outline(problem)
    layers = problem.architecture.layers
    narrower = {layer.index: _narrowings(problem, layer) for layer in layers}
    if not all(narrower.values()):
        return mixed_types.allocate(problem)
    weights = [weight for weight in problem.weights if problem.damages.get(weight.pattern)]
    rest = problem.num_bytes(problem.whole(), {}) - sum(weight.plain_bytes for weight in weights)
    items: list[list[Option]] = []
    choices: list[list[Choice]] = []
    for weight in weights:
        if weight.layer is not None:
            continue
        options = options_of(weight, problem.damages[weight.pattern])
        items.append(options)
        choices.append([Choice(types={weight.pattern: option.name}) for option in options])
    for layer in layers:
        of_layer = [weight for weight in weights if weight.layer == layer.index]
        layer_options, layer_choices = _layer_options(problem, of_layer, narrower[layer.index])
        items.append(layer_options)
        choices.append(layer_choices)
    room = room_of(problem, weights, rest)
    chosen = choose_within(items, room, GAP)
    if chosen is None:
        raise too_small(problem, weights, rest, sum(min(each.num_bytes for each in options) for options in items))
    taken = [
        of_item[next(number for number, option in enumerate(options) if option is each)]
        for options, of_item, each in zip(items, choices, chosen, strict=True)
    ]
    types = {pattern: kind for choice in taken for pattern, kind in choice.types.items()}
    plans = _plans(problem, [choice.widths for choice in taken if choice.widths is not None])
    return Allocation(
        layers=plans, num_bytes=problem.num_bytes(plans, types), damage=sum(option.damage for option in chosen),
        types=types, gap=gap_of(items, chosen, room),
    )  # fmt: skip


def _plans(problem: Problem, widths: Sequence[tuple[int, ...]]) -> tuple[LayerPlan, ...]:
    """Return the plans of layers; where no expert of any layer is narrower, those of whole ones."""
    layers = problem.architecture.layers
    if all(set(each) == {layer.width} for each, layer in zip(widths, layers, strict=True)):
        return problem.whole()
    return tuple(ragged_plan(each) for each in widths)


def _narrowings(problem: Problem, layer: MoELayer) -> tuple[Narrowing, ...]:
    """Return what a layer can become; nothing where its experts cannot have widths of their own."""
    assert problem.damages is not None
    own = [weight for weight in problem.weights if weight.layer == layer.index]
    if not own or any(weight.width_axis is None or not problem.damages.get(weight.pattern) for weight in own):
        return ()
    return narrowings(problem.widths, layer.experts, layer.num_experts, layer.width)


def _layer_options(
    problem: Problem, weights: Sequence[Weight], narrower: Sequence[Narrowing]
) -> tuple[list[Option], list[Choice]]:
    """Return what a layer's experts can become, and what that stands for; of each width the types that pay."""
    assert problem.damages is not None
    pairs: list[tuple[Option, Choice]] = []
    for narrowing in narrower:
        hulls = []
        for weight in weights:
            options = _at_widths(weight, problem.damages[weight.pattern], narrowing)
            hulls.append([(weight.pattern, option) for option in lower_hull(options)])
        if not all(hulls):
            continue
        # The hull of sums: from the smallest types on, the step that takes off most a byte is taken next.
        now = {pattern: option for (pattern, option), *_ in hulls}
        steps = [
            (_slope(before, after), pattern, after)
            for hull in hulls
            for (pattern, before), (_, after) in pairwise(hull)
        ]
        for _, pattern, option in [(0.0, *hulls[0][0]), *sorted(steps, key=lambda step: step[0])]:
            now[pattern] = option
            total = Option(
                name=f"{sum(narrowing.widths)} neurons in {'/'.join(each.name for each in now.values())}",
                num_bytes=sum(each.num_bytes for each in now.values()),
                damage=narrowing.cost + sum(each.damage for each in now.values()),
            )
            types = {each: of_it.name for each, of_it in now.items()}
            pairs.append((total, Choice(types=types, widths=narrowing.widths)))
    pairs.sort(key=lambda pair: (pair[0].num_bytes, pair[0].damage))
    best, kept = float("inf"), []
    for option, choice in pairs:  # what costs no less than something smaller is never taken
        if option.damage < best:
            best = option.damage
            kept.append((option, choice))
    return [option for option, _ in kept], [choice for _, choice in kept]


def _slope(before: Option, after: Option) -> float:
    return (after.damage - before.damage) / (after.num_bytes - before.num_bytes)


def _at_widths(weight: Weight, damages: Mapping[str, float], narrowing: Narrowing) -> list[Option]:
    """Return what the types of a layer's matrices take and cost at some widths; blocks run on where rows need it."""
    narrow = weight.at_widths(narrowing.widths).by_width()
    options: dict[str, Option] = {}
    for kind, damage in damages.items():
        ways = (kind,) if kind.endswith(WRAPPED) else (kind, kind + WRAPPED)
        name = next((way for way in ways if all(one.holds(way) for one in narrow)), None)
        if name is not None and name not in options:
            num_bytes = sum(one.num_bytes(name) for one in narrow)
            options[name] = Option(name=name, num_bytes=num_bytes, damage=damage * narrowing.mass)
    return list(options.values())


def _outline(problem: Problem) -> Allocation:
    """Say what can be said from headers alone: types as for `mixed-types`, or the smallest at one width that fits."""
    try:
        return mixed_types.allocate(problem)
    except Infeasible as error:
        layers = problem.architecture.layers
        own = [weight for weight in problem.weights if weight.kind == "expert"]
        if any(weight.width_axis is None for weight in own) or len({layer.width for layer in layers}) > 1:
            raise
        for width in sorted(priced_widths(layers[0].width)[1:-1], reverse=True):
            plans = tuple(ragged_plan((width,) * layer.num_experts) for layer in layers)
            narrow = [each for weight in at_widths(problem.weights, plans) for each in weight.by_width()]
            types = smallest_types(narrow)
            if not types.keys() >= {weight.pattern for weight in own}:
                continue
            typed = [each for each in narrow if each.pattern in types]
            taken = sum(each.num_bytes(types[each.pattern]) for each in typed)
            allocation = Allocation(layers=plans, num_bytes=problem.num_bytes(plans, types), types=types)
            weights = [weight for weight in problem.weights if weight.pattern in types]
            if taken <= room_of(problem, weights, allocation.num_bytes - taken):
                return allocation
        raise error
