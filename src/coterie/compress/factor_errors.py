"""What rounding an expert's factors would cost, where all experts of a layer share the basis of a projection.

BitsMoE (2606.00079). The matrices of one projection of all experts are put together along the axis that experts do not
share, and decomposed: of gate and up ``[W_1; ...; W_E] = U S V^T``, of down ``[W_1 ... W_E] = U S V^T``. The side of
the model width, V or U, is the basis that all share; what is left of expert e, ``(W_e V)^T`` or ``U^T W_e``, are its
factors: a row for each direction k, of spectral energy ``|row|^2``. A row is what the paper gives bits to. Rounding it
to type b leaves an error ``delta_kb``, which activations carry into the output of the projection.

Legend: E experts, D model width, F expert width, K directions of the basis, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from coterie.compress.allocators.expert_types import Group
from coterie.compress.projections import DOWN, Projections, projections_of
from coterie.compress.routed import Routed, RoutedMeter, members_of
from coterie.model.arch.experts import Experts
from coterie.model.disk.encodings.ggml import SIZES, get_layout, unwrapped
from coterie.model.disk.encodings.ggml.rounding import round_to_nearest


@dataclass(kw_only=True)
class FactorErrors(RoutedMeter):
    """Measures what rounding the factors of each matrix of an expert would cost; a group is a matrix."""

    def of_layer(
        self, projections: Projections, groups: Sequence[Group], routed: Routed
    ) -> dict[str, dict[str, float]]:
        """Return for each group, by its key, the cost of each type that is wanted.

        The cost is the sum over the expert's tokens, each with the square of its routing weight, and over directions k,
        of the square that ``delta_kb`` adds to the output: of gate and up ``|delta_kb|^2 (v_k . x)^2``; of down, where
        neurons h are taken for uncorrelated, ``sum over f of delta_kbf^2 h_f^2``.
        """
        experts, matrices = projections.experts, projections_of(projections.experts)
        measured = {group.key: dict.fromkeys(self.types, 0.0) for group in groups}
        members = [
            (part, expert, group, weight)
            for group in groups
            for expert, weights in members_of(group, projections).items()
            for part, weight in weights.items()
        ]
        in_order = sorted(members, key=lambda member: member[:2])
        for part, of_part in groupby(in_order, key=lambda member: member[0]):
            basis_DK = shared_basis(matrices[part], down=part == DOWN)
            for _, expert, group, weight in of_part:
                matrix = matrices[part][expert].float()
                factor_KF = basis_DK.T @ matrix if part == DOWN else (matrix @ basis_DK).T
                carried_KF = _carried(experts, expert, routed, None if part == DOWN else basis_DK)
                by_kind: dict[str, float] = {}
                for wanted in self.types:
                    kind = unwrapped(group.types(wanted)[weight.pattern])
                    if kind not in by_kind:
                        off_KF = rounded_rows(factor_KF, kind) - factor_KF
                        by_kind[kind] = float((off_KF.square() * carried_KF).double().sum())
                    measured[group.key][wanted] += by_kind[kind]
        return measured


def _carried(experts: Experts, expert: int, routed: Routed, basis_DK: Tensor | None) -> Tensor:
    """Return what the square of an error of an expert's factors counts: (K, 1) in its directions, or (1, F) of down.

    Args:
        experts: of the layer.
        expert: which one.
        routed: what reached them.
        basis_DK: of gate or up; None for down.
    """
    _, input_ND, weight_N1 = routed.of_expert(expert)
    if basis_DK is None:
        return (experts.hidden(expert, input_ND).float() * weight_N1).square().sum(0)[None]
    return ((input_ND.float() @ basis_DK) * weight_N1).square().sum(0)[:, None]


def shared_basis(matrices: Tensor, *, down: bool) -> Tensor:
    """Return the directions (D, K) that all experts share in a projection, by falling spectral energy.

    They are the eigenvectors of the sum of ``W_e^T W_e``, of down ``W_e W_e^T``: the singular vectors of all matrices
    together. The largest number of each is positive, as codes of two signs are not alike.

    Args:
        matrices: the projection of each expert: gate or up (E, F, D), or down (E, D, F).
        down: whether it is down.
    """
    width = matrices.shape[1 if down else 2]
    gram_DD = torch.zeros(width, width, device=matrices.device)
    for matrix in matrices:
        values = matrix.float() if down else matrix.float().T
        gram_DD += values @ values.T
    basis_DK: Tensor = torch.linalg.eigh(gram_DD).eigenvectors.flip(1)
    largest_1K = basis_DK.gather(0, basis_DK.abs().argmax(dim=0)[None])
    return basis_DK * torch.where(largest_1K < 0, -1.0, 1.0)


def rounded_rows(factor_KF: Tensor, kind: str) -> Tensor:
    """Return rows rounded to the nearest numbers of a type, each in blocks of its own, filled up with zeros."""
    columns = factor_KF.shape[1]
    filled_1KC = pad(factor_KF, (0, -columns % SIZES[kind][0]))[None]
    ones_1C = torch.ones(1, filled_1KC.shape[-1], device=factor_KF.device)
    return round_to_nearest(filled_1KC, ones_1C, get_layout(kind))[1][0, :, :columns]
