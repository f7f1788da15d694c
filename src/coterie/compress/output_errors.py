"""How far the output of a MoE layer is off where some matrices of its experts alone are rounded to a type.

Text goes through the original once, and what reaches the experts of a layer is kept; then the matrices of each group
are rounded to the nearest numbers of each type in turn, and the experts that they are of are computed anew: the rest
of the layer puts out what it did.

Legend: T tokens, N tokens of one expert, D model width, K chosen experts, R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coterie.compress.allocators.expert_types import Group
from coterie.compress.projections import FIELDS, Projections, projections_of
from coterie.compress.source import Source
from coterie.compress.weights import Weight, weights_among
from coterie.model.arch.experts import Experts
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.encodings.ggml import get_layout
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest
from coterie.model.stream.stream import Stage, Stream
from coterie.profile.observation import observed


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """What reached the experts of a layer: tokens (T, D), chosen experts and their weights (T, K)."""

    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor


@dataclass(kw_only=True)
class OutputErrors:
    """Sends text through a model, and measures what rounding each group of matrices does to its layer's output.

    Attributes:
        stream: the model, open.
        source: the same by its headers.
        batches: the text, ids (B, S) each.
        counts: of each batch, which of its tokens count (B, S), bool; None where all do.
        types: the types that are wanted for matrices.
        groups: returns which matrices of a layer are rounded together.
    """

    stream: Stream
    source: Source
    batches: Sequence[Tensor]
    counts: Sequence[Tensor | None]
    types: Sequence[str]
    groups: Callable[[Sequence[Weight]], Sequence[Group]]

    def measure(self, skip: Collection[str] = ()) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
        """Yield for each unit its name and what was measured of its groups, by their keys.

        By the name of a type that is wanted: the Frobenius norm over all tokens of what the layer's output is off. And
        "usage", how many tokens chose the group's experts, and "gate_mass", the sum of their routing weights.

        Args:
            skip: units that are left out.
        """
        jobs = [self.stream.base_job(ids_BS) for ids_BS in self.batches]
        for stage in self.stream.run(jobs):
            if stage.unit.name in skip:
                continue
            layers = tuple(layer for layer in self.source.architecture.layers if stage.unit.holds(layer.experts))
            routed = send_on(self.stream, stage, layers, self.counts)
            weights = weights_among(self.source.weights, stage.unit.disk_names)
            measured: dict[str, dict[str, float]] = {}
            for layer in layers:
                of_layer = [weight for weight in weights if weight.layer == layer.index]
                measured |= self._errors(stage, layer, self.groups(of_layer), routed[layer.index])
            yield stage.unit.name, measured

    @torch.no_grad()
    def _errors(
        self, stage: Stage, layer: MoELayer, groups: Sequence[Group], routed: Routed
    ) -> dict[str, dict[str, float]]:
        projections = Projections(self.stream.model, layer, self.stream.conversion, stage.conversions)
        members = {group.key: members_of(group, projections) for group in groups}
        measured: dict[str, dict[str, float]] = {}
        ready: dict[int, _Expert] = {}

        def alone(expert: int) -> _Expert:
            if expert not in ready:  # one at a time: groups come in the order of experts
                ready.clear()
                ready[expert] = _Expert.of(projections.experts, expert, routed)
            return ready[expert]

        for group in sorted(groups, key=lambda group: min(members[group.key])):
            experts = members[group.key]
            measured[group.key] = _chosen(experts, routed)
            for wanted in self.types:
                types = group.types(wanted)
                kinds = {e: {part: types[weight.pattern] for part, weight in experts[e].items()} for e in experts}
                if len(experts) == 1:
                    [off_ND] = [alone(e).off(kinds[e]) for e in experts]
                else:  # what several experts add to the same token comes together
                    off_ND = torch.zeros_like(routed.hidden_TD, dtype=torch.float32)
                    for e in experts:
                        off_ND.index_add_(0, alone(e).token_N, alone(e).off(kinds[e]))
                measured[group.key][wanted] = float(off_ND.double().norm())
        return measured


@dataclass(frozen=True, kw_only=True, slots=True)
class _Expert:
    """One expert alone, in float32, and the tokens that chose it, with their weights and what it puts out for them."""

    alone: Experts
    token_N: Tensor
    input_ND: Tensor
    weight_N1: Tensor
    output_ND: Tensor

    @classmethod
    def of(cls, experts: Experts, expert: int, routed: Routed) -> _Expert:
        alone = experts.select(torch.tensor([expert], device=experts.up_EFD.device)).map(Tensor.float)
        token_N, slot_N = (routed.index_TK == expert).nonzero(as_tuple=True)
        input_ND = routed.hidden_TD[token_N].float()
        weight_N1 = routed.weight_TK[token_N, slot_N].float()[:, None]
        return cls(
            alone=alone, token_N=token_N, input_ND=input_ND, weight_N1=weight_N1, output_ND=alone.output(0, input_ND)
        )  # fmt: skip

    def off(self, kinds: dict[int, str]) -> Tensor:
        """Return what it adds to the layer's output is off, (N, D), with projections rounded to types."""
        rounded = _rounded(self.alone, kinds).output(0, self.input_ND)
        return (rounded - self.output_ND) * self.weight_N1


def _together(parts: Sequence[Routed]) -> Routed:
    return Routed(
        hidden_TD=torch.cat([each.hidden_TD for each in parts]),
        index_TK=torch.cat([each.index_TK for each in parts]),
        weight_TK=torch.cat([each.weight_TK for each in parts]),
    )


@torch.no_grad()
def send_on(
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


def members_of(group: Group, projections: Projections) -> dict[int, dict[int, Weight]]:
    """Return, by expert and projection, which matrix of a group holds it."""
    members: dict[int, dict[int, Weight]] = {}
    for weight in group.weights:
        for name in weight.names:
            for expert in sorted(projections.experts_in[name]):
                members.setdefault(expert, {}).update(dict.fromkeys(projections.held[name], weight))
    return members


def _chosen(experts: dict[int, dict[int, Weight]], routed: Routed) -> dict[str, float]:
    chosen_TK = torch.isin(routed.index_TK, torch.tensor(list(experts), device=routed.index_TK.device))
    return {"usage": float(chosen_TK.sum()), "gate_mass": float(routed.weight_TK[chosen_TK].double().sum())}


def _rounded(one: Experts, kinds: dict[int, str]) -> Experts:
    """Return an expert with some of its projections rounded to the nearest numbers of a type, all columns alike."""
    matrices, changed = projections_of(one), dict[str, Any]()
    for part, kind in kinds.items():
        matrix_1RC = matrices[part]
        importance_1C = torch.ones(1, matrix_1RC.shape[-1], device=matrix_1RC.device)
        _, changed[FIELDS[part]] = round_to_nearest(matrix_1RC, importance_1C, get_layout(kind))
    return replace(one, **changed)
