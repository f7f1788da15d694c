"""What comes into the matrices of a unit, as sums of products over tokens: the Hessians of quantisers.

Text goes through a unit in two lanes, see `coterie.compress.lanes`: what layers before it that are quantised already
put out, and what the original ones put out. Every linear module and every expert is watched in both.

Legend: N matrices, C columns (inputs), T tokens, E experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.model.arch.experts import Experts, canonical_experts
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.seam import intercepted, routed_output

#: Tokens whose worth an expert's own inputs are mixed with, those of all tokens of the layer.
SHRINKAGE = 500.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What comes into matrices that share a type.

    Attributes:
        hessian_NCC: sums of x x^T over the tokens that each matrix sees, as they come in.
        missed_NCC: sums of (o - x) x^T, with o what the original's matrix received; None where nobody asks.
        num_tokens: how many tokens each matrix saw.
    """

    hessian_NCC: Tensor
    missed_NCC: Tensor | None
    num_tokens: tuple[int, ...]

    def select(self, matrices: Sequence[int]) -> Inputs:
        """Return what comes into some of them; itself where it is all of them."""
        if tuple(matrices) == tuple(range(len(self.num_tokens))):
            return self
        index_N = torch.tensor(list(matrices), device=self.hessian_NCC.device)
        return Inputs(
            hessian_NCC=self.hessian_NCC[index_N],
            missed_NCC=None if self.missed_NCC is None else self.missed_NCC[index_N],
            num_tokens=tuple(self.num_tokens[matrix] for matrix in matrices),
        )


@dataclass(kw_only=True)
class Sum:
    """Sums for one matrix, or one of the matrices of a layer's experts."""

    hessian_CC: Tensor
    missed_CC: Tensor | None
    num_tokens: int = 0

    @classmethod
    def of(cls, columns: int, *, compares: bool, device: torch.device) -> Sum:
        """Return an empty one."""
        zeros = [torch.zeros(columns, columns, device=device) for _ in range(1 + compares)]
        return cls(hessian_CC=zeros[0], missed_CC=zeros[1] if compares else None)

    def add(self, input_TC: Tensor, original_TC: Tensor | None, weight_T: Tensor | None = None) -> None:
        """Add tokens, each with a weight."""
        input_TC = input_TC.detach().float()
        weighted_TC = input_TC if weight_T is None else input_TC * weight_T[:, None]
        self.hessian_CC += weighted_TC.T @ input_TC
        if self.missed_CC is not None and original_TC is not None:
            self.missed_CC += (original_TC.detach().float() - input_TC).T @ weighted_TC
        self.num_tokens += len(input_TC)


@dataclass(kw_only=True)
class ExpertSums:
    """Sums for the experts of one layer: what comes into gate and up, and what comes into down."""

    all_tokens: Sum
    into: list[Sum]
    between: list[Sum]


@dataclass(kw_only=True)
class Watch:
    """What one pass of a batch through a unit showed: inputs of linear modules and of experts, in one lane.

    `stand_in` is to be called in the place of a unit that is a linear module itself; None for any other.
    """

    stand_in: nn.Module | None = None
    linear: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[int, tuple[Experts, Tensor, Tensor, Tensor]] = field(default_factory=dict)


