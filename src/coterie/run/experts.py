"""Compute routed experts whose weights come and go: what stands in their place in a model that is larger than memory.

The sum over a token's experts is in the order of their numbers, whatever arrives first and however many are there at
once, so that the same model computes the same bits with any memory.

Legend: T tokens, K chosen experts, D model width, F expert width, N tokens of one expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.model.arch.experts import Experts, canonical_experts
from coterie.model.arch.seam import rows_by_expert
from coterie.run.leases import Lease, Leases
from coterie.run.lookahead import Lookahead
from coterie.run.places import PROJECTIONS, ExpertTensor, LayerPlaces
from coterie.run.residency import Residency
from coterie.run.restriction import Restriction


class _Layer:
    """What is computed in the place of one experts module.

    Attributes:
        places: where its experts lie.
        alone: its experts in canonical form, whose matrices are looked up by the number of the one that is computed.
    """

    def __init__(self, places: LayerPlaces, template: Experts) -> None:
        """Know an experts module by its canonical form."""
        self.places = places
        fields: dict[str, Any] = {field: {} for field in PROJECTIONS if getattr(template, field) is not None}
        self.alone = replace(template, **fields)
        self._pieces: dict[int, list[tuple[ExpertTensor, int]]] = {}

    def pieces(self, expert: int) -> list[tuple[ExpertTensor, int]]:
        """Return the tensors that hold an expert's matrices, and of how many pieces of its record each is."""
        if expert not in self._pieces:
            self._pieces[expert] = [(each, len(each.stored())) for each in self.places.experts[expert]]
        return self._pieces[expert]


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
            id(module): _Layer(each, canonical_experts(module))
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
        index, num_experts, (num_tokens, top_k) = layer.places.layer.index, len(layer.places.experts), index_TK.shape
        rows: dict[
            int, tuple[Any, Any]
        ]  # for each chosen expert, ascending: its tokens, and in which place they have it
        if num_tokens == 1:
            order = sorted((expert, slot) for slot, expert in enumerate(index_TK[0].tolist()) if expert < num_experts)
            rows = {expert: (slice(None), slice(slot, slot + 1)) for expert, slot in order}
        else:
            rows = {
                expert: (each // top_k, (each % top_k)[:, None])
                for expert, each in rows_by_expert(index_TK, num_experts).items()
            }
        is_guess = self.restriction is not None
        if not is_guess:
            self.num_chosen += int((index_TK < num_experts).sum())
        if not is_guess and (num_tokens > 1 or len(rows) > self._num_slots):
            tokens = [[0] if num_tokens == 1 else token_N.tolist() for token_N, _ in rows.values()]
            self._residency.announce(index, list(rows), tokens, num_tokens)
        weighted: dict[int, Tensor] = {}
        for leases in self._waves(index, list(rows)):
            if self._lookahead is not None and not is_guess:  # behind what this layer has just asked for
                self._lookahead.look(index, hidden_TD)
            for lease in leases:  # those in memory first, then as they arrive
                token_N, slot_N1 = rows[lease.expert]
                output_ND = self._output(layer, lease, hidden_TD[token_N])
                weight_N1 = weight_TK[:, slot_N1] if num_tokens == 1 else weight_TK[token_N[:, None], slot_N1]
                weighted[lease.expert] = (output_ND * weight_N1).to(total_TD.dtype)
            leases.release()
        for expert in sorted(weighted):
            if num_tokens == 1:
                total_TD += weighted[expert]
            else:
                total_TD.index_add_(0, rows[expert][0], weighted[expert])
        return total_TD.to(hidden_TD.dtype)

    def _waves(self, layer: int, experts: Sequence[int]) -> Iterator[Leases]:
        """Yield leases of experts; where they are too many, some at a time while the next ones are read."""
        if self.restriction is not None:
            with self._residency.peek(layer, experts) as leases:
                yield leases
            return
        waves = self._residency.waves(layer, experts)
        asked: list[Leases] = []
        try:
            for number, wave in enumerate(waves):
                if not asked:
                    asked.append(self._residency.acquire(layer, wave))
                if number + 1 < len(waves) and 2 * len(wave) <= self._num_slots:
                    asked.append(self._residency.acquire(layer, waves[number + 1]))
                yield asked[0]
                asked.pop(0).release()
        finally:
            for leases in asked:
                leases.release()

    def _output(self, layer: _Layer, lease: Lease, input_ND: Tensor) -> Tensor:
        """Return f_e(x), (N, D), without the routing weight."""
        matrices = self._matrices(layer, lease)
        alone = layer.alone
        for field, matrix in matrices.items():
            getattr(alone, field)[lease.expert] = matrix
        try:
            return alone.output(lease.expert, input_ND)
        finally:
            for field in matrices:  # memory of the arena is not to be kept
                del getattr(alone, field)[lease.expert]

    def _matrices(self, layer: _Layer, lease: Lease) -> Mapping[str, Tensor]:
        """Return the projections of an expert, by field."""
        matrices: dict[str, Tensor] = {}
        piece = 0
        for tensor, count in layer.pieces(lease.expert):
            stored = [lease.piece(number) for number in range(piece, piece + count)]
            for field, matrix in tensor.read(stored).items():
                matrices[field] = matrix if matrix.dtype == self._dtype else matrix.to(self._dtype)
            piece += count
        return matrices
