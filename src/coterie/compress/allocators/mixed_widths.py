"""The width of every expert and the types of its matrices, so that the expected rise of the loss is least.

Each expert is one item of the knapsack: for each of some widths (`coterie.compress.width_prices`) the types of its
projections. What types cost falls with the width, by the share of what the expert's neurons would cost that is left: of
a down projection that is what its columns weigh, and gate and up are taken to be like it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from coterie.compress.allocators import mixed_types
from coterie.compress.allocators.knapsack import Option, choose_within, gap_of, lower_hull
from coterie.compress.allocators.mixed_types import GAP, options_of, room_of, too_small
from coterie.compress.allocators.problem import Allocation, Problem
from coterie.compress.layer_plan import LayerPlan, ragged_plan
from coterie.compress.weights import Weight, at_widths, gathered, smallest_types
from coterie.compress.width_prices import curves_of, priced_widths
from coterie.errors import Infeasible
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.encodings.ggml import WRAPPED

#: How many times as much as its neurons one by one an expert costs that loses all of them: what they put out is meant
#: to add up, and no other neuron of it can make that good. On the bundled models some ten times as much beside what
#: types cost, by a fit of what results lost to what they were expected to lose; at less, too many experts went.
GONE = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What an option of an item stands for.

    Attributes:
        types: of the item's matrices, in their order.
        width: of the expert, where the item is one.
    """

    types: tuple[str, ...]
    width: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """Something that gets bytes.

    Attributes:
        names: its matrices, as types name them.
        options: what it can become.
        choices: what each option stands for.
    """

    names: tuple[str, ...]
    options: Sequence[Option]
    choices: Sequence[Choice]


def allocate(problem: Problem) -> Allocation:
    """Choose widths and types, or types alone where experts cannot have widths of their own.

    Before anything was measured it is types alone or, where these take too much, one width.

    Raises:
        Infeasible: a budget below the smallest result; says what that takes.
    """
    if problem.damages is None:
        return _outline(problem)
    layers = problem.architecture.layers
    if not all(_can_narrow(problem, layer) for layer in layers):
        return mixed_types.allocate(problem)
    weights = [weight for weight in problem.weights if problem.damages.get(weight.pattern)]
    rest = problem.num_bytes(problem.whole(), {}) - sum(weight.plain_bytes for weight in weights)
    items: list[Item] = []
    for weight in weights:
        if weight.layer is None:
            options = options_of(weight, problem.damages[weight.pattern])
            choices = [Choice(types=(option.name,)) for option in options]
            items.append(Item(names=(weight.pattern,), options=options, choices=choices))
    for layer in layers:
        items += _experts(problem, layer, [weight for weight in weights if weight.layer == layer.index])
    sets = [item.options for item in items]
    room = room_of(problem, weights, rest)
    chosen = choose_within(sets, room, GAP)
    if chosen is None:
        raise too_small(problem, weights, rest, sum(min(each.num_bytes for each in item.options) for item in items))
    taken = [
        item.choices[next(number for number, option in enumerate(item.options) if option is each)]
        for item, each in zip(items, chosen, strict=True)
    ]
    types = {
        name: kind
        for item, choice in zip(items, taken, strict=True)
        for name, kind in zip(item.names, choice.types, strict=True)
    }
    types = gathered(weights, types)
    plans = _plans(problem, [choice.width for choice in taken if choice.width is not None])
    return Allocation(
        layers=plans, num_bytes=problem.num_bytes(plans, types), damage=sum(option.damage for option in chosen),
        types=types, gap=gap_of(sets, chosen, room),
    )  # fmt: skip


def _plans(problem: Problem, widths: Sequence[int]) -> tuple[LayerPlan, ...]:
    """Return the plans of layers, of the widths of all experts; where none is narrower, those of whole ones."""
    layers = problem.architecture.layers
    each = iter(widths)
    by_layer = [tuple(next(each) for _ in range(layer.num_experts)) for layer in layers]
    if all(set(of_layer) == {layer.width} for of_layer, layer in zip(by_layer, layers, strict=True)):
        return problem.whole()
    return tuple(ragged_plan(of_layer) for of_layer in by_layer)