@contextmanager
def watching(
    model: PreTrainedModel, unit: str, module: nn.Module, names: Sequence[str], layers: Sequence[MoELayer]
) -> Iterator[Watch]:
    """Within the block, a call of a unit is watched.

    Args:
        model: the model that the module is of.
        unit: name of the unit.
        module: the unit itself.
        names: names in memory of the weights of linear modules that are of interest.
        layers: its MoE layers.
    """
    watch, handles = Watch(), []
    by_module = {id(model.get_submodule(layer.experts)): layer for layer in layers}
    for name in names:
        owner = module.get_submodule(name.removeprefix(f"{unit}.").rpartition(".")[0])
        if owner is module:  # its forward is called by itself, past hooks
            watch.stand_in = _Recorder(owner, watch, name)
            continue
        handles.append(owner.register_forward_pre_hook(_keeper(watch, name)))

    def keep(experts_module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        layer, experts = by_module[id(experts_module)], canonical_experts(experts_module)
        index_TK = index_TK.masked_fill(weight_TK == 0, layer.num_experts)
        watch.experts[layer.index] = (experts, hidden_TD, index_TK, weight_TK)
        return routed_output(experts, hidden_TD, index_TK, weight_TK)

    try:
        if layers:
            with intercepted(model, keep):
                yield watch
        else:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(nn.Module):
    """A linear module that keeps what it receives."""

    def __init__(self, inner: nn.Module, watch: Watch, name: str) -> None:
        super().__init__()
        self._compute, self._keep = inner.forward, _keeper(watch, name)

    def forward(self, *args: Tensor) -> Tensor:
        self._keep(self, args)
        output: Tensor = self._compute(*args)
        return output


def _keeper(watch: Watch, name: str):  # type: ignore[no-untyped-def]
    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        watch.linear[name] = args[0].detach().flatten(0, -2)

    return keep


@dataclass(kw_only=True)
class Moments:
    """The sums of one unit.

    Attributes:
        compares: whether what the original's layers received is wanted too.
        linear: by name in memory of the weight.
        experts: by index of the MoE layer.
    """

    compares: bool
    linear: dict[str, Sum] = field(default_factory=dict)
    experts: dict[int, ExpertSums] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, seen: Watch, original: Watch | None, counts_T: Tensor | None) -> None:
        """Add a batch.

        Args:
            seen: what the unit received from layers that are quantised.
            original: what it received from the original's; None where that is not compared.
            counts_T: which tokens count, bool; None for all.
        """
        for name, input_TC in seen.linear.items():
            original_TC = None if original is None else original.linear[name]
            kept = _counted(counts_T, input_TC)
            if name not in self.linear:
                self.linear[name] = Sum.of(input_TC.shape[-1], compares=self.compares, device=input_TC.device)
            self.linear[name].add(kept(input_TC), None if original_TC is None else kept(original_TC))
        for index, (experts, hidden_TD, index_TK, weight_TK) in seen.experts.items():
            other_TD = None if original is None else original.experts[index][1]
            self._add_experts(index, experts, hidden_TD, other_TD, index_TK, weight_TK, counts_T)

    def _add_experts(
        self,
        index: int,
        experts: Experts,
        hidden_TD: Tensor,
        other_TD: Tensor | None,
        index_TK: Tensor,
        weight_TK: Tensor,
        counts_T: Tensor | None,
    ) -> None:
        if index not in self.experts:
            self.experts[index] = self._empty(experts, hidden_TD)
        sums = self.experts[index]
        counted = _counted(counts_T, hidden_TD)
        sums.all_tokens.add(counted(hidden_TD), None if other_TD is None else counted(other_TD))
        counts = None if counts_T is None else counts_T.to(hidden_TD.device)
        for expert in range(experts.num_experts):
            token_N, slot_N = (index_TK == expert).nonzero(as_tuple=True)
            if counts is not None and len(counts) == len(hidden_TD):
                token_N, slot_N = token_N[counts[token_N]], slot_N[counts[token_N]]
            if not len(token_N):
                continue
            weight_N = weight_TK[token_N, slot_N].float().square()
            input_ND = hidden_TD[token_N]
            original_ND = None if other_TD is None else other_TD[token_N]
            sums.into[expert].add(input_ND, original_ND, weight_N)
            original_NF = None if original_ND is None else experts.hidden(expert, original_ND)
            sums.between[expert].add(experts.hidden(expert, input_ND), original_NF, weight_N)

    def _empty(self, experts: Experts, hidden_TD: Tensor) -> ExpertSums:
        device, width = hidden_TD.device, hidden_TD.shape[-1]

        def each(columns: int) -> list[Sum]:
            return [Sum.of(columns, compares=self.compares, device=device) for _ in range(experts.num_experts)]

        return ExpertSums(
            all_tokens=Sum.of(width, compares=self.compares, device=device), into=each(width),
            between=each(experts.width),
        )  # fmt: skip

    def linear_inputs(self, name: str) -> Inputs:
        """Return what comes into a linear module, by the name in memory of its weight."""
        return _stacked([self.linear[name]])

    def expert_inputs(self, index: int, *, between: bool, shrinkage: float = SHRINKAGE) -> Inputs:
        """Return what comes into the experts of a layer: into gate and up or, between these and down, into down.

        Experts of few tokens borrow from the layer: their mean product is mixed with that of all tokens, as if the
        layer's were `shrinkage` tokens more. Between, where neurons of different experts have nothing to do with each
        other, it is mixed with the mean of its own diagonal.
        """
        sums = self.experts[index]
        layer_CC = sums.all_tokens.hessian_CC / max(1, sums.all_tokens.num_tokens)
        mixed = []
        for each in sums.between if between else sums.into:
            own_CC, share = each.hessian_CC, shrinkage / (each.num_tokens + shrinkage) if each.num_tokens else 1.0
            scale = own_CC.diagonal().mean()
            if between:
                rest_CC = scale * torch.eye(len(own_CC), device=own_CC.device)
            else:
                # In the size of its own: routing weights are in there.
                size = layer_CC.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
                rest_CC = layer_CC * (scale / size if each.num_tokens else 1.0)
            mixed.append(
                Sum(
                    hessian_CC=(1 - share) * own_CC + share * rest_CC,
                    missed_CC=None if each.missed_CC is None else (1 - share) * each.missed_CC,
                    num_tokens=each.num_tokens,
                )
            )
        return _stacked(mixed)


def _stacked(sums: Sequence[Sum]) -> Inputs:
    missed = [each.missed_CC for each in sums if each.missed_CC is not None]
    return Inputs(
        hessian_NCC=torch.stack([each.hessian_CC for each in sums]),
        missed_NCC=torch.stack(missed) if missed else None,
        num_tokens=tuple(each.num_tokens for each in sums),
    )


def _counted(counts_T: Tensor | None, like_TC: Tensor):  # type: ignore[no-untyped-def]
    """Return a function that leaves out the tokens that do not count, where rows are tokens."""
    if counts_T is None or len(counts_T) != len(like_TC):
        return lambda value_TC: value_TC
    rows_N = counts_T.to(like_TC.device).nonzero().flatten()
    return lambda value_TC: value_TC[rows_N]
