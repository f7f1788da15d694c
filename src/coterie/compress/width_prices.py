"""What narrower experts would cost: measured by expert and width, and put together layer by layer. No torch here.

A hidden neuron of which nothing is left is a column of the down projection that becomes zero, so its cost is that of an
error of the column itself (`coterie.compress.damages`). Experts lose the neurons that cost them least.

Legend: E experts, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from coterie.model.disk.encodings.ggml import GRAIN

#: Widths of an expert that are priced beside none, at most.
STEPS = 8

#: Parts of a layer's neurons that go one after another, down to the least width of all experts.
PARTS = 16

#: By expert, see `expert_name`, and by its width in neurons: the rise of the loss in nats a token.
WidthPrices = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Narrowing:
    """Narrower experts of a layer.

    Attributes:
        widths: of each expert (E entries).
        cost: the rise of the loss in nats a token.
        mass: the share of what all neurons together would cost that is left; what types cost falls with it.
    """

    widths: tuple[int, ...]
    cost: float
    mass: float


def expert_name(experts: str, expert: int) -> str:
    """Return the name of an expert among prices, of its module's and its number."""
    return f"{experts}.{expert}"


def priced_widths(full: int) -> tuple[int, ...]:
    """Return the widths that are priced, from 0 to the full one; none where blocks do not have that."""
    if full % GRAIN or full <= GRAIN:
        return ()
    step = GRAIN * math.ceil(full / (STEPS * GRAIN))
    return (*range(0, full, step), full)


def by_width(cost_F: Sequence[float]) -> dict[str, float]:
    """Return what an expert costs at each width that is priced, of what each of its neurons costs."""
    gone = [0.0, *accumulate(sorted(cost_F))]
    return {str(width): gone[len(cost_F) - width] for width in priced_widths(len(cost_F))}


def narrowings(prices: WidthPrices, experts: str, num_experts: int, full: int) -> tuple[Narrowing, ...]:
    """Return what a layer can become, from whole to as narrow as it gets: of all neurons the cheapest go first.

    An expert that no token chose has no price: it is taken for one like the mean of the others.

    Args:
        prices: what was measured.
        experts: name of the module of the layer's experts.
        num_experts: how many there are.
        full: their width.
    """
    widths = priced_widths(full)
    own = [prices.get(expert_name(experts, expert)) for expert in range(num_experts)]
    priced = [each for each in own if each is not None]
    if not widths or not priced:
        return ()
    mean = {str(width): math.fsum(each[str(width)] for each in priced) / len(priced) for width in widths}
    curves = [mean if each is None else each for each in own]
    # What each neuron of a step costs, by expert; an expert's own steps come from wide to narrow, as they cost more.
    steps = sorted(
        ((curve[str(narrow)] - curve[str(wide)]) / (wide - narrow), -wide, expert, narrow)
        for expert, curve in enumerate(curves)
        for narrow, wide in pairwise(widths[1:])
    )
    whole = math.fsum(curve["0"] for curve in curves)
    now = [full] * num_experts
    narrower: list[Narrowing] = []
    limits = [num_experts * full * (PARTS - part) // PARTS for part in range(PARTS + 1)]
    for _, _, expert, narrow in [*steps, (0.0, 0, 0, full)]:
        if limits and sum(now) <= limits[0]:
            limits = [limit for limit in limits if limit < sum(now)]
            cost = math.fsum(curve[str(width)] for curve, width in zip(curves, now, strict=True))
            mass = max(0.0, 1 - cost / whole) if whole > 0 else 1.0
            narrower.append(Narrowing(widths=tuple(now), cost=cost, mass=mass))
        now[expert] = min(now[expert], narrow)
    return tuple(narrower)
