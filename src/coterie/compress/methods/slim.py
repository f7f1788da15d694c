"""Slim: keep in each expert the hidden neurons with the highest score, drop the others.

Neuron k of expert e is row k of gate and up (and of their biases) and column w_k of the down projection; it adds
h_k(x) w_k to the expert's output. A bias of the down projection stays, and so does the router.

Scores: ``activation`` is the sum of |h_k(x) w_k|^2 over the tokens that chose the expert. ``heapr`` (2509.22299) is the
mean of h_k(x)^2 over them, times w_k^T G_e w_k, where G_e is the mean over them of the outer product of the loss's
gradient with respect to the expert's output; the paper's factor of 1/2 is left out. ``energy`` is our own.

Legend: E experts of the original, M experts now, F expert width now, D model width, W width to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.state import LayerState
from coterie.errors import Infeasible, UnknownName
from coterie.model.arch.experts import Experts

#: How long it takes, in times of running the token sample through all experts.
SAMPLE_RUNS = 0.0

Statistics = Mapping[str, Tensor]


def heapr_scores(statistics: Statistics) -> Tensor:
    """Return HEAPr's score of every neuron (E, F): the rise of the loss without it, on an average token of its expert.

    ``channel_gradient`` is n_e w_k^T G_e w_k, so the D x D matrix G_e is never made. It compares across experts and
    layers. Neurons of experts that were never chosen get 0.
    """
    usage_E1 = statistics["usage"].clamp(min=1)[:, None]
    return (statistics["hidden_square"] / usage_E1) * (statistics["channel_gradient"] / usage_E1)


def energy_scores(statistics: Statistics) -> Tensor:
    """Return our own score of every neuron (E, F): the rise of the loss without it, on all of the text.

    The sum over the tokens that chose e of (g_te h_k)^2, times w_k^T G w_k with one G for the whole layer: the mean
    over all tokens of the outer product of the loss's gradient with respect to the layer's output. HEAPr's G_e is made
    from the tokens of one expert, and a rare expert has few.
    """
    return statistics["gated_hidden_square"] * (statistics["gradient_energy"] / statistics["tokens"])


#: Scores that compare across experts and layers, by name.
RANKINGS: dict[str, Callable[[Statistics], Tensor]] = {"heapr": heapr_scores, "energy": energy_scores}


def _activation(statistics: Statistics, down_EDF: Tensor) -> Tensor:
    return statistics["hidden_square"] * _norms(down_EDF, 1).square()


#: Score by name, from the statistics and down projections of the original experts, and the statistics that it reads.
SCORES: dict[str, tuple[Callable[[Statistics, Tensor], Tensor], tuple[str, ...]]] = {
    "activation": (_activation, ("hidden_square",)),
    "heapr": (lambda statistics, down_EDF: heapr_scores(statistics), ("channel_gradient", "hidden_square", "usage")),
    "energy": (
        lambda statistics, down_EDF: energy_scores(statistics),
        ("gated_hidden_square", "gradient_energy", "tokens"),
    ),
}


def needs(score: str) -> tuple[str, ...]:
    """Return the statistics that a score reads; raises UnknownName."""
    if score not in SCORES:
        raise UnknownName("score", score, SCORES)
    return SCORES[score][1]


def slim(state: LayerState, plan: LayerPlan, *, score: str) -> LayerState:
    """Keep the `plan.width` neurons of each expert with the highest score, in their original order.

    With `plan.widths` each expert keeps as many as that says: its neurons come first, zeros fill it up to the width
    that it had. Of neurons with the same score, as in an expert that no token chose, those with larger weights stay.

    Raises:
        UnknownName: no such score.
        Infeasible: an earlier pass merged experts, so their neurons are not those that were measured.
    """
    needs(score)
    return keep_neurons(state, plan, SCORES[score][0](state.statistics, state.original.down_EDF), score=score)


def keep_neurons(state: LayerState, plan: LayerPlan, scores_EF: Tensor, *, score: str) -> LayerState:
    """Keep the neurons with the highest of these scores, one for each neuron of each original expert; see `slim`.

    Raises:
        Infeasible: an earlier pass merged experts.
    """
    experts, scores_MF = state.experts, scores_EF[_originals(state)]
    widths_M = torch.tensor(plan.widths or (plan.width or experts.width,) * experts.num_experts)
    order_MF = ranked_neurons(experts, scores_MF)
    place_F = torch.arange(experts.width)
    chosen_MF = torch.zeros_like(scores_MF, dtype=torch.bool).scatter_(1, order_MF, place_F < widths_M[:, None])
    # Chosen neurons first, in their order, then the others.
    first_MF = torch.where(chosen_MF, place_F, place_F + experts.width).argsort(dim=1)
    kept_MW = first_MF if plan.widths else first_MF[:, : int(widths_M[0])]
    slimmed = take_neurons(experts, kept_MW)
    if plan.widths:
        slimmed = _without_rest(slimmed, place_F < widths_M[:, None])
    total = float(scores_MF.sum())
    share = float(scores_MF[chosen_MF].sum()) / total if total else 1.0
    return replace(state, experts=slimmed, notes={**state.notes, "slim": {"score": score, "share_of_score": share}})


def ranked_neurons(experts: Experts, scores_MF: Tensor) -> Tensor:
    """Return the neurons of each expert (M, F) by falling score; of equal ones, larger weights come first."""
    larger_MF = _weight_norms(experts).argsort(dim=1, descending=True, stable=True)
    ranks_MF = scores_MF.gather(1, larger_MF).argsort(dim=1, descending=True, stable=True)
    return larger_MF.gather(1, ranks_MF)


def _originals(state: LayerState) -> Tensor:
    """Return for each expert now the number of the original that it is."""
    map_E, count = state.expert_map_E, state.experts.num_experts
    original_E = torch.nonzero(map_E >= 0).flatten()
    if len(original_E) != count:
        raise Infeasible(
            f"{state.layer.experts}: {len(original_E)} experts were merged into {count}, whose neurons were never "
            "measured: slim before merging"
        )
    return original_E[map_E[original_E].argsort()]


def _weight_norms(experts: Experts) -> Tensor:
    """Return for each neuron (M, F) the product of the norms of its weights in gate, up and down projection."""
    norms_MF = _norms(experts.down_EDF, 1)
    pairs = ((experts.gate_EFD, experts.gate_bias_EF), (experts.up_EFD, experts.up_bias_EF))
    for weight_MFD, bias_MF in pairs:
        if weight_MFD is not None:
            row_MF = _norms(weight_MFD, 2)
            norms_MF = norms_MF * (row_MF if bias_MF is None else torch.hypot(row_MF, bias_MF.double()))
    return norms_MF


def _norms(tensor: Tensor, axis: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=axis, dtype=torch.float64)
    return norms


def take_neurons(experts: Experts, index_MW: Tensor) -> Experts:
    """Return experts with these neurons, in that order."""

    def rows(tensor_MFD: Tensor | None) -> Tensor | None:
        return None if tensor_MFD is None else torch.take_along_dim(tensor_MFD, index_MW[:, :, None], dim=1)

    def entries(tensor_MF: Tensor | None) -> Tensor | None:
        return None if tensor_MF is None else torch.take_along_dim(tensor_MF, index_MW, dim=1)

    return replace(
        experts,
        gate_EFD=rows(experts.gate_EFD),
        up_EFD=torch.take_along_dim(experts.up_EFD, index_MW[:, :, None], dim=1),
        down_EDF=torch.take_along_dim(experts.down_EDF, index_MW[:, None, :], dim=2),
        gate_bias_EF=entries(experts.gate_bias_EF),
        up_bias_EF=entries(experts.up_bias_EF),
    )


def _without_rest(experts: Experts, real_MF: Tensor) -> Experts:
    """Return experts whose neurons outside a mask are zeros."""

    def masked(name: str, tensor: Tensor) -> Tensor:
        if name == "down_bias_ED":
            return tensor
        mask = real_MF[:, None, :] if name == "down_EDF" else real_MF.view(*real_MF.shape, *(1,) * (tensor.ndim - 2))
        return torch.where(mask, tensor, 0.0)

    return replace(experts, **{name: masked(name, tensor) for name, tensor in experts.tensors().items()})  # type: ignore[arg-type]
