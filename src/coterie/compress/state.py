"""LayerState: one layer's tensors in flight through the passes of a recipe.

A pass is a function ``(state, plan, **options) -> state``. It never changes tensors in place. Where statistics are
enough to choose, its file also holds ``decide(layer, plan, measured, **options) -> plan``, which is asked when the plan
is made; the pass then does what the plan says.

Legend: E experts of the original, M experts now, F expert width, D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from coterie.model.arch.experts import Experts
from coterie.model.arch.layers import MoELayer
from coterie.profile.profile import Sample

#: The family's own router with other router tensors: (router tensors by name, what the block receives (T, D)) ->
#: ``index_TK`` (int64, the number of rows means "no expert") and ``weight_TK`` (float32); `coterie.model.arch.reroute`.
Route = Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was measured of one layer, for whoever decides what becomes of it.

    Attributes:
        statistics: its statistics, summed over domains, float64.
        by_domain: the same with the domain axis first.
        peaks_LE: largest output element of each expert of each MoE layer of the model (L, E), float64; None where
            nobody asks for it, or where not all layers were measured.
    """

    statistics: Mapping[str, Tensor]
    by_domain: Mapping[str, Tensor]
    peaks_LE: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerState:
    """One layer between two passes.

    Attributes:
        layer: facts of the original layer.
        experts: the experts now, M of them, float32.
        router: the router's tensors now, by name in memory. With ``--router map`` they keep E rows to the end.
        expert_map_E: for each original expert the expert that stands for it now, -1 when it was dropped, int64.
        statistics: this layer's statistics, summed over domains, float64.
        by_domain: the same with the domain axis first.
        sample: the token sample of the original layer.
        original: the original experts, E of them.
        original_router: the router's tensors as they were.
        route: the family's own router with other router tensors; ask it for `sample.router_inputs_TD`.
        seed: seed of everything random in a pass.
        protected_E: experts that no pass may drop, bool; None where there are none.
        clusters_E: cluster of each expert, set by a clustering pass and consumed by the averaging pass; int64.
        centres_M: the expert that each cluster is centred on, in the order of the clusters; int64.
        notes: what passes have to say about this layer, by pass; goes into the manifest and the report.
    """

    layer: MoELayer
    experts: Experts
    router: Mapping[str, Tensor]
    expert_map_E: Tensor
    statistics: Mapping[str, Tensor]
    by_domain: Mapping[str, Tensor]
    sample: Sample
    original: Experts
    original_router: Mapping[str, Tensor]
    route: Route
    seed: int = 0
    protected_E: Tensor | None = None
    clusters_E: Tensor | None = None
    centres_M: Tensor | None = None
    notes: Mapping[str, object] = field(default_factory=dict)

    def routing(self) -> tuple[Tensor, Tensor]:
        """Return ``index_TK`` and ``weight_TK`` of the sample's tokens with the router as it is now."""
        if self.router is self.original_router:
            return self.sample.index_TK, self.sample.weight_TK
        return self.route(self.router, self.sample.router_inputs_TD)
