"""A quick stand-in for a family's router, used only where it was seen to decide the same.

A search over subsets of experts asks the router thousands of times. Most routers are one linear map, a softmax or
sigmoid, perhaps a bias, and the K best; then the scores of all experts are computed once and a subset is some columns.
Which of these forms a router has is not looked up: each is tried against the router itself.

Legend: E experts, M of them, D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Experts that are there (M,) -> their numbers from 0 to M - 1 as chosen by each token (T, K), M means "no expert"; and
#: the routing weights (T, K).
SubsetRoute = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Largest difference between routing weights, relative to the largest weight.
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickRoute:
    """Scores of all experts on some tokens, and how choices and weights follow from them.

    Attributes:
        logits_TE: linear scores.
        choice_E: what is added to the probabilities before the best are chosen, but is no part of the weights.
        top_k: K.
        sigmoid: whether a probability is a sigmoid, else a softmax over the experts that are there.
        normalised: whether the weights of a token are scaled to a sum of 1.
        scale: what all weights are multiplied by.
    """

    logits_TE: Tensor
    choice_E: Tensor
    top_k: int
    sigmoid: bool
    normalised: bool
    scale: float = 1.0

    def __call__(self, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return the choice among the experts `rows_M`, see `SubsetRoute`."""
        logits_TM = self.logits_TE[:, rows_M]
        probability_TM = logits_TM.sigmoid() if self.sigmoid else logits_TM.softmax(-1)
        index_TK = (probability_TM + self.choice_E[rows_M]).topk(self.top_k, dim=-1).indices
        weight_TK = probability_TM.gather(1, index_TK)
        if self.normalised:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        return index_TK.masked_fill(weight_TK == 0, len(rows_M)), weight_TK * self.scale


def find_quick_route(
    route: SubsetRoute,
    router: Mapping[str, Tensor],
    axes: Mapping[str, int],
    block_TD: Tensor,
    subsets: Sequence[Tensor],
    *,
    top_k: int,
) -> QuickRoute | None:
    """Return a quick stand-in for a router that decides the same on all these tokens and subsets, or None.

    Args:
        route: the router itself.
        router: its tensors by name, with the rows of all E experts and no others.
        axes: the expert axis of each.
        block_TD: the tokens.
        subsets: experts (M,), among them the subset of all.
        top_k: K.
    """
    matrices = [name for name, tensor in router.items() if tensor.numel() > tensor.shape[axes[name]]]
    if len(matrices) != 1 or router[matrices[0]].shape[1:] != block_TD.shape[1:] or axes[matrices[0]] != 0:
        return None
    linear_TE = block_TD @ router[matrices[0]].T
    biases = [tensor.flatten() for name, tensor in router.items() if name not in matrices]
    expected = [route(rows_M) for rows_M in subsets]
    for sigmoid, normalised, *added in itertools.product((False, True), repeat=2 + len(biases)):
        zero_E = torch.zeros_like(linear_TE[0])
        in_logits_E = sum((bias_E for bias_E, to_logits in zip(biases, added, strict=True) if to_logits), zero_E)
        in_choice_E = sum((bias_E for bias_E, to_logits in zip(biases, added, strict=True) if not to_logits), zero_E)
        quick = QuickRoute(
            logits_TE=linear_TE + in_logits_E, choice_E=in_choice_E, top_k=top_k, sigmoid=sigmoid,
            normalised=normalised,
        )  # fmt: skip
        if (scale := _common_scale(quick, subsets, expected)) is not None:
            return replace(quick, scale=scale)
    return None


def _common_scale(
    quick: QuickRoute, subsets: Sequence[Tensor], expected: Sequence[tuple[Tensor, Tensor]]
) -> float | None:
    """Return the one factor between expected and quick weights where all choices are equal, or None."""
    scale: float | None = None
    for rows_M, (index_TK, weight_TK) in zip(subsets, expected, strict=True):
        quick_index_TK, quick_weight_TK = quick(rows_M)
        if quick_index_TK.shape != index_TK.shape:
            return None
        index_TK, order_TK = index_TK.sort(dim=1)
        quick_index_TK, quick_order_TK = quick_index_TK.sort(dim=1)
        weight_TK, quick_weight_TK = weight_TK.gather(1, order_TK), quick_weight_TK.gather(1, quick_order_TK)
        if not torch.equal(quick_index_TK, index_TK):
            return None
        if scale is None:
            scale = float(weight_TK.double().sum() / quick_weight_TK.double().sum().clamp(min=1e-300))
        largest = float(weight_TK.abs().max())
        if float((weight_TK - quick_weight_TK * scale).abs().max()) > TOLERANCE * largest:
            return None
    return scale
