"""MergeMoE's least-squares down projection (2510.14436), with a ridge chosen on held-out tokens.

A merged expert with averaged gate and up computes activations P = h*(X) on tokens X. The paper stacks the members'
activations Q and sets ``down* = [b_1 down_1 ... b_n down_n] Q P^+``. Because ``[b_j down_j] Q`` is just
``Y = sum_j b_j f_j(X)``, this is ``down* = Y P^+``, and only ``P P^T`` (F x F) and ``Y P^T`` (D x F) are accumulated.
The pseudo-inverse blows up when there are about as many tokens as neurons, so it is taken as a ridge around the
average: ``down* = A + (C - A G)(G + lambda I)^-1`` with the averaged projection A. lambda to infinity is the average,
lambda to 0 the paper's formula. lambda is chosen on held-out tokens, and a cluster keeps its average where no lambda
beats it there.

Legend: E experts of the original, M clusters, F expert width, D model width, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.average import usage_shares
from coterie.compress.state import LayerState
from coterie.errors import ArchitectureMismatch
from coterie.model.arch.experts import Experts
from coterie.progress import advance
from coterie.train.split import split

#: Candidates for lambda, as multiples of the mean of the Gram matrix's diagonal.
RIDGES = tuple(10.0**exponent for exponent in range(-7, 2))

_CHUNK = 4096  # tokens


def needs(**options: object) -> tuple[str, ...]:
    """The weights b_j are the usages."""
    return ("usage",)


@dataclass(frozen=True, slots=True)
class Gram:
    """Sums over tokens: G = P P^T (F, F), C = Y P^T (D, F), and |Y|^2; float64."""

    activations_FF: Tensor
    cross_DF: Tensor
    target: float

    def error(self, down_DF: Tensor) -> float:
        """Return the relative squared error |Y - down P|^2 / |Y|^2 on these tokens."""
        gram_DF = down_DF @ self.activations_FF
        squared = self.target - 2 * (down_DF * self.cross_DF).sum() + (gram_DF * down_DF).sum()
        return float(squared) / max(self.target, 1e-300)


def refit_down(state: LayerState, plan: LayerPlan, *, held_out: int = 4) -> LayerState:
    """Re-fit the down projection of every merged expert to the usage-weighted outputs of its members.

    All tokens of the sample count, whether routed to the cluster or not, as in the paper.

    Args:
        state: the layer.
        plan: not read.
        held_out: every so many-th token of the sample is held out.

    Raises:
        ArchitectureMismatch: the family normalises each expert's output, so outputs are not linear in down.
    """
    assert state.clusters_E is not None, "refit-down comes after average"
    if state.experts.finish is not None:
        raise ArchitectureMismatch(
            f"{state.layer.block}: this family normalises the output of each expert, so the down projection cannot be "
            "solved for; use a recipe without refit-down, such as m-smoe or hc-smoe"
        )
    share_ME = usage_shares(state.clusters_E, state.statistics["usage"])
    inputs_TD = state.sample.inputs_TD.float()
    fit_N, heldout_N = split(len(inputs_TD), held_out)
    down_MDF = state.experts.down_EDF.clone()
    ridges: list[float | None] = []
    errors: list[tuple[float, float] | None] = []
    for merged, share_E in enumerate(share_ME):
        advance(1 / len(share_ME))
        if len((state.clusters_E == merged).nonzero()) == 1:
            ridges.append(None)
            errors.append(None)
            continue
        fit = accumulate(state, merged, share_E, inputs_TD[fit_N])
        test = accumulate(state, merged, share_E, inputs_TD[heldout_N])
        average_DF = state.experts.down_EDF[merged].double()
        before = test.error(average_DF)
        ridge, solved_DF, after = _best_ridge(fit, test, average_DF)
        if after < before:
            down_MDF[merged] = solved_DF.to(down_MDF.dtype)
        ridges.append(ridge if after < before else None)
        errors.append((before, min(before, after)))
    return replace(
        state,
        experts=replace(state.experts, down_EDF=down_MDF),
        notes={**state.notes, "refit-down": _notes(ridges, errors)},
    )


def accumulate(state: LayerState, merged: int, share_E: Tensor, inputs_TD: Tensor) -> Gram:
    """Sum G, C and |Y|^2 of one merged expert over tokens, a chunk at a time.

    Biases of the members' down projections are part of Y; the merged bias, their mean, is taken off again because the
    solution is for the matrix alone.
    """
    experts, original = state.experts, state.original
    width, depth = experts.width, inputs_TD.shape[1]
    gram_FF = torch.zeros(width, width, dtype=torch.float64)
    cross_DF = torch.zeros(depth, width, dtype=torch.float64)
    target = 0.0
    for chunk_TD in torch.split(inputs_TD, _CHUNK):
        p_TF = experts.hidden(merged, chunk_TD).double()
        y_TD = _weighted_outputs(original, share_E, chunk_TD)
        if experts.down_bias_ED is not None:
            y_TD -= experts.down_bias_ED[merged].double()
        gram_FF += p_TF.T @ p_TF
        cross_DF += y_TD.T @ p_TF
        target += float(y_TD.square().sum())
    return Gram(gram_FF, cross_DF, target)


def ridge_solution(gram: Gram, average_DF: Tensor, ridge: float) -> Tensor:
    """Return A + (C - A G)(G + lambda I)^-1 with lambda = `ridge` times the mean of G's diagonal."""
    width = gram.activations_FF.shape[0]
    penalty = ridge * gram.activations_FF.diagonal().mean().clamp(min=1e-300)
    system_FF = gram.activations_FF + penalty * torch.eye(width, dtype=torch.float64)
    residual_DF = gram.cross_DF - average_DF @ gram.activations_FF
    step_FD: Tensor = torch.linalg.solve(system_FF, residual_DF.T)
    return average_DF + step_FD.T


def _best_ridge(fit: Gram, test: Gram, average_DF: Tensor) -> tuple[float, Tensor, float]:
    solutions = [(ridge, ridge_solution(fit, average_DF, ridge)) for ridge in RIDGES]
    scored = [(test.error(solved_DF), ridge, solved_DF) for ridge, solved_DF in solutions]
    error, ridge, solved_DF = min(scored, key=lambda entry: entry[:2])
    return ridge, solved_DF, error


def _weighted_outputs(original: Experts, share_E: Tensor, inputs_TD: Tensor) -> Tensor:
    total_TD = torch.zeros(inputs_TD.shape, dtype=torch.float64)
    for expert in share_E.nonzero().flatten().tolist():
        total_TD += share_E[expert] * original.output(expert, inputs_TD).double()
    return total_TD


def _notes(ridges: list[float | None], errors: list[tuple[float, float] | None]) -> dict[str, object]:
    merged = [pair for pair in errors if pair is not None]
    return {
        "ridge": ridges,
        "merged": len(merged),
        "kept_average": sum(ridge is None for ridge in ridges) - (len(errors) - len(merged)),
        "heldout_error_average": sum(pair[0] for pair in merged) / len(merged) if merged else None,
        "heldout_error_refit": sum(pair[1] for pair in merged) / len(merged) if merged else None,
    }
