"""Block reconstruction: train all projections of a layer's experts towards the output that the layer should have.

A few hundred steps on minibatches of the token sample, the routing as it is now. The loss is the squared error of the
routed output, relative to the output itself. What the layer receives and what it should return come with the sample:
with compressed inputs that is what the compressed layers before it really produce, and the original model's output, as
in BRECQ (2102.05426) and sequential GPTQ (2210.17323). Tokens that are held out decide whether the result is taken.

Legend: E experts of the original, M experts now, F expert width, D model width, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from coterie.compress.adam import Adam, rate_at
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.refit_joint import HELD_OUT
from coterie.compress.state import LayerState
from coterie.model.arch.experts import Experts
from coterie.model.arch.seam import routed_output

_CHUNK = 4096  # tokens


def needs(**options: object) -> tuple[str, ...]:
    """Only the sample is read."""
    return ()


def reconstruct(
    state: LayerState, plan: LayerPlan, *, steps: int = 200, tokens: int = 1024, rate: float = 0.01
) -> LayerState:
    """Train gate, up and down projections and their biases on the token sample.

    Args:
        state: the layer.
        plan: not read.
        steps: steps of the optimizer.
        tokens: tokens of a step.
        rate: largest step of an entry, relative to the root mean square of its tensor.
    """
    sample = state.sample
    index_TK, weight_TK = state.routing()
    held_T = torch.arange(len(index_TK)) % HELD_OUT == HELD_OUT - 1
    data = (sample.inputs_TD.float(), index_TK, weight_TK.float(), sample.output_TD.float())
    fit, held = ([part[chosen_T] for part in data] for chosen_T in (~held_T, held_T))
    scale = float(fit[3].square().mean().clamp(min=1e-30))
    weights = {name: tensor.clone().requires_grad_(True) for name, tensor in state.experts.tensors().items()}
    adam = Adam(weights)
    trained = replace(state.experts, **cast(dict[str, Any], weights))
    generator = torch.Generator().manual_seed(state.seed)
    order = torch.randperm(len(fit[0]), generator=generator)
    for step in range(steps):
        if len(order) < tokens:
            order = torch.cat((order, torch.randperm(len(fit[0]), generator=generator)))
        rows, order = order[:tokens], order[tokens:]
        inputs_TD, index, weight, target_TD = (part[rows] for part in fit)
        with torch.enable_grad():
            found_TD = routed_output(trained.apart(), inputs_TD, index, weight)
            loss = (found_TD - target_TD).square().mean() / scale
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        filled = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(weights.values(), gradients, strict=True)
        ]
        adam.step(filled, rate_at(step, steps, rate))
    trained = trained.map(Tensor.detach)
    before, after = (_error(experts, held) for experts in (state.experts, trained))
    notes = {"heldout_error_before": before, "heldout_error_after": min(before, after), "taken": after < before}
    return replace(
        state,
        experts=trained if after < before else state.experts,
        notes={**state.notes, "reconstruct": notes},
    )


def _error(experts: Experts, data: list[Tensor]) -> float:
    """Return |target - output|^2 / |target|^2 over tokens."""
    inputs_TD, index_TK, weight_TK, target_TD = data
    error = 0.0
    for rows in torch.split(torch.arange(len(inputs_TD)), _CHUNK):
        found_TD = routed_output(experts, inputs_TD[rows], index_TK[rows], weight_TK[rows])
        error += float((found_TD - target_TD[rows]).double().square().sum())
    return error / max(1e-300, float(target_TD.double().square().sum()))
