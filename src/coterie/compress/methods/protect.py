"""Name the super experts, which no later pass may drop.

A few experts of the early layers make the massive activations that attention sinks live on; a model without them
breaks down (2507.23279). The rule is that of REAP's code (2510.13999): an expert is one where its largest output
element exceeds both the 99.5th percentile over all experts of the model and a tenth of the largest of all, in the first
three quarters of the MoE layers.

Legend: E experts, L MoE layers of the model.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from coterie.compress.state import LayerSize, LayerState
from coterie.errors import Infeasible, InputError

QUANTILE = 0.995
SHARE_OF_LARGEST = 0.1
SHARE_OF_LAYERS = 0.75


def needs() -> tuple[str, ...]:
    """The largest output element of each expert."""
    return ("output_peak",)


def super_experts(peaks_LE: Tensor) -> Tensor:
    """Return which experts are super experts, (L, E) bool.

    Args:
        peaks_LE: largest absolute output element of each expert of each MoE layer.
    """
    limit = max(float(peaks_LE.flatten().quantile(QUANTILE)), float(peaks_LE.max()) * SHARE_OF_LARGEST)
    found_LE = peaks_LE > limit
    found_LE[int(len(peaks_LE) * SHARE_OF_LAYERS) :] = False
    return found_LE


def protect(state: LayerState, size: LayerSize) -> LayerState:
    """Set `protected_E` to this layer's super experts; changes no tensor.

    Raises:
        InputError: not all layers were measured, so the largest activation of the model is not known.
        Infeasible: more super experts than experts that stay.
    """
    layer = state.layer
    if state.peaks_LE is None:
        raise InputError(f"{layer.block}: super experts are known when every layer of the model was measured")
    protected_E: Tensor = super_experts(state.peaks_LE)[layer.index]
    most, share = int(protected_E.view(layer.num_groups, -1).sum(1).max()), size.num_experts // layer.num_groups
    if most > share:
        where = "" if layer.num_groups == 1 else " of one router group"
        raise Infeasible(
            f"{layer.block}: {most} experts{where} are super experts, which +protect keeps, but only {share} may stay; "
            f"keep at least {most * layer.num_groups} experts a layer, or use the recipe without +protect"
        )
    notes = {**state.notes, "protect": {"super_experts": protected_E.nonzero().flatten().tolist()}}
    return replace(state, protected_E=protected_E, notes=notes)
