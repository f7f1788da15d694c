"""Adds up what is measured of one layer, batch by batch, and keeps its token sample.

Legend: E experts, D model width, T tokens, K chosen experts, G domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from coterie.model.arch.layers import MoELayer
from coterie.profile.calibration import TokenSet
from coterie.profile.observation import Observation
from coterie.profile.places import chosen_places, lowest
from coterie.profile.profile import Sample
from coterie.profile.statistics import MATRICES, MAXIMA, load_matrix, load_statistic, shape_of
from coterie.profile.sums import ELEMENT_BYTES, BinnedSum, Totals

#: Bytes for each element of the largest sum by domain that are needed while a batch is added to it.
_ADDING_BYTES = 128


def statistics_bytes(layer: MoELayer, names: Iterable[str], num_domains: int) -> int:
    """Return the memory that measuring statistics of one layer takes, in bytes; without what a batch itself takes.

    Args:
        layer: which one.
        names: of the statistics.
        num_domains: G.
    """
    total = adding = 0
    for name in names:
        elements = math.prod(shape_of(name, layer))
        if name in MATRICES:
            total += 4 * elements
        elif name in MAXIMA:
            total += 8 * num_domains * elements
        else:
            total += ELEMENT_BYTES * num_domains * elements
            adding = max(adding, _ADDING_BYTES * elements)
    return total + adding


class Collector:
    """Adds up the statistics of one layer and keeps its token sample."""

    def __init__(self, token_set: TokenSet, names: Sequence[str], *, seed: int, sample_tokens: int) -> None:
        self._sums: dict[str, BinnedSum] = {}
        self._tensors: dict[str, Tensor] = {}
        self._functions = {name: load_statistic(name) for name in names if name not in MATRICES}
        self._matrices = {name: load_matrix(name) for name in names if name in MATRICES}
        self._num_domains = len(token_set.domains)
        self._seen = [0] * self._num_domains
        self._counts = token_set.share_out(sample_tokens)
        # The same places in every layer.
        self._places = [
            chosen_places(
                name,
                ids_NS,
                count=count,
                seed=seed,
                counts_NS=None if token_set.counts is None else token_set.counts[name],
            )
            for (name, ids_NS), count in zip(token_set.sequences.items(), self._counts, strict=True)
        ]
        self._rows: list[dict[str, Tensor]] = []

    def add(
        self,
        domain: int,
        observation: Observation,
        *,
        target_TD: Tensor | None = None,
        counts_T: Tensor | None = None,
    ) -> None:
        """Add one batch of one domain.

        Args:
            domain: which one.
            observation: the batch.
            target_TD: what the sample keeps as the routed output, where that is not the observation's own.
            counts_T: which of the tokens count, bool; None for all. The batch was observed with the same.
        """
        if counts_T is not None:
            observation = observation.select(counts_T)
            target_TD = None if target_TD is None else target_TD[counts_T.to(target_TD.device)]
        for name, function in list(self._functions.items()):
            value = function(observation)
            if value is None:  # a sum over some of the batches would look like one over all
                for values in (self._functions, self._sums, self._tensors):
                    values.pop(name, None)
                continue
            value = value.cpu()
            if name in MAXIMA:
                if name not in self._tensors:
                    self._tensors[name] = value.new_zeros(self._num_domains, *value.shape)
                largest = self._tensors[name]
                largest[domain] = largest[domain].maximum(value)
            else:
                if name not in self._sums:
                    self._sums[name] = BinnedSum.zeros(self._num_domains, *value.shape)
                sums = self._sums[name]
                new = sums[domain].plus(value)
                sums.digits_K[:, domain], sums.place[domain] = new.digits_K, new.place
        for name, add in self._matrices.items():
            if name not in self._tensors:
                shape = shape_of(name, observation.layer)
                self._tensors[name] = torch.zeros(shape, dtype=torch.float32, device=observation.hidden_TD.device)
            add(observation, self._tensors[name])
        self._keep_sample(domain, observation, observation.output_TD if target_TD is None else target_TD)

    @property
    def statistics(self) -> Totals:
        """Sums so far, on the CPU. A value that one batch could not show is left out."""
        totals = self._sums | {name: tensor.cpu() for name, tensor in self._tensors.items()}
        return Totals(totals, totals.__getitem__)

    def _keep_sample(self, domain: int, observation: Observation, target_TD: Tensor) -> None:
        start = self._seen[domain]
        stop = start + len(observation.hidden_TD)
        self._seen[domain] = stop
        places = self._places[domain]
        here = (places.position_N >= start) & (places.position_N < stop)
        if not here.any():
            return
        rows = (places.position_N[here] - start).to(observation.hidden_TD.device)
        fields: Mapping[str, Tensor | None] = {
            "inputs_TD": observation.hidden_TD,
            "index_TK": observation.index_TK,
            "weight_TK": observation.weight_TK,
            "logits_TE": observation.logits_TE,
            "output_TD": target_TD,
            "block_TD": _unless_same(observation.block_TD, observation.hidden_TD),
        }
        kept = {name: value[rows].cpu() for name, value in fields.items() if value is not None}
        kept["priority_T"] = places.priority_N[here]
        kept["domain_T"] = torch.full((len(rows),), domain, dtype=torch.int64)
        self._rows.append(kept)

    def sample(self) -> Sample:
        """Return the token sample of all batches so far."""
        joined = {name: torch.cat([rows[name] for rows in self._rows]) for name in self._rows[0]}
        return Sample.of(lowest(joined, self._counts))


def _unless_same(block_TD: Tensor | None, hidden_TD: Tensor) -> Tensor | None:
    """Return what the block received, or None where that is what its experts received."""
    if block_TD is None or (block_TD.shape == hidden_TD.shape and torch.equal(block_TD, hidden_TD)):
        return None
    return block_TD
