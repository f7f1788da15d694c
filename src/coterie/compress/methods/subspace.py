"""Sub-MoE (2506.23266): keep of the experts of a cluster only what lies in a subspace that they share.

The members' matrices stand side by side, ``[W_1 S_1, ..., W_n S_n] = U Sigma [V_1, ..., V_n]^T``, weighted by the
inputs X_i that each sees: S_i S_i^T = X_i X_i^T. The smallest singular values are truncated, the V_i S_i^-1 are
averaged by usage, and the merged matrix is the product. Because ``U_r Sigma_r V_i^T S_i^-1`` is ``U_r U_r^T W_i``, no
S_i is ever needed: U_r are the leading eigenvectors of ``sum_i (W_i X_i)(W_i X_i)^T``, every member is projected on
them here, and the averaging pass that follows does the rest. Without truncation the projection is the identity and the
whole is a plain average.

Legend: E experts, F expert width, D model width, T tokens, O outputs and I inputs of one matrix, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.state import LayerState
from coterie.errors import InputError
from coterie.progress import advance

#: How long it takes, in times of running the token sample through all experts.
SAMPLE_RUNS = 3.0

_CHUNK = 1024  # tokens


def needs(energy: float | None = None, ratio: float | None = None) -> tuple[str, ...]:
    """Return the statistics: usage says which members count."""
    return ("usage",)


def subspace(
    state: LayerState, plan: LayerPlan, *, energy: float | None = None, ratio: float | None = None
) -> LayerState:
    """Project gate, up and down of each cluster's members on the subspace that their outputs share.

    A cluster in which one expert at most was ever chosen stays as it is. Biases stay.

    Args:
        state: a layer with clusters, before they are averaged.
        plan: not read.
        energy: share of the squared singular values to keep, above 0 and up to 1; the rank follows.
        ratio: the paper's rule, R = (1 - ratio) O I / (O + I): the rank at which U and V hold 1 - ratio of the numbers
            of the matrix; from 0 up to below 1. Exactly one of the two is given.

    Raises:
        InputError: not exactly one of `energy` and `ratio`, or one out of range.
    """
    assert state.clusters_E is not None, "subspace comes after cluster and before average"
    rank_of = _rank_rule(energy, ratio)
    matrices = {name: tensor for name, tensor in state.experts.tensors().items() if "bias" not in name}
    matrices = {name: tensor.clone() for name, tensor in matrices.items()}
    ranks: dict[str, list[int | None]] = {name: [] for name in matrices}
    num_clusters = int(state.clusters_E.max()) + 1
    for cluster in range(num_clusters):
        advance(1 / num_clusters)
        members = (state.clusters_E == cluster).nonzero().flatten()
        used = members[state.statistics["usage"][members] > 0].tolist()
        moments = _output_moments(state, used) if len(used) > 1 else {}
        for name, tensor in matrices.items():
            if not moments or float(moments[name].diagonal().sum()) <= 0:  # no token of the sample chose a member
                ranks[name].append(None)
                continue
            values_O, vectors_OO = torch.linalg.eigh(moments[name])
            rank = rank_of(values_O.clamp(min=0), tensor.shape[1], tensor.shape[2])
            leading_OR = vectors_OO[:, -rank:]
            if rank < len(values_O):
                for member in members.tolist():
                    projected = leading_OR @ (leading_OR.T @ tensor[member].double())
                    tensor[member] = projected.to(tensor.dtype)
            ranks[name].append(rank)
    notes = {**state.notes, "subspace": {"rank": {_NAMES[name]: ranks[name] for name in ranks}}}
    experts = replace(
        state.experts,
        gate_EFD=matrices.get("gate_EFD"),
        up_EFD=matrices["up_EFD"],
        down_EDF=matrices["down_EDF"],
    )
    return replace(state, experts=experts, notes=notes)


_NAMES = {"gate_EFD": "gate", "up_EFD": "up", "down_EDF": "down"}


def _output_moments(state: LayerState, used: list[int]) -> dict[str, Tensor]:
    """Return by matrix the sum over members and their tokens of (W_i x)(W_i x)^T, (O, O) float64."""
    experts, sample = state.experts, state.sample
    width, depth = experts.width, experts.down_EDF.shape[1]
    moments = {
        name: torch.zeros(outputs, outputs, dtype=torch.float64)
        for name, outputs in (("gate_EFD", width), ("up_EFD", width), ("down_EDF", depth))
        if name in experts.tensors()
    }
    for expert in used:
        chose_T = (sample.index_TK == expert).any(1)
        for x_TD in torch.split(sample.inputs_TD[chose_T].float(), _CHUNK):
            inputs = {"gate_EFD": x_TD, "up_EFD": x_TD, "down_EDF": experts.hidden(expert, x_TD)}
            for name, moment_OO in moments.items():
                out_TO = inputs[name].double() @ experts.tensors()[name][expert].double().T
                moment_OO += out_TO.T @ out_TO
    return moments


def _rank_rule(energy: float | None, ratio: float | None) -> Callable[[Tensor, int, int], int]:
    """Return a function (ascending eigenvalues (O,), O, I) -> R."""
    if (energy is None) == (ratio is None):
        raise InputError(f"subspace takes exactly one of energy and ratio; got energy {energy}, ratio {ratio}")
    if energy is not None:
        if not 0 < energy <= 1:
            raise InputError(f"energy {energy:g} is not a share: it must be above 0 and at most 1 (0.99 keeps 99 %)")
        return lambda values_O, outputs, inputs: _rank_of_energy(values_O, energy)
    assert ratio is not None
    if not 0 <= ratio < 1:
        raise InputError(f"ratio {ratio:g} is out of range: it must be at least 0 and below 1 (0.2 leaves out a fifth)")
    return lambda values_O, outputs, inputs: min(
        outputs, max(1, int((1 - ratio) * outputs * inputs / (outputs + inputs)))
    )


def _rank_of_energy(values_O: Tensor, energy: float) -> int:
    if energy == 1:
        return len(values_O)
    kept_O = values_O.flip(0).cumsum(0)
    return min(len(values_O), int((kept_O < energy * kept_O[-1]).sum()) + 1)
