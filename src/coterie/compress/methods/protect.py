"""Name the super experts, which no later pass may drop.

A few experts of the early layers make the massive activations that attention sinks live on; a model without them
breaks down (2507.23279). The rule is that of REAP's code (2510.13999): an expert is one where its largest output
element exceeds both the 99.5th percentile over all experts of the model and a tenth of the largest of all, in the first
three quarters of the MoE layers.

Legend: E experts, L MoE layers of the model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.state import LayerState, Measured
from coterie.errors import Infeasible, InputError
from coterie.model.arch.layers import MoELayer

#: How long it takes, in times of running the token sample through all experts.
SAMPLE_RUNS = 0.0

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
    is_super_LE = peaks_LE > limit
    is_super_LE[int(len(peaks_LE) * SHARE_OF_LAYERS) :] = False
    return is_super_LE


def decide(layer: MoELayer, plan: LayerPlan, measured: Measured) -> LayerPlan:
    """Name this layer's super experts.

    Raises:
        InputError: not all layers were measured, so the largest activation of the model is not known.
        Infeasible: more super experts than experts that stay.
    """
    if measured.peaks_LE is None:
        raise InputError(f"{layer.block}: super experts are known when every layer of the model was measured")
    protected_E: Tensor = super_experts(measured.peaks_LE)[layer.index]
    most, share = int(protected_E.view(layer.num_groups, -1).sum(1).max()), plan.num_experts // layer.num_groups
    if most > share:
        where = "" if layer.num_groups == 1 else " of one router group"
        raise Infeasible(
            f"{layer.block}: {most} experts{where} are super experts, which +protect keeps, but only {share} may stay; "
            f"keep at least {most * layer.num_groups} experts a layer, or use the recipe without +protect"
        )
    return replace(plan, protected=tuple(protected_E.nonzero().flatten().tolist()))


def protect(state: LayerState, plan: LayerPlan) -> LayerState:
    """Set `protected_E` to the experts that the plan protects; changes no tensor."""
    protected_E = torch.zeros(state.layer.num_experts, dtype=torch.bool)
    protected_E[list(plan.protected)] = True
    notes = {**state.notes, "protect": {"super_experts": list(plan.protected)}}
    return replace(state, protected_E=protected_E, notes=notes)
