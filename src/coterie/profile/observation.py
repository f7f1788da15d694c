"""What the seam shows of one layer for one batch of tokens; every statistic is a function of this.

Legend: E experts, D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch
from coterie.model.layers import Experts, MoELayer, canonical_experts, find_router
from coterie.model.seam import eager, intercepted, routed_output

#: Largest relative difference between a layer's own output and the recomputed one, by number format.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}

#: Tokens of a batch that the proof compares.
PROOF_TOKENS = 256


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
        thin: statistics that would cost more than the forward pass itself use every so many-th token only.
    """

    layer: MoELayer
    experts: Experts
    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    logits_TE: Tensor | None
    norm_TK: Tensor
    output_TD: Tensor
    thin: int = 1

    def sum_by_expert(self, value_TK: Tensor) -> Tensor:
        """Sum a value of each choice over the tokens that made it, (E,) float64."""
        total = value_TK.new_zeros(self.layer.num_experts + 1).double()
        index = self.index_TK.clamp(max=self.layer.num_experts).reshape(-1)
        return total.index_add_(0, index, value_TK.reshape(-1).double())[: self.layer.num_experts]


@contextmanager
def observed(model: PreTrainedModel, layers: tuple[MoELayer, ...], *, thin: int = 1) -> Iterator[list[Observation]]:
    """Within the block, one forward pass of `model` appends one Observation a layer to the list that is yielded."""
    by_module = {id(model.get_submodule(layer.experts)): layer for layer in layers}
    logits: dict[int, Tensor] = {}
    handles = []
    for layer in layers:
        found = find_router(model, layer.block)
        if found is not None:
            name, position = found
            handles.append(model.get_submodule(name).register_forward_hook(_keep_output(logits, layer.index, position)))
    observations: list[Observation] = []

    def observe(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        layer = by_module[id(module)]
        experts = canonical_experts(module)
        # Some families hand over tokens without an expert as a choice of the first one with weight 0.
        index_TK = index_TK.masked_fill(weight_TK == 0, layer.num_experts)
        norm_TK = torch.zeros(index_TK.shape, dtype=torch.float32, device=index_TK.device)

        def visit(expert: int, token_N: Tensor, slot_N: Tensor, output_ND: Tensor) -> None:
            norm_TK[token_N, slot_N] = output_ND.float().norm(dim=-1)

        output_TD = routed_output(experts, hidden_TD, index_TK, weight_TK, visit=visit)
        scores = logits.pop(layer.index, None)
        observations.append(
            Observation(
                layer=layer,
                experts=experts,
                hidden_TD=hidden_TD,
                index_TK=index_TK,
                weight_TK=weight_TK,
                logits_TE=None if scores is None else scores.flatten(0, -2)[:, : layer.num_experts],
                norm_TK=norm_TK,
                output_TD=output_TD,
                thin=thin,
            )
        )
        return output_TD

    try:
        with intercepted(model, observe):
            yield observations
        seen = [observation.layer.index for observation in observations]
        if seen != [layer.index for layer in layers]:
            raise ArchitectureMismatch(f"a forward pass ran the MoE layers {seen}, expected each of {len(layers)} once")
    finally:
        for handle in handles:
            handle.remove()


def prove_layers(model: PreTrainedModel, layers: tuple[MoELayer, ...], ids: Tensor) -> dict[int, float]:
    """Check on token ids (B, L) that every layer of a model computes what its canonical experts say; see `proving`."""
    with proving(model, layers) as errors, torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    return errors


@contextmanager
def proving(model: PreTrainedModel, layers: tuple[MoELayer, ...]) -> Iterator[dict[int, float]]:
    """Within the block, every layer is recomputed from canonical experts and must equal what the family's code returns.

    The most chosen expert is computed once more with its channels in reverse order, which must not matter: it shows
    that gate, up and down projection were read with the same idea of what a channel is. `PROOF_TOKENS` tokens of a
    call are compared.

    Args:
        model: the model, with the weights of these layers.
        layers: the layers that will run.

    Yields:
        For each layer that ran, the largest absolute difference over the largest absolute output.

    Raises:
        ArchitectureMismatch: a difference above `TOLERANCE`, with the layer and the error.
    """
    by_module = {id(model.get_submodule(layer.experts)): layer for layer in layers}
    errors: dict[int, float] = {}

    def compare(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        layer = by_module[id(module)]
        with eager(module):
            own_TD: Tensor = module(hidden_TD, index_TK, weight_TK)
        few_TD, few_TK, own_few_TD = hidden_TD[:PROOF_TOKENS], index_TK[:PROOF_TOKENS], own_TD[:PROOF_TOKENS]
        experts = canonical_experts(module)
        error = _relative_error(routed_output(experts, few_TD, few_TK, weight_TK[:PROOF_TOKENS]), own_few_TD)
        limit = TOLERANCE.get(own_TD.dtype, TOLERANCE[torch.float32])
        if not error <= limit:
            raise ArchitectureMismatch(
                f"{layer.experts}: recomputed from its weights, the layer differs from the model's own output by "
                f"{error:.2e} of its largest value (limit {limit:.0e}); this family computes something that Coterie "
                "does not know: please report it"
            )
        chosen = few_TK[few_TK < layer.num_experts].bincount(minlength=layer.num_experts).argmax()
        one = experts.select(chosen[None])
        channel_error = _relative_error(_with_channels_reversed(one).output(0, few_TD), one.output(0, few_TD))
        if not channel_error <= limit:
            raise ArchitectureMismatch(
                f"{layer.experts}: with its channels in another order, an expert's output differs by "
                f"{channel_error:.2e} of its largest value (limit {limit:.0e}); Coterie reads the gate and up "
                "projection of this family in a wrong layout: please report it"
            )
        errors[layer.index] = error
        return own_TD

    with intercepted(model, compare):
        yield errors


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute expected value."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (found.to(wide) - expected.to(wide)).abs().max().item()
    return difference / (expected.abs().max().item() or 1.0)


def _with_channels_reversed(experts: Experts) -> Experts:
    flipped: dict[str, Any] = {
        name: tensor.flip(-1 if name == "down_EDF" else 1)
        for name, tensor in experts.tensors().items()
        if name != "down_bias_ED"
    }
    return replace(experts, **flipped)


def _keep_output(kept: dict[int, Tensor], index: int, position: int) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        value = output[position] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        kept[index] = value.detach()

    return hook
