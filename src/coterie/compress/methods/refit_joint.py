"""Re-fit the down projections of all experts of a layer together, to the output that the layer should have.

The output ``y_t = sum_e g_te (down_e h_e(x_t) + bias_e)`` is linear in all down projections at once, so whatever was
done to gate, up and router before, the best down projections are a least-squares problem:

    minimise  sum_t |target_t - y_t|^2 + sum_e ridge_e |down_e - down_e,before|^2

where experts that are chosen together make up for each other's losses. It is solved by conjugate gradients from the
projections as they are, each expert's step preconditioned by its own (F x F) moment matrix. Tokens that are held out
are watched: the iterate that fits them best is taken, which is the one before the first where nothing helps. `prior`
tokens of average activations make up ``ridge_e``, which keeps experts apart from their few tokens. Where a layer has
few hidden neurons in all, their joint moment matrix is made once and the steps are taken there, which is many times
faster; else each step passes over the sample.

No published method: MergeMoE (2510.14436) solves for each merged expert alone, against all tokens.

Legend: E experts of the original, M experts now, F expert width, D model width, T tokens, N tokens of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.state import LayerState
from coterie.progress import advance
from coterie.train.split import split

#: How long it takes, in times of running the token sample through all experts.
SAMPLE_RUNS = 2.0

#: Relative squared error on the held-out tokens that is rounding.
ROUNDING = 1e-9

#: Neurons of a layer up to which their joint moments are made: 200 MB of float64.
FEW_NEURONS = 5_120

#: Tokens whose activations stand side by side at once while moments are made.
_CHUNK = 4_096

#: Iterations without progress on the held-out tokens after which to stop.
PATIENCE = 3


def needs(**options: object) -> tuple[str, ...]:
    """Only the sample is read."""
    return ()


@dataclass(frozen=True, slots=True)
class Rows:
    """What the down projections of a layer act on: for each expert its tokens and weighted activations there."""

    num_tokens: int
    tokens: tuple[Tensor, ...]
    activations: tuple[Tensor, ...]

    def project(self, down_MDF: Tensor) -> Tensor:
        """Return the routed output without biases, (T, D)."""
        out_TD = down_MDF.new_zeros(self.num_tokens, down_MDF.shape[1])
        for token_N, hidden_NF, down_DF in zip(self.tokens, self.activations, down_MDF, strict=True):
            out_TD.index_add_(0, token_N, hidden_NF @ down_DF.T)
        return out_TD

    def adjoint(self, residual_TD: Tensor) -> Tensor:
        """Return minus half the gradient of |residual|^2 for the down projections, (M, D, F)."""
        return torch.stack([
            residual_TD[token_N].T @ hidden_NF
            for token_N, hidden_NF in zip(self.tokens, self.activations, strict=True)
        ])  # fmt: skip


def refit_joint(
    state: LayerState, plan: LayerPlan, *, iterations: int = 40, prior: float = 16.0, held_out: int = 8
) -> LayerState:
    """Re-fit all down projections together on the token sample; biases of the projections stay.

    Nothing changes, and the notes say so, where the held-out tokens do not gain, and in families that normalise each
    expert's output, which is then not linear in the down projection.

    Args:
        state: the layer.
        plan: not read.
        iterations: steps of conjugate gradients at most.
        prior: strength of the ridge, in tokens.
        held_out: every so many-th token of the sample is held out.
    """
    experts, sample = state.experts, state.sample
    if experts.finish is not None:
        return _noted(state, {"skipped": "this family normalises the output of each expert"})
    index_TK, weight_TK = state.routing()
    fit_N, heldout_N = split(len(index_TK), held_out)
    target_TD = sample.output_TD.float() - _bias_output(state, index_TK, weight_TK)
    splits = []
    for chosen_N in (fit_N, heldout_N):
        rows = _rows(state, index_TK[chosen_N], weight_TK[chosen_N], chosen_N)
        splits.append((rows, target_TD[chosen_N] - rows.project(experts.down_EDF)))
    (fit, residual_TD), (test, heldout_TD) = splits
    before = float(heldout_TD.double().square().sum())
    solved_MDF, after, steps = _solve(fit, residual_TD, test, heldout_TD, prior, iterations)
    scale = max(1e-300, float(target_TD[heldout_N].double().square().sum()))
    if before <= ROUNDING * scale:  # nothing was lost: an unchanged layer keeps its bits
        error = before / scale
        return _noted(state, {"heldout_error_before": error, "heldout_error_after": error, "iterations": 0})
    notes: dict[str, object] = {
        "heldout_error_before": before / scale,
        "heldout_error_after": after / scale,
        "iterations": steps,
    }
    if solved_MDF is None:
        return _noted(state, notes)
    return _noted(replace(state, experts=replace(experts, down_EDF=experts.down_EDF + solved_MDF)), notes)


class Moments:
    """What least squares on some rows needs to know of them, for a layer of few neurons: their joint moment matrix."""

    def __init__(self, rows: Rows) -> None:
        """Pass once over the rows."""
        self._shape = (len(rows.activations), rows.activations[0].shape[1])
        count = math.prod(self._shape)
        self._matrix = torch.zeros(count, count, dtype=torch.float64)
        for start in range(0, rows.num_tokens, _CHUNK):
            wide_TMF = torch.zeros(min(_CHUNK, rows.num_tokens - start), *self._shape)
            for expert, (token_N, hidden_NF) in enumerate(zip(rows.tokens, rows.activations, strict=True)):
                here_N = (token_N >= start) & (token_N < start + _CHUNK)
                wide_TMF[token_N[here_N] - start, expert] = hidden_NF[here_N]
            wide_TX = wide_TMF.flatten(1)
            self._matrix += wide_TX.T @ wide_TX

    def apply(self, step_MDF: Tensor) -> Tensor:
        """Return A^T A step, for the map A from down projections to routed outputs."""
        flat_DX = step_MDF.transpose(0, 1).flatten(1)
        product_DX = flat_DX @ self._matrix.to(flat_DX.dtype)
        return product_DX.view(len(flat_DX), *self._shape).transpose(0, 1)


def _normal(rows: Rows) -> Callable[[Tensor], Tensor]:
    """Return the map from a step to A^T A step; see `Moments`."""
    if len(rows.activations) * rows.activations[0].shape[1] <= FEW_NEURONS:
        return Moments(rows).apply
    return lambda step_MDF: rows.adjoint(rows.project(step_MDF))


def _solve(
    fit: Rows, residual_TD: Tensor, test: Rows, heldout_TD: Tensor, prior: float, iterations: int
) -> tuple[Tensor | None, float, int]:
    """Return the change of the down projections (None for none), the held-out squared error with it, and its step."""
    grams = [hidden_NF.T @ hidden_NF for hidden_NF in fit.activations]
    ridge_M = torch.stack([
        prior * gram_FF.diagonal().mean() / max(1, len(hidden_NF)) if len(hidden_NF) else gram_FF.new_ones(())
        for gram_FF, hidden_NF in zip(grams, fit.activations, strict=True)
    ]).clamp(min=torch.finfo(torch.float32).tiny)  # fmt: skip
    ridge_M11 = ridge_M[:, None, None]
    factors_MFF = torch.stack([
        _factor(gram_FF, float(ridge)) for gram_FF, ridge in zip(grams, ridge_M, strict=True)
    ])  # fmt: skip

    def precondition(gradient_MDF: Tensor) -> Tensor:
        solved_MFD: Tensor = torch.cholesky_solve(gradient_MDF.mT, factors_MFF)
        return solved_MFD.mT

    normal, normal_heldout = _normal(fit), _normal(test)
    gradient_MDF, heldout_gradient_MDF = fit.adjoint(residual_TD), test.adjoint(heldout_TD).double()
    change_MDF = torch.zeros_like(gradient_MDF)
    step_MDF = precondition(gradient_MDF)
    slope = _dot(gradient_MDF, step_MDF)
    best: Tensor | None = None
    before = least = float(heldout_TD.double().square().sum())
    at = 0
    for iteration in range(1, iterations + 1):
        advance(1 / iterations)
        bent_MDF = normal(step_MDF) + ridge_M11 * step_MDF
        curvature = _dot(step_MDF, bent_MDF)
        if slope <= 0 or curvature <= 0:
            break
        length = slope / curvature
        change_MDF = change_MDF + length * step_MDF
        error = before - 2 * _dot(heldout_gradient_MDF, change_MDF) + _dot(change_MDF, normal_heldout(change_MDF))
        if error < least:
            best, least, at = change_MDF, error, iteration
        elif iteration - at >= PATIENCE:
            break
        gradient_MDF = gradient_MDF - length * bent_MDF
        direction_MDF = precondition(gradient_MDF)
        next_slope = _dot(gradient_MDF, direction_MDF)
        step_MDF = direction_MDF + (next_slope / slope) * step_MDF
        slope = next_slope
    return best, max(least, 0.0), at


def _dot(one_MDF: Tensor, other_MDF: Tensor) -> float:
    return float((one_MDF.double() * other_MDF.double()).sum())


def _factor(gram_FF: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of a moment matrix with its ridge, and a little more where that is not enough."""
    eye_FF = torch.eye(len(gram_FF), dtype=gram_FF.dtype)
    floor = 1e-6 * float(gram_FF.diagonal().mean())
    factor_FF: Tensor = torch.linalg.cholesky(gram_FF + max(ridge, floor) * eye_FF)
    return factor_FF


def _rows(state: LayerState, index_TK: Tensor, weight_TK: Tensor, chosen_N: Tensor) -> Rows:
    inputs_TD = state.sample.inputs_TD[chosen_N].float()
    tokens, activations = [], []
    for expert in range(state.experts.num_experts):
        token_N, slot_N = (index_TK == expert).nonzero(as_tuple=True)
        weight_N1 = weight_TK[token_N, slot_N, None].float()
        tokens.append(token_N)
        activations.append(weight_N1 * state.experts.hidden(expert, inputs_TD[token_N]))
    return Rows(len(inputs_TD), tuple(tokens), tuple(activations))


def _bias_output(state: LayerState, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return what the biases of the down projections add to the output, (T, D)."""
    bias_MD = state.experts.down_bias_ED
    if bias_MD is None:
        return torch.zeros(())
    padded_MD = torch.cat((bias_MD, torch.zeros_like(bias_MD[:1])))  # the last row is for "no expert"
    clamped_TK = index_TK.clamp(max=len(bias_MD))
    return torch.einsum("tk,tkd->td", weight_TK.float(), padded_MD[clamped_TK])


def _noted(state: LayerState, notes: dict[str, object]) -> LayerState:
    return replace(state, notes={**state.notes, "refit-joint": notes})
