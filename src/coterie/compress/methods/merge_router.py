"""Give merged experts a router of M rows: the row of each cluster's centre.

The papers keep the router's E rows and point them at M experts; the routing weights of one cluster add up. Stock
loaders cannot express that (``--router map`` can), so the plain form needs M rows.

Legend: E experts of the original, M clusters.
"""

from __future__ import annotations

from dataclasses import replace

from coterie.compress.methods.select import slice_router
from coterie.compress.state import LayerSize, LayerState


def needs() -> tuple[str, ...]:
    """The centres are known from the clustering."""
    return ()


def merge_router(state: LayerState, size: LayerSize) -> LayerState:
    """Keep only the router rows (and biases) of the clusters' centres."""
    assert state.centres_M is not None, "merge-router comes after cluster"
    return replace(state, router=slice_router(state, state.centres_M))
