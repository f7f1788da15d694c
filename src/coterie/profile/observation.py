"""What the seam shows of one layer for one batch of tokens; every statistic is a function of this.

Legend: E experts, D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch
from coterie.model.arch.experts import Experts, canonical_experts
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.router_scores import router_scores
from coterie.model.arch.seam import eager, intercepted, routed_output

#: Largest relative difference between a layer's own output and the recomputed one, by number format.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}

#: Tokens of a batch that the proof compares.
PROOF_TOKENS = 256

Visit = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]

#: Fields of an observation that cost something and are filled only where they are asked for.
FIELDS = frozenset({"norm_TK", "peak_TK", "hidden_square_EF", "gated_hidden_square_EF"})


#: Fields that have a row for each token.
_BY_TOKEN = (
    "hidden_TD", "index_TK", "weight_TK", "logits_TE", "output_TD", "norm_TK", "peak_TK", "block_TD", "residual_TD",
    "block_output_TD", "after_TD", "gradient_TD",
)  # fmt: skip


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
        output_TD: routed output, without shared experts.
        norm_TK: Euclidean norm of f_e(x_t) for each chosen expert, 0 for "no expert", float32. This and the next three
            are None where they were not asked for.
        peak_TK: largest absolute element of f_e(x_t) for each chosen expert, 0 for "no expert", float32.
        hidden_square_EF: sum of h_e(x_t)^2 over the tokens that chose e, float64.
        gated_hidden_square_EF: sum of (g_te h_e(x_t))^2 over them, float64.
        block_TD: what the block that holds router and experts received; None where it takes more than one tensor.
        residual_TD: what the norm before the block received: the residual stream before the block; None where no module
            next to the block makes the block's input.
        block_output_TD: what the block returned, shared experts included; None where it is not known.
        after_TD: what the decoder layer returned: the residual stream behind the block; None where it is not known.
        gradient_TD: gradient of the summed next-token loss (nats) with respect to `output_TD`; None in a forward pass.
        thin: statistics that would cost more than the forward pass itself use every so many-th token only.
    """

    layer: MoELayer
    experts: Experts
    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    logits_TE: Tensor | None
    output_TD: Tensor
    norm_TK: Tensor | None = None
    peak_TK: Tensor | None = None
    hidden_square_EF: Tensor | None = None
    gated_hidden_square_EF: Tensor | None = None
    block_TD: Tensor | None = None
    residual_TD: Tensor | None = None
    block_output_TD: Tensor | None = None
    after_TD: Tensor | None = None
    gradient_TD: Tensor | None = None
    thin: int = 1

    def select(self, counts_T: Tensor) -> Observation:
        """Return what there is of the tokens that count (bool); what is a sum already stays, see `observed`."""
        rows_N = counts_T.to(self.hidden_TD.device).nonzero().flatten()
        by_token = {name: value[rows_N] for name in _BY_TOKEN if (value := getattr(self, name)) is not None}
        return replace(self, **by_token)

    def chosen(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (expert, token_N, weight_N) for every chosen expert: the rows that chose it, its weights there."""
        for expert in range(self.layer.num_experts):
            token_N, slot_N = (self.index_TK == expert).nonzero(as_tuple=True)
            if len(token_N):
                yield expert, token_N, self.weight_TK[token_N, slot_N]

    def sum_by_expert(self, value_TK: Tensor) -> Tensor:
        """Sum a value of each choice over the tokens that made it, (E,) float64."""
        total = value_TK.new_zeros(self.layer.num_experts + 1).double()
        index = self.index_TK.clamp(max=self.layer.num_experts).reshape(-1)
        return total.index_add_(0, index, value_TK.reshape(-1).double())[: self.layer.num_experts]


@contextmanager
def observed(
    model: PreTrainedModel,
    layers: tuple[MoELayer, ...],
    *,
    thin: int = 1,
    gradients: dict[int, Tensor] | None = None,
    fields: Collection[str] = FIELDS,
    counts_T: Tensor | None = None,
) -> Iterator[list[Observation]]:
    """Within the block, one forward pass of `model` appends one Observation a layer to the list that is yielded.

    A backward pass in the block puts the gradient with respect to each layer's routed output (T, D) into `gradients`,
    by the layer's index.

    Args:
        model: the model.
        layers: its MoE layers, all that the forward pass runs.
        thin: see `Observation`.
        gradients: where gradients go.
        fields: which of `FIELDS` are filled.
        counts_T: which tokens count in the fields that are sums over tokens, bool; None for all. The others have all
            tokens, see `Observation.select`.
    """
    by_module = {id(model.get_submodule(layer.experts)): layer for layer in layers}
    received: dict[int, Tensor] = {}
    streams: dict[int, Tensor] = {}
    observations: list[Observation] = []
    handles = []
    for layer in layers:
        block = model.get_submodule(layer.block)
        calls: list[tuple[Tensor, Tensor]] = []
        around = model.get_submodule(layer.block.rpartition(".")[0])
        handles += [each.register_forward_hook(_keep_call(calls)) for each in around.children() if each is not block]
        keep = _keep_input(received, streams, calls, layer.index)
        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
        handles.append(block.register_forward_hook(_add_output(observations, layer.index, "block_output_TD")))
        handles.append(around.register_forward_hook(_add_output(observations, layer.index, "after_TD")))

    def observe(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        layer = by_module[id(module)]
        experts = canonical_experts(module)
        # Some families hand over tokens without an expert as a choice of the first one with weight 0.
        index_TK = index_TK.masked_fill(weight_TK == 0, layer.num_experts)
        filled = {field: _nothing(field, index_TK, experts) for field in fields}
        visit = _filler(filled, weight_TK, counts_T) if filled else None
        output_TD = routed_output(experts, hidden_TD, index_TK, weight_TK, visit=visit)
        observations.append(
            Observation(
                layer=layer,
                experts=experts,
                hidden_TD=hidden_TD.detach(),
                index_TK=index_TK,
                weight_TK=weight_TK.detach(),
                logits_TE=logits.pop(layer.index, None),
                output_TD=output_TD.detach(),
                norm_TK=filled.get("norm_TK"),
                peak_TK=filled.get("peak_TK"),
                hidden_square_EF=filled.get("hidden_square_EF"),
                gated_hidden_square_EF=filled.get("gated_hidden_square_EF"),
                block_TD=received.pop(layer.index, None),
                residual_TD=streams.pop(layer.index, None),
                thin=thin,
            )
        )
        if gradients is not None and output_TD.requires_grad:
            output_TD.register_hook(functools.partial(gradients.__setitem__, layer.index))  # type: ignore[no-untyped-call]
        return output_TD

    try:
        with router_scores(model, layers) as logits, intercepted(model, observe):
            yield observations
        seen = [observation.layer.index for observation in observations]
        if seen != [layer.index for layer in layers]:
            raise ArchitectureMismatch(f"a forward pass ran the MoE layers {seen}, expected each of {len(layers)} once")
    finally:
        for handle in handles:
            handle.remove()


def _nothing(field: str, index_TK: Tensor, experts: Experts) -> Tensor:
    """Return zeros for one of `FIELDS`: values of choices where the tokens are, sums of neurons on the CPU."""
    if field.endswith("_TK"):
        return torch.zeros(index_TK.shape, dtype=torch.float32, device=index_TK.device)
    return torch.zeros(experts.num_experts, experts.width, dtype=torch.float64)


def _filler(filled: Mapping[str, Tensor], weight_TK: Tensor, counts_T: Tensor | None) -> Visit:
    """Return what `routed_output` calls for every chosen expert: it fills the fields that are there."""
    if counts_T is not None:
        counts_T = counts_T.to(weight_TK.device)

    @torch.no_grad()
    def visit(expert: int, token_N: Tensor, slot_N: Tensor, hidden_NF: Tensor, output_ND: Tensor) -> None:
        if "norm_TK" in filled:
            filled["norm_TK"][token_N, slot_N] = output_ND.float().norm(dim=-1)
        if "peak_TK" in filled:
            filled["peak_TK"][token_N, slot_N] = output_ND.float().abs().amax(dim=-1)
        if counts_T is not None:
            counts_N = counts_T[token_N]
            token_N, slot_N, hidden_NF = token_N[counts_N], slot_N[counts_N], hidden_NF[counts_N]
        if "hidden_square_EF" in filled:
            square_NF = hidden_NF.float().square()
            filled["hidden_square_EF"][expert] = square_NF.sum(0, dtype=torch.float64).cpu()
        if "gated_hidden_square_EF" in filled:
            gated_NF = hidden_NF.float().square() * weight_TK[token_N, slot_N, None].float().square()
            filled["gated_hidden_square_EF"][expert] = gated_NF.sum(0, dtype=torch.float64).cpu()

    return visit


def with_residual(observation: Observation, output: object) -> Observation:
    """Return the observation with what its decoder layer returned, the first tensor of `output`, as `after_TD`.

    For a layer whose forward function was called directly, so that no hook of it saw the output.
    """
    return replace(observation, after_TD=_first_tensor(output, len(observation.hidden_TD)))


def _first_tensor(output: object, num_tokens: int) -> Tensor | None:
    """Return the first tensor of what a module returned as (T, D), detached; None where it has other tokens."""
    first = output
    while isinstance(first, tuple | list) and first:
        first = first[0]
    if not isinstance(first, Tensor) or first.ndim < 2 or first.shape[:-1].numel() != num_tokens:
        return None
    return first.detach().flatten(0, -2)


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


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute expected value."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (actual.to(wide) - expected.to(wide)).abs().max().item()
    return difference / (expected.abs().max().item() or 1.0)


def _with_channels_reversed(experts: Experts) -> Experts:
    flipped: dict[str, Any] = {
        name: tensor.flip(-1 if name == "down_EDF" else 1)
        for name, tensor in experts.tensors().items()
        if name != "down_bias_ED"
    }
    return replace(experts, **flipped)


def _keep_call(calls: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    """Return a hook that keeps (input, output) of the last call, where both are tensors of one shape."""

    def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        calls.clear()
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((inputs[0], output))

    return hook


def _keep_input(
    kept: dict[int, Tensor], streams: dict[int, Tensor], calls: list[tuple[Tensor, Tensor]], index: int
) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
    """Return a hook that keeps what a block receives, and what the module that made it had received."""

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) == 1:
            kept[index] = tensors[0].detach().flatten(0, -2)
            if calls and calls[0][1] is tensors[0] and calls[0][0].shape == tensors[0].shape:
                streams[index] = calls[0][0].detach().flatten(0, -2)
        calls.clear()

    return hook


def _add_output(observations: list[Observation], index: int, field: str) -> Callable[[nn.Module, object, object], None]:
    """Return a hook that adds what a module returned to the observation of a layer, where that is the last one."""

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if observations and (seen := observations[-1]).layer.index == index:
            returned: dict[str, Any] = {field: _first_tensor(output, len(seen.hidden_TD))}
            observations[-1] = replace(seen, **returned)

    return hook
