"""What the seam shows of one layer for one batch of tokens; every statistic is a function of this."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from coterie.model.layers import Experts, MoELayer


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One layer, one batch of one domain.

    Attributes:
        layer: facts of the layer.
        experts: its canonical experts.
        hidden_TD: what the experts received.
        index_TK: chosen experts; E or more means "no expert".
        weight_TK: routing weights that the model really applied.
        logits_TE: router scores of all experts as the model records them, or None.
        norm_TK: Euclidean norm of f_e(x_t) for each chosen expert, 0 for "no expert".
        output_TD: routed output, without shared experts.
    """

    layer: MoELayer
    experts: Experts
    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    logits_TE: Tensor | None
    norm_TK: Tensor
    output_TD: Tensor

    def sum_by_expert(self, value_TK: Tensor) -> Tensor:
        """Sum a value of each choice over the tokens that made it, (E,) float64."""
        total = value_TK.new_zeros(self.layer.num_experts + 1).double()
        index = self.index_TK.clamp(max=self.layer.num_experts).reshape(-1)
        return total.index_add_(0, index, value_TK.reshape(-1).double())[: self.layer.num_experts]
