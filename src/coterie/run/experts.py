"""Compute routed experts whose weights come and go: what stands in their place in a model that is larger than memory.

The sum over a token's experts is in the order of their numbers, whatever arrives first and however many are there at
once, so that the same model computes the same bits with any memory.

Legend: T tokens, K chosen experts, D model width, F expert width, N tokens of one expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.model.arch.experts import Experts, canonical_experts
from coterie.model.arch.seam import rows_by_expert
from coterie.run.lookahead import Lookahead
from coterie.run.places import LayerPlaces
from coterie.run.residency import Lease, Leases, Residency
from coterie.run.restriction import Restriction


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """What is computed in the place of one experts module."""

    places: LayerPlaces
    template: Experts


class StreamedExperts:
    """The experts of a model, which are read when a token needs them.

    Attributes:
        counts_T: which tokens of the pass count; the others are padding, and choose no experts. None for all.
        num_chosen: experts that tokens have chosen so far, each as often as it was chosen; without those of guesses.
        restriction: while it is there, tokens pass with experts in memory alone, and nothing is read or counted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        places: Sequence[LayerPlaces],
        residency: Residency,
        *,
        num_slots: int,
        dtype: torch.dtype,
        check: Callable[[], None] | None = None,
        lookahead: Lookahead | None = None,
    ) -> None:
        """Look at the modules.

        Args:
            model: with its resident part; biases of experts are in it.
            places: where the matrices are.
            residency: what has them in memory.
            num_slots: how many it has room for.
            dtype: number format that is computed with.
            check: called before every layer; raises to end a generation.
            lookahead: reads ahead for the layer that comes next.
        """
        self._residency, self._num_slots, self._dtype, self._check = residency, num_slots, dtype, check
        self._lookahead = lookahead
        self.counts_T: Tensor | None = None
        self.num_chosen = 0
        self.restriction: Restriction | None = None
        self._layers = {
            id(module): _Layer(places=each, template=canonical_experts(module))
            for each in places
            for module in (model.get_submodule(each.layer.experts),)
        }

    @torch.no_grad()
    def compute(self, module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the routed output (T, D), summed in float32 or wider; see `coterie.model.arch.seam.install`."""
        if self._check is not None:
            self._check()
        layer = self._layers[id(module)]
        expert_map: Tensor | None = getattr(module, "coterie_expert_map", None)
        if expert_map is not None:  # of a mapped result: the router names experts of the original
            index_TK = expert_map[index_TK]
        if self.counts_T is not None and len(self.counts_T) == len(index_TK):
            index_TK = index_TK.masked_fill(~self.counts_T[:, None], len(layer.places.experts))
        if self.restriction is not None:
            index_TK, weight_TK = self.restriction.apply(layer.places.layer.index, hidden_TD, index_TK, weight_TK)
        total_TD = torch.zeros(hidden_TD.shape, dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        rows, top_k = rows_by_expert(index_TK, len(layer.places.experts)), index_TK.shape[-1]
        if self.restriction is None:
            self.num_chosen += sum(map(len, rows.values()))
        for leases in self._waves(layer.places.layer.index, list(rows)):
            if self._lookahead is not None and self.restriction is None:  # behind what this layer has just asked for
                self._lookahead.look(layer.places.layer.index, hidden_TD)
            weighted: dict[int, Tensor] = {}
            for lease in leases:  # those in memory first, then as they arrive
                token_N, slot_N = rows[lease.expert] // top_k, rows[lease.expert] % top_k
                output_ND = self._output(layer, lease, hidden_TD[token_N])
                weighted[lease.expert] = (output_ND * weight_TK[token_N, slot_N, None]).to(total_TD.dtype)
            leases.release()
            for expert in sorted(weighted):
                total_TD.index_add_(0, rows[expert] // top_k, weighted[expert])
        return total_TD.to(hidden_TD.dtype)

    def _waves(self, layer: int, experts: Sequence[int]) -> Iterator[Leases]:
        """Yield leases of experts, ascending; where they are too many, some at a time while the next ones are read."""
        if self.restriction is not None:
            with self._residency.peek(layer, experts) as leases:
                yield leases
            return
        size = len(experts) if len(experts) <= self._num_slots else max(1, self._num_slots // 2)
        waves = [experts[start : start + size] for start in range(0, len(experts), size)]
        asked: list[Leases] = []
        try:
            for number, wave in enumerate(waves):
                if not asked:
                    asked.append(self._residency.acquire(layer, wave))
                if number + 1 < len(waves) and 2 * size <= self._num_slots:
                    asked.append(self._residency.acquire(layer, waves[number + 1]))
                yield asked[0]
                asked.pop(0).release()
        finally:
            for leases in asked:
                leases.release()

    def _output(self, layer: _Layer, lease: Lease, input_ND: Tensor) -> Tensor:
        """Return f_e(x), (N, D), without the routing weight."""
        alone: dict[str, Any] = {  # a matrix is looked up by the number of its expert, as in a tensor of all
            field: {lease.expert: matrix} for field, matrix in self._matrices(layer.places, lease).items()
        }
        return replace(layer.template, **alone).output(lease.expert, input_ND)

    def _matrices(self, places: LayerPlaces, lease: Lease) -> Mapping[str, Tensor]:
        """Return the projections of an expert, by field."""
        matrices: dict[str, Tensor] = {}
        piece = 0
        for tensor in places.experts[lease.expert]:
            count = len(tensor.stored())
            stored = [lease.piece(number) for number in range(piece, piece + count)]
            matrices |= {field: matrix.to(self._dtype) for field, matrix in tensor.read(stored).items()}
            piece += count
        return matrices
