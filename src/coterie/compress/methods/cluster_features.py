"""How far apart two experts are: features that a clustering rule compares, each as a matrix of distances.

Every distance is Euclidean between feature vectors, except ``ream``, which is a dissimilarity between 0 and 1.

Legend: E experts, F expert width, D model width, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from coterie.compress.state import LayerState
from coterie.errors import ArchitectureMismatch, UnknownName

_COLUMNS = 2**16  # columns of weights that are compared at a time
_VALUES = 2**24  # outputs that are held at a time


def needs(features: str) -> tuple[str, ...]:
    """Return the statistics that a feature reads; raises UnknownName."""
    if features not in FEATURES:
        raise UnknownName("features of experts", features, FEATURES)
    return FEATURES[features][1]


def distances(state: LayerState, features: str) -> Tensor:
    """Return the distances between the experts' features, (E, E) float64 with a zero diagonal.

    Args:
        state: a layer whose experts are the original ones.
        features: ``weights`` (gate and up, flat), ``router-scores`` (columns of router scores over tokens, unit
            length), ``outputs`` (mean output over all tokens), ``token-outputs`` (unit outputs of every token of the
            sample, so that the distance is sqrt(2 - 2 mean cosine)), ``gated-outputs`` (mean over the sample of the
            output times the softmax of the router scores, unit length), or ``ream`` (REAM's dissimilarity).

    Raises:
        UnknownName: no such features.
        ArchitectureMismatch: router scores are compared and the model records none.
    """
    missing = [name for name in needs(features) if name not in state.statistics]
    if missing or (features in _SCORED and state.sample.logits_TE is None):
        raise ArchitectureMismatch(
            f"{state.layer.block}: the model records no router scores, which {features} compares; use a recipe that "
            "compares outputs or weights, such as hc-smoe or mergemoe"
        )
    distance_EE = FEATURES[features][0](state)
    # Sums in another order differ in the last digits; a distance is symmetric all the same.
    return ((distance_EE + distance_EE.T) / 2).fill_diagonal_(0)


def pairwise_distance(rows_EN: Tensor) -> Tensor:
    """Return the Euclidean distances between rows, (E, E) float64, without holding E x E x N values."""
    return _square_distance(rows_EN).sqrt()


def gated_outputs(state: LayerState) -> Tensor:
    """Return the mean over the sample of ``p_te f_e(x_t)``, p the softmax of all router scores, as (E, D) float64.

    All tokens count for every expert, whether it was chosen or not. The down projection is applied once, to the mean of
    the activations, unless the family normalises each expert's output.
    """
    experts, sample = state.experts, state.sample
    assert sample.logits_TE is not None
    share_TE = sample.logits_TE.double().softmax(-1)
    rows = []
    for expert in range(experts.num_experts):
        total = torch.zeros((), dtype=torch.float64)
        for x_TD, share_T1 in zip(_chunks(sample.inputs_TD), _chunks(share_TE[:, expert, None]), strict=True):
            value = experts.hidden(expert, x_TD.float())
            if experts.finish is not None:
                value = experts.project(expert, value)
            total = total + (share_T1 * value.double()).sum(0)
        if experts.finish is None:
            total = experts.down_EDF[expert].double() @ total
            if experts.down_bias_ED is not None:
                total = total + share_TE[:, expert].sum() * experts.down_bias_ED[expert].double()
        rows.append(total / len(share_TE))
    return torch.stack(rows)


def cosines(rows_EN: Tensor) -> Tensor:
    """Return the cosines between rows, (E, E) float64; 0 with a row of zeros."""
    unit_EN = _unit(rows_EN.double())
    return (unit_EN @ unit_EN.T).clamp(-1, 1)


def _weights(state: LayerState) -> Tensor:
    projections = [tensor for tensor in (state.experts.up_EFD, state.experts.gate_EFD) if tensor is not None]
    return torch.stack([_square_distance(tensor.flatten(1)) for tensor in projections]).sum(0).sqrt()


def _router_scores(state: LayerState) -> Tensor:
    product_EE = state.statistics["logit_product"].double()
    norm_E = product_EE.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return _from_products(product_EE / norm_E[:, None] / norm_E[None, :])


def _outputs(state: LayerState) -> Tensor:
    return pairwise_distance(state.statistics["mean_output"] / state.statistics["tokens"])


def _token_outputs(state: LayerState) -> Tensor:
    experts, inputs_TD = state.experts, state.sample.inputs_TD
    count = experts.num_experts
    product_EE = torch.zeros(count, count, dtype=torch.float64)
    for x_TD in torch.split(inputs_TD, max(1, _VALUES // (count * inputs_TD.shape[1]))):
        unit_EN = torch.stack([_unit(experts.output(e, x_TD.float()).double()).flatten() for e in range(count)])
        product_EE += unit_EN @ unit_EN.T
    return _from_products(product_EE / len(inputs_TD))


def _gated_outputs(state: LayerState) -> Tensor:
    return _from_products(cosines(gated_outputs(state)))


def _ream(state: LayerState) -> Tensor:
    """Return 1 - the mean of (cosine of mean gated outputs + 1) / 2 and 1 - (distance of score columns / largest)."""
    output_EE = (cosines(gated_outputs(state)) + 1) / 2
    score_EE = _router_scores(state)
    similarity_EE = (output_EE + 1 - score_EE / score_EE.max().clamp(min=1e-300)) / 2
    return 1 - similarity_EE


#: Function by name, and the statistics that it reads.
FEATURES: dict[str, tuple[Callable[[LayerState], Tensor], tuple[str, ...]]] = {
    "weights": (_weights, ()),
    "router-scores": (_router_scores, ("logit_product",)),
    "outputs": (_outputs, ("mean_output", "tokens")),
    "token-outputs": (_token_outputs, ()),
    "gated-outputs": (_gated_outputs, ("logit_product",)),
    "ream": (_ream, ("logit_product",)),
}

_SCORED = ("gated-outputs", "ream")  # they read the scores of the sample


def _square_distance(rows_EN: Tensor) -> Tensor:
    total_EE = torch.zeros(len(rows_EN), len(rows_EN), dtype=torch.float64)
    for columns_EC in torch.split(rows_EN, _COLUMNS, dim=1):
        columns_EC = columns_EC.double()
        # Differences, not products: equal rows are at distance 0 exactly.
        total_EE += torch.cdist(columns_EC, columns_EC, compute_mode="donot_use_mm_for_euclid_dist").square()
    return total_EE


def _from_products(product_EE: Tensor) -> Tensor:
    """Return the distances of vectors from their inner products."""
    square_E = product_EE.diagonal()
    return (square_E[:, None] + square_E[None, :] - 2 * product_EE).clamp(min=0).sqrt()


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-300)


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    yield from torch.split(rows, 1024)
