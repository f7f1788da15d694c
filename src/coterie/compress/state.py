"""LayerState: one layer's tensors in flight through the passes of a recipe.

A pass is a function ``(state, size, **options) -> state``. It never changes tensors in place.

Legend: E experts of the original, M experts now, F expert width, D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from coterie.model.layers import Experts, MoELayer
from coterie.profile.profile import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSize:
    """What one layer gets. None leaves that property as it is."""

    num_experts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerState:
    """One layer between two passes.

    Attributes:
        layer: facts of the original layer.
        experts: the experts now, M of them, float32.
        router: the router's tensors now, by name in memory. With ``--router map`` they keep E rows to the end.
        expert_map_E: for each original expert the expert that stands for it now, -1 when it was dropped, int64.
        statistics: this layer's statistics, summed over domains with their weights, float64.
        sample: the token sample of the original layer.
        original: the original experts, E of them.
        clusters_E: cluster of each expert, set by a clustering pass and consumed by the averaging pass; int64.
        centres_M: the expert that each cluster is centred on, in the order of the clusters; int64.
        notes: what passes have to say about this layer, by pass; goes into the manifest and the report.
    """

    layer: MoELayer
    experts: Experts
    router: Mapping[str, Tensor]
    expert_map_E: Tensor
    statistics: Mapping[str, Tensor]
    sample: Sample
    original: Experts
    clusters_E: Tensor | None = None
    centres_M: Tensor | None = None
    notes: Mapping[str, object] = field(default_factory=dict)
