"""Prune by search: keep the experts with which the layer's output on the sample stays nearest (NAEE, 2402.14800).

A subset of M experts is judged by what the layer does with it: tokens choose among the M by the family's own router,
and the squared distance of the routed output to the original one is summed over tokens. Where there are few subsets,
all are tried, as in the paper. Where there are many, the search starts from the M experts with the highest REAP score
and swaps one expert that is in for one that is out as long as that helps; the swaps that promise most are tried first.

The outputs of all experts are needed on all tokens, but only their inner products: with G_t = V_t V_t^T, where V_t
holds f_1(x_t) .. f_E(x_t) and the original output y_t, the distance of token t is c^T G_t c for the weights c of the
chosen experts and -1 for y_t. So a subset costs one routing decision and T K^2 multiplications.

Legend: E experts, M kept, D model width, T tokens, K chosen experts, V = E + 1 vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.scores import score_experts
from coterie.compress.methods.select import best_experts, keep_experts, planned_experts, slice_router
from coterie.compress.quick_route import SubsetRoute, find_quick_route
from coterie.compress.state import LayerState
from coterie.progress import advance

#: How long it takes, in times of running the token sample through all experts.
SAMPLE_RUNS = 3.0

#: Subsets that are judged at most: all where there are no more, else the search ends there.
EVALUATIONS = 4096

#: Outputs of an expert on a token that are computed at most, for all experts together; the sample is thinned to it.
OUTPUTS = 2**18

#: Inner products that are held at most (512 MiB in float32); the sample is thinned to it.
PRODUCTS = 2**27

#: Elements of expert outputs that are held at a time.
_CHUNK_ELEMENTS = 2**24


def needs() -> tuple[str, ...]:
    """The search starts from the experts with the highest REAP score."""
    return ("reap", "usage")


def subset_search(state: LayerState, plan: LayerPlan, *, evaluations: int = EVALUATIONS) -> LayerState:
    """Keep the `plan.num_experts` experts with which the routed output on the sample stays nearest to the original.

    With router groups, each group keeps its equal share. Protected experts stay; those that the plan names stay without
    a search.

    Args:
        state: the layer.
        plan: what it gets.
        evaluations: subsets that are judged at most.

    Raises:
        ArchitectureMismatch: the router cannot be run by itself.
    """
    num_experts, count = state.layer.num_experts, plan.num_experts
    if plan.experts is not None:
        return keep_experts(state, planned_experts(plan), "subset-search", {})
    if count == num_experts:
        return keep_experts(state, torch.arange(num_experts), "subset-search", {})
    start_M = best_experts(state, score_experts("reap", state.statistics, state.by_domain), count)
    exhaustive = (subsets := num_subsets(state, count)) <= evaluations
    judge = Judge(state, start_M, most=max(1, min(subsets, evaluations)))
    start_error = judge.error(start_M)
    if exhaustive:
        error, kept_M = min(
            ((judge.error(rows_M), rows_M) for rows_M in all_subsets(state, count)), key=lambda judged: judged[0]
        )
    else:
        error, kept_M = _swap(state, judge, start_M, start_error, evaluations)
    note = {
        "error": error / judge.target,
        "error_reap": start_error / judge.target,
        "subsets_judged": judge.evaluations,
        "exhaustive": exhaustive,
        "tokens": len(judge.tokens_T),
    }
    return keep_experts(state, kept_M, "subset-search", note)


def num_subsets(state: LayerState, count: int) -> int:
    """Return how many subsets of `count` experts hold an equal share of each router group and all protected experts."""
    share = count // state.layer.num_groups
    return math.prod(math.comb(len(free), share - len(protected)) for protected, free in _groups(state))


def all_subsets(state: LayerState, count: int) -> Iterator[Tensor]:
    """Yield these subsets (M,), their experts ascending."""
    share = count // state.layer.num_groups
    choices = [itertools.combinations(free, share - len(protected)) for protected, free in _groups(state)]
    all_protected = [expert for protected, _ in _groups(state) for expert in protected]
    for chosen in itertools.product(*choices):
        yield torch.tensor(sorted(itertools.chain(all_protected, *chosen)))


def _groups(state: LayerState) -> list[tuple[list[int], list[int]]]:
    """Return for each router group its protected experts and the others."""
    num_experts = state.layer.num_experts
    protected_E = torch.zeros(num_experts, dtype=torch.bool) if state.protected_E is None else state.protected_E
    return [
        ([e for e in rows.tolist() if protected_E[e]], [e for e in rows.tolist() if not protected_E[e]])
        for rows in torch.arange(num_experts).chunk(state.layer.num_groups)
    ]


def _swap(state: LayerState, judge: Judge, kept_M: Tensor, error: float, evaluations: int) -> tuple[float, Tensor]:
    """Swap experts as long as that helps and the evaluations last; return the error and the subset."""
    protected = set() if state.protected_E is None else set(state.protected_E.nonzero().flatten().tolist())
    improved = True
    while improved:
        improved = False
        for leaving, coming in judge.swaps(kept_M):
            if leaving in protected:
                continue
            if judge.evaluations >= evaluations:
                return error, kept_M
            trial_M = torch.cat((kept_M[kept_M != leaving], torch.tensor([coming]))).sort().values
            if (trial_error := judge.error(trial_M)) < error:
                error, kept_M, improved = trial_error, trial_M, True
                break
    return error, kept_M


class Judge:
    """Says how far a layer's output on the sample is from the original one with any subset of its experts.

    Attributes:
        tokens_T: the tokens of the sample that it judges by, evenly spaced.
        target: sum of |y_t|^2 over them.
        evaluations: subsets judged so far.
    """

    def __init__(self, state: LayerState, subset_M: Tensor, *, most: int = EVALUATIONS) -> None:
        """Compute the inner products of all experts' outputs, and look for a quick stand-in for the router.

        Args:
            state: the layer.
            subset_M: a subset of the size that will be judged.
            most: subsets that will be judged at most.
        """
        num_experts, sample = state.layer.num_experts, state.sample
        tokens = max(1, min(OUTPUTS // num_experts, PRODUCTS // (num_experts + 1) ** 2))
        self.tokens_T = torch.arange(0, len(sample.inputs_TD), math.ceil(len(sample.inputs_TD) / tokens))
        self.evaluations, self._most = 0, most
        self._state = state
        self._gram_TVV = self._products()
        self.target = float(self._gram_TVV[:, -1, -1].double().sum())
        self._route = self._router(subset_M)

    def error(self, rows_M: Tensor) -> float:
        """Return the sum over tokens of the squared distance between the output with these experts and the original."""
        self.evaluations += 1
        advance(1 / self._most)
        vector_TC, weight_TC = self._combination(rows_M)
        num_vectors = self._gram_TVV.shape[1]
        pair_TCC = vector_TC[:, :, None] * num_vectors + vector_TC[:, None, :]
        product_TCC = self._gram_TVV.flatten(1).gather(1, pair_TCC.flatten(1)).view(pair_TCC.shape)
        return float(torch.einsum("tc,tcd,td->t", weight_TC, product_TCC, weight_TC).double().sum())

    def swaps(self, rows_M: Tensor) -> list[tuple[int, int]]:
        """Return all swaps (expert in the subset, expert of the same router group out of it), the most promising first.

        Promise is the change of the squared distance if a token that loses an expert chose no other, and a token that
        had chosen the newcomer in the original model added it to what it has now.
        """
        num_experts = self._state.layer.num_experts
        vector_TC, weight_TC = self._combination(rows_M)
        row_TCV = self._gram_TVV.gather(1, vector_TC[:, :, None].expand(-1, -1, num_experts + 1))
        distance_TE = torch.einsum("tc,tcv->tv", weight_TC, row_TCV)[:, :num_experts]
        square_TE = self._gram_TVV.diagonal(dim1=1, dim2=2)[:, :num_experts]
        sample = self._state.sample
        now_TE = self._dense(vector_TC[:, :-1], weight_TC[:, :-1])
        before_TE = self._dense(sample.index_TK[self.tokens_T], sample.weight_TK[self.tokens_T].float())
        leaving_E = (now_TE.square() * square_TE - 2 * now_TE * distance_TE).double().sum(0).tolist()
        coming_E = (before_TE.square() * square_TE + 2 * before_TE * distance_TE).double().sum(0).tolist()
        inside = set(rows_M.tolist())
        groups = [group.tolist() for group in torch.arange(num_experts).chunk(self._state.layer.num_groups)]
        pairs = [(a, b) for group in groups for a in group if a in inside for b in group if b not in inside]
        return sorted(pairs, key=lambda pair: leaving_E[pair[0]] + coming_E[pair[1]])

    def _dense(self, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        num_experts = self._state.layer.num_experts
        dense_TE = torch.zeros(len(index_TK), num_experts + 1)
        return dense_TE.scatter_add_(1, index_TK.clamp(max=num_experts), weight_TK)[:, :num_experts]

    def _combination(self, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each token which vectors make up output minus target, and their weights; C = K + 1."""
        index_TK, weight_TK = self._route(rows_M)
        nobody_TK = index_TK >= len(rows_M)
        vector_TK = rows_M[index_TK.masked_fill(nobody_TK, 0)]
        last_T1 = torch.full((len(index_TK), 1), self._gram_TVV.shape[1] - 1)
        weight_TK = weight_TK.masked_fill(nobody_TK, 0.0)
        return torch.cat((vector_TK, last_T1), 1), torch.cat((weight_TK, -torch.ones(len(index_TK), 1)), 1)

    def _products(self) -> Tensor:
        """Return the inner products of f_1(x_t) .. f_E(x_t) and y_t for each token, (T, V, V) float32."""
        experts, sample = self._state.experts, self._state.sample
        num_vectors = experts.num_experts + 1
        gram_TVV = torch.empty(len(self.tokens_T), num_vectors, num_vectors)
        chunk = max(1, _CHUNK_ELEMENTS // (num_vectors * sample.inputs_TD.shape[1]))
        for start, rows in zip(range(0, len(self.tokens_T), chunk), torch.split(self.tokens_T, chunk), strict=True):
            inputs_TD = sample.inputs_TD[rows].float()
            outputs = [experts.output(expert, inputs_TD) for expert in range(experts.num_experts)]
            vectors_TVD = torch.stack((*outputs, sample.output_TD[rows].float()), dim=1)
            gram_TVV[start : start + chunk] = vectors_TVD @ vectors_TVD.transpose(1, 2)
        return gram_TVV

    def _router(self, subset_M: Tensor) -> SubsetRoute:
        state = self._state
        block_TD = state.sample.router_inputs_TD[self.tokens_T].float()

        def exact(rows_M: Tensor) -> tuple[Tensor, Tensor]:
            return state.route(slice_router(state, rows_M), block_TD)

        num_experts, axes = state.layer.num_experts, dict(state.layer.router_tensors)
        spare = any(tensor.shape[axes[name]] != num_experts for name, tensor in state.router.items())
        if state.layer.num_groups > 1 or spare:
            return exact
        generator = torch.Generator().manual_seed(state.seed)
        drawn = [torch.randperm(num_experts, generator=generator)[: len(subset_M)].sort().values for _ in range(2)]
        subsets = (torch.arange(num_experts), subset_M, *drawn)
        return find_quick_route(exact, state.router, axes, block_TD, subsets, top_k=state.layer.top_k) or exact
