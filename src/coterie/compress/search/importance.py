"""How much each column of a matrix weighs where it is rounded: the mean square of what comes in, as for `nearest`.

That is the diagonal of what `coterie.compress.moments` sums up, of the original, without the products beside it.

Legend: E experts, C columns (inputs), D model width, F expert width, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.compress.moments import SHRINKAGE, Watch, watching
from coterie.compress.projections import DOWN
from coterie.compress.source import Source
from coterie.compress.weights import Weight
from coterie.model.stream.stream import Stage, Stream


@dataclass(kw_only=True)
class _ExpertSquares:
    """Sums of squares of one layer: of all tokens, of what comes into each expert, and of what is between."""

    all_C: Tensor
    into_ED: Tensor
    between_EF: Tensor
    num_tokens: int
    num_chosen_E: Tensor


@dataclass(kw_only=True)
class Importance:
    """Sums of squares of what comes into the matrices of a model.

    Attributes:
        linear: (C,) by name in memory of the weight.
        experts: by index of the MoE layer.
    """

    linear: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[int, _ExpertSquares] = field(default_factory=dict)

    def watch(
        self, stream: Stream, source: Source, stage: Stage, weights: Sequence[Weight], counts: Sequence[Tensor | None]
    ) -> None:
        """Send a unit's calls on, and add up what comes into its matrices.

        Args:
            stream: the model.
            source: the same by its headers.
            stage: the unit, with the weights of the original.
            weights: its matrices.
            counts: of each call which of its tokens count (B, S), bool; None where all do.
        """
        linear = [stream.conversion.memory_names[each.names[0]] for each in weights if each.kind == "linear"]
        indices = {weight.layer for weight in weights if weight.layer is not None}
        layers = [layer for layer in source.architecture.layers if layer.index in indices]
        if not linear and not layers:
            return
        module = stream.model.get_submodule(stage.unit.name)
        for call, counts_BS in zip(stage.calls, counts, strict=True):
            with watching(stream.model, stage.unit.name, module, linear, layers) as seen:
                call.finish(call.compute(seen.stand_in))
            self._add(seen, None if counts_BS is None else counts_BS.flatten())

    @torch.no_grad()
    def _add(self, seen: Watch, counts_T: Tensor | None) -> None:
        for name, input_TC in seen.linear.items():
            self.add_linear(name, input_TC, counts_T)
        for index, (experts, hidden_TD, index_TK, weight_TK) in seen.experts.items():
            if counts_T is not None and len(counts_T) == len(hidden_TD):
                rows_N = counts_T.to(hidden_TD.device).nonzero().flatten()
                hidden_TD, index_TK, weight_TK = hidden_TD[rows_N], index_TK[rows_N], weight_TK[rows_N]
            count, width = experts.num_experts, experts.width
            if index not in self.experts:
                zeros = hidden_TD.new_zeros(count, hidden_TD.shape[-1] + width, dtype=torch.float32)
                self.experts[index] = _ExpertSquares(
                    all_C=torch.zeros_like(zeros[0, :-width]), into_ED=zeros[:, :-width], between_EF=zeros[:, -width:],
                    num_tokens=0, num_chosen_E=torch.zeros(count),
                )  # fmt: skip
            sums = self.experts[index]
            sums.all_C += hidden_TD.float().square().sum(dim=0)
            sums.num_tokens += len(hidden_TD)
            for expert in range(count):
                token_N, slot_N = (index_TK == expert).nonzero(as_tuple=True)
                if not len(token_N):
                    continue
                # As the routing weight scales what the expert adds, errors of its columns weigh its square.
                weight_N1 = weight_TK[token_N, slot_N].float().square()[:, None]
                input_ND = hidden_TD[token_N]
                sums.into_ED[expert] += (weight_N1 * input_ND.float().square()).sum(dim=0)
                between_NF = experts.hidden(expert, input_ND).float()
                sums.between_EF[expert] += (weight_N1 * between_NF.square()).sum(dim=0)
                sums.num_chosen_E[expert] += len(token_N)

    def add_linear(self, name: str, input_TC: Tensor, counts_T: Tensor | None) -> None:
        """Add what came into a linear module, by the name in memory of its weight."""
        if counts_T is not None and len(counts_T) == len(input_TC):
            input_TC = input_TC[counts_T.to(input_TC.device)]
        square_C = input_TC.detach().float().square().sum(dim=0)
        self.linear[name] = self.linear[name] + square_C if name in self.linear else square_C

    def of_linear(self, name: str, matrix_RC: Tensor) -> Tensor:
        """Return the weights (1, C) of the columns of a matrix; all alike where nothing came in."""
        sum_C = self.linear.get(name)
        if sum_C is None or not bool(sum_C.sum() > 0):
            return torch.ones(1, matrix_RC.shape[-1], device=matrix_RC.device)
        return sum_C[None].to(matrix_RC.device)

    def of_experts(self, index: int, part: int) -> Tensor:
        """Return the weights (E, C) of the columns of a projection of a layer's experts.

        Experts of few tokens borrow from the layer as in `coterie.compress.moments.Moments.expert_inputs`.
        """
        sums = self.experts[index]
        own_EC = sums.between_EF if part == DOWN else sums.into_ED
        chosen_E1 = sums.num_chosen_E[:, None].to(own_EC.device)
        scale_E1 = own_EC.mean(dim=-1, keepdim=True)
        if part == DOWN:
            rest_EC = scale_E1.expand_as(own_EC)
        else:
            layer_C = sums.all_C / max(1, sums.num_tokens)
            size = layer_C.mean().clamp(min=torch.finfo(torch.float32).tiny)
            rest_EC = layer_C * torch.where(chosen_E1 > 0, scale_E1 / size, 1.0)
        share_E1 = SHRINKAGE / (chosen_E1 + SHRINKAGE)
        mixed_EC = (1 - share_E1) * own_EC + share_E1 * rest_EC
        return torch.where(mixed_EC.sum(dim=-1, keepdim=True) > 0, mixed_EC, 1.0)
