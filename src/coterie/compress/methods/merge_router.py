"""Give merged experts a router of M rows: a row of each cluster's centre, or the mean of its members' rows.

The papers keep the router's E rows and point them at M experts; the routing weights of one cluster add up. Stock
loaders cannot express that (``--router map`` can), so the plain forms need M rows.

Legend: E experts of the original, M clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.average import usage_shares, weighted_mean
from coterie.compress.methods.refit_router import measure_router
from coterie.compress.methods.select import slice_router
from coterie.compress.state import LayerState
from coterie.errors import UnknownName

#: How long it takes, in times of running the token sample through all experts.
SAMPLE_RUNS = 0.0

ROWS = ("centre", "mean", "best")


def needs(rows: str = "centre") -> tuple[str, ...]:
    """The centres are known from the clustering, a mean is weighted by usage; raises UnknownName."""
    if rows not in ROWS:
        raise UnknownName("rows of a merged router", rows, ROWS)
    return () if rows == "centre" else ("usage",)


def merge_router(state: LayerState, plan: LayerPlan, *, rows: str = "centre") -> LayerState:
    """Give the router one row (and bias) for each cluster.

    Args:
        state: a layer whose clusters are merged.
        plan: not read: the clusters say how many rows come out.
        rows: ``centre`` (the centre's row), ``mean`` (usage-weighted mean of the members' rows) or ``best`` (whichever
            gives the smaller error of the block's output on held-out tokens of the sample).

    Raises:
        UnknownName: no such rows.
        ArchitectureMismatch: ``best``, and the family's router cannot be run by itself.
    """
    needs(rows)
    assert state.centres_M is not None, "merge-router comes after cluster"
    centre = slice_router(state, state.centres_M)
    if rows == "centre" or len(state.centres_M) == state.layer.num_experts:
        return replace(state, router=centre)
    mean = _mean_rows(state, centre)
    if rows == "mean":
        return replace(state, router=mean)
    errors = {name: measure_router(state, router) for name, router in (("centre", centre), ("mean", mean))}
    chosen = "mean" if errors["mean"] < errors["centre"] else "centre"
    notes = {**state.notes, "merge-router": {"rows": chosen, "heldout_error": errors}}
    return replace(state, router=mean if chosen == "mean" else centre, notes=notes)


def _mean_rows(state: LayerState, centre: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the router's tensors with means in place of the centres' rows; tensors of whole numbers keep those."""
    assert state.clusters_E is not None
    share_ME = usage_shares(state.clusters_E, state.statistics["usage"])
    axes = dict(state.layer.router_tensors)
    merged = {}
    for name, tensor in state.router.items():
        rows = centre[name].clone()
        if tensor.is_floating_point():
            first = tensor.movedim(axes[name], 0)[: state.layer.num_experts]
            mean = weighted_mean(first.reshape(len(first), -1), share_ME).view(-1, *first.shape[1:])
            rows.narrow(axes[name], 0, len(mean)).copy_(mean.movedim(0, axes[name]))
        merged[name] = rows
    return merged