def _can_narrow(problem: Problem, layer: MoELayer) -> bool:
    """Tell whether experts of a layer can have widths of their own, and what these cost is known."""
    own = [weight for weight in problem.weights if weight.layer == layer.index]
    known = all(weight.width_axis is not None and weight.pattern in problem.shares for weight in own)
    return bool(own) and known and bool(curves_of(problem.widths, layer.experts, layer.num_experts, layer.width))


def _experts(problem: Problem, layer: MoELayer, weights: Sequence[Weight]) -> list[Item]:
    """Return the items of a layer's experts; the one whose neurons would cost most does not lose all of them."""
    assert problem.damages is not None
    # The types of a matrix that are worth taking at each width, with what they cost all whole experts together.
    hulls = {
        width: [_types_at(weight, problem.damages[weight.pattern], width) for weight in weights]
        for width in priced_widths(layer.width)[1:]
    }
    places = [weight.experts.index for weight in weights]
    curves = curves_of(problem.widths, layer.experts, layer.num_experts, layer.width)
    stays = max(range(len(curves)), key=lambda expert: curves[expert][0])
    smallest = tuple(hull[0].name for hull in hulls[priced_widths(layer.width)[1]] if hull)
    items = []
    for expert, cost in enumerate(curves):
        number = [place(expert) for place in places]
        shares = [problem.shares[weight.pattern][each] for weight, each in zip(weights, number, strict=True)]
        pairs: list[tuple[Option, Choice]] = []
        if expert != stays and len(smallest) == len(weights):
            nothing = Option(name="no neurons", num_bytes=0, damage=GONE * cost[0])
            pairs.append((nothing, Choice(types=smallest, width=0)))
        for width, hulls_here in hulls.items():
            left = max(0.0, 1 - cost[width] / cost[0]) if cost[0] > 0 else 1.0
            pairs += _at_width(hulls_here, [share * left for share in shares], width, cost[width])
        pairs.sort(key=lambda pair: (pair[0].num_bytes, pair[0].damage))
        best, kept = float("inf"), []
        for option, choice in pairs:  # what costs no less than something smaller is never taken
            if option.damage < best:
                best = option.damage
                kept.append((option, choice))
        names = tuple(weight.names[each] for weight, each in zip(weights, number, strict=True))
        items.append(Item(names=names, options=[each for each, _ in kept], choices=[each for _, each in kept]))
    return items


def _types_at(weight: Weight, damages: Mapping[str, float], width: int) -> list[Option]:
    """Return the types that pay for the matrix of one expert at a width, small to large; blocks run on where needed."""
    one = weight.only(weight.names[:1])
    [narrow] = replace(one, widths=(width,)).by_width()
    options: dict[str, Option] = {}
    for kind, damage in damages.items():
        ways = (kind,) if kind.endswith(WRAPPED) else (kind, kind + WRAPPED)
        name = next((way for way in ways if narrow.holds(way)), None)
        if name is not None and name not in options:
            options[name] = Option(name=name, num_bytes=narrow.num_bytes(name), damage=damage)
    return lower_hull(options.values())


def _at_width(
    hulls: Sequence[Sequence[Option]], shares: Sequence[float], width: int, cost: float
) -> list[tuple[Option, Choice]]:
    """Return what an expert can become at a width, the types of its matrices by what they save a byte.

    Args:
        hulls: of each matrix the types that pay, see `_types_at`.
        shares: what of their cost is this expert's.
        width: the width.
        cost: what the neurons that go cost.
    """
    if not all(hulls):
        return []
    # The hull of sums: from the smallest types on, the step that takes off most a byte is taken next.
    steps = sorted(
        (share * (after.damage - before.damage) / (after.num_bytes - before.num_bytes), place, number + 1)
        for place, (hull, share) in enumerate(zip(hulls, shares, strict=True))
        for number, (before, after) in enumerate(pairwise(hull))
    )
    now = [0] * len(hulls)
    pairs = []
    for _, place, number in [(0.0, 0, 0), *steps]:
        now[place] = number
        chosen = [hull[each] for hull, each in zip(hulls, now, strict=True)]
        damage = cost + sum(share * each.damage for share, each in zip(shares, chosen, strict=True))
        num_bytes = sum(each.num_bytes for each in chosen)
        types = tuple(each.name for each in chosen)
        option = Option(name=f"{width} neurons in {'/'.join(types)}", num_bytes=num_bytes, damage=damage)
        pairs.append((option, Choice(types=types, width=width)))
    return pairs


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
