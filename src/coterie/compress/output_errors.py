"""How far the output of a MoE layer is off where some matrices of its experts alone are rounded to a type.

The matrices of each group (`coterie.compress.routed`) are rounded to the nearest numbers of each type in turn, and the
experts that they are of are computed anew: the rest of the layer puts out what it did.

Legend: T tokens, N tokens of one expert, D model width, K chosen experts, R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coterie.compress.allocators.expert_types import Group
from coterie.compress.projections import FIELDS, Projections, projections_of
from coterie.compress.routed import Routed, RoutedMeter, members_of
from coterie.compress.weights import Weight
from coterie.model.arch.experts import Experts
from coterie.model.disk.encodings.ggml import get_layout
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest


@dataclass(kw_only=True)
class OutputErrors(RoutedMeter):
    """Measures what rounding each group of matrices does to its layer's output."""

    def of_layer(
        self, projections: Projections, groups: Sequence[Group], routed: Routed
    ) -> dict[str, dict[str, float]]:
        """Return what was measured of each group, by its key.

        By the name of a type that is wanted: the Frobenius norm over all tokens of what the layer's output is off. And
        "usage", how many tokens chose the group's experts, and "gate_mass", the sum of their routing weights.
        """
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
        token_N, hidden_ND, weight_N1 = routed.of_expert(expert)
        input_ND = hidden_ND.float()
        return cls(
            alone=alone, token_N=token_N, input_ND=input_ND, weight_N1=weight_N1, output_ND=alone.output(0, input_ND)
        )  # fmt: skip

    def off(self, kinds: dict[int, str]) -> Tensor:
        """Return what it adds to the layer's output is off, (N, D), with projections rounded to types."""
        rounded = _rounded(self.alone, kinds).output(0, self.input_ND)
        return (rounded - self.output_ND) * self.weight_N1


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
