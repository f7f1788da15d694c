"""What narrower experts would cost, measured by expert and width. No torch here.

A hidden neuron of which nothing is left is a column of the down projection that becomes zero, so its cost is that of an
error of the column itself (`coterie.compress.damages`). Experts lose the neurons that cost them least.

Legend: F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from coterie.model.disk.encodings.ggml import GRAIN

#: Widths of an expert that are priced beside none, at most.
STEPS = 8

#: By expert, see `expert_name`, and by its width in neurons: the rise of the loss in nats a token.
WidthPrices = Mapping[str, Mapping[str, float]]


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


def curves_of(prices: WidthPrices, experts: str, num_experts: int, full: int) -> list[dict[int, float]]:
    """Return what each expert of a layer costs at each width; nothing where widths are not priced.

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
        return []
    mean = {width: math.fsum(each[str(width)] for each in priced) / len(priced) for width in widths}
    return [mean if each is None else {width: each[str(width)] for width in widths} for each in own]
