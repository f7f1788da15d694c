"""What measures the experts of a layer, group by group, on the text that reaches them.

Text goes through the original once; what reaches the experts of a layer is kept, and each group of their matrices is
measured on it. What that is, a subclass says.

Legend: T tokens, N tokens of one expert, D model width, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.compress.allocators.expert_types import Group
from coterie.compress.projections import Projections
from coterie.compress.source import Source
from coterie.compress.weights import Weight, weights_among
from coterie.model.arch.layers import MoELayer
from coterie.model.stream.stream import Stage, Stream
from coterie.profile.observation import observed


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """What reached the experts of a layer: tokens (T, D), chosen experts and their weights (T, K)."""

    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return which tokens chose an expert (N,), what they are (N, D), and their weights (N, 1), float32."""
        token_N, slot_N = (self.index_TK == expert).nonzero(as_tuple=True)
        return token_N, self.hidden_TD[token_N], self.weight_TK[token_N, slot_N].float()[:, None]


@dataclass(kw_only=True)
class RoutedMeter:
    """Sends text through a model, and measures each group of matrices of experts.

    Attributes:
        stream: the model, open.
        source: the same by its headers.
        batches: the text, ids (B, S) each.
        counts: of each batch, which of its tokens count (B, S), bool; None where all do.
        types: the types that are wanted for matrices.
        groups: returns the groups of a layer's matrices.
    """

    stream: Stream
    source: Source
    batches: Sequence[Tensor]
    counts: Sequence[Tensor | None]
    types: Sequence[str]
    groups: Callable[[Sequence[Weight]], Sequence[Group]]

    def measure(self, skip: Collection[str] = ()) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
        """Yield for each unit its name and what was measured of its groups, by their keys, see `of_layer`.

        Args:
            skip: units that are left out.
        """
        jobs = [self.stream.base_job(ids_BS) for ids_BS in self.batches]
        for stage in self.stream.run(jobs):
            if stage.unit.name in skip:
                continue
            layers = tuple(layer for layer in self.source.architecture.layers if stage.unit.holds(layer.experts))
            routed = _send_on(self.stream, stage, layers, self.counts)
            weights = weights_among(self.source.weights, stage.unit.disk_names)
            measured: dict[str, dict[str, float]] = {}
            for layer in layers:
                groups = self.groups([weight for weight in weights if weight.layer == layer.index])
                with torch.no_grad():
                    projections = Projections(self.stream.model, layer, self.stream.conversion, stage.conversions)
                    measured |= self.of_layer(projections, groups, routed[layer.index])
            yield stage.unit.name, measured

    def of_layer(
        self, projections: Projections, groups: Sequence[Group], routed: Routed
    ) -> dict[str, dict[str, float]]:
        """Return what is measured of the groups of a layer, by their keys."""
        raise NotImplementedError


def members_of(group: Group, projections: Projections) -> dict[int, dict[int, Weight]]:
    """Return, by expert and projection, which matrix of a group holds it."""
    members: dict[int, dict[int, Weight]] = {}
    for weight in group.weights:
        for name in weight.names:
            for expert in sorted(projections.experts_in[name]):
                members.setdefault(expert, {}).update(dict.fromkeys(projections.held[name], weight))
    return members


def _together(parts: Sequence[Routed]) -> Routed:
    return Routed(
        hidden_TD=torch.cat([each.hidden_TD for each in parts]),
        index_TK=torch.cat([each.index_TK for each in parts]),
        weight_TK=torch.cat([each.weight_TK for each in parts]),
    )


@torch.no_grad()
def _send_on(
    stream: Stream, stage: Stage, layers: tuple[MoELayer, ...], counts: Sequence[Tensor | None]
) -> dict[int, Routed]:
    """Send a unit's calls on; return what reached the experts of its layers, by index.

    Args:
        stream: the model.
        stage: the unit.
        layers: its MoE layers.
        counts: of each call, which of its tokens count (B, S), bool; None where all do.
    """
    seen: dict[int, list[Routed]] = {layer.index: [] for layer in layers}
    for call, counts_BS in zip(stage.calls, counts, strict=True):
        if not layers:
            call.finish(call.compute())
            continue
        with observed(stream.model, layers, fields=()) as observations:
            call.finish(call.compute())
        for observation in observations:
            each = observation if counts_BS is None else observation.select(counts_BS.flatten())
            seen[each.layer.index].append(
                Routed(hidden_TD=each.hidden_TD, index_TK=each.index_TK, weight_TK=each.weight_TK)
            )
    return {index: _together(parts) for index, parts in seen.items()}
