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

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.state import LayerState
from coterie.model.arch.experts import Experts
from coterie.model.arch.seam import routed_output
from coterie.train.loop import Look, Loop
from coterie.train.optimiser import Adam
from coterie.train.schedule import Drawn, Schedule, rate_at
from coterie.train.split import split

_CHUNK = 4096  # tokens


def needs(**options: object) -> tuple[str, ...]:
    """Only the sample is read."""
    return ()


def reconstruct(
    state: LayerState,
    plan: LayerPlan,
    *,
    steps: int = 200,
    tokens: int = 1024,
    rate: float = 0.01,
    held_out: int = 8,
) -> LayerState:
    """Train gate, up and down projections and their biases on the token sample.

    Args:
        state: the layer.
        plan: not read.
        steps: steps of the optimizer.
        tokens: tokens of a step.
        rate: largest step of an entry, relative to the root mean square of its tensor.
        held_out: every so many-th token is held out.
    """
    sample = state.sample
    index_TK, weight_TK = state.routing()
    data = (sample.inputs_TD.float(), index_TK, weight_TK.float(), sample.output_TD.float())
    fit_N, heldout_N = split(len(index_TK), held_out)
    heldout = [tensor[heldout_N] for tensor in data]
    scale = float(data[-1][fit_N].square().mean().clamp(min=1e-30))
    weights = {name: tensor.clone() for name, tensor in state.experts.tensors().items()}
    trained = replace(state.experts, **cast(dict[str, Any], weights))

    def loss(rows_N: Tensor) -> Tensor:
        inputs_TD, index_TK, weight_TK, target_TD = (tensor[fit_N[rows_N]] for tensor in data)
        output_TD = routed_output(trained.apart(), inputs_TD, index_TK, weight_TK)
        return (output_TD - target_TD).square().mean() / scale

    before = _error(state.experts, heldout)
    loop = Loop(
        weights,
        loss,
        optimiser=Adam(weights),
        schedule=Schedule(
            steps=steps, rows=Drawn(len(fit_N), tokens, state.seed), rate=lambda step: rate_at(step, steps, rate)
        ),
        look=Look(every=steps, measure=lambda: _error(trained, heldout), least=before),
    )
    loop.run()
    notes = {"heldout_error_before": before, "heldout_error_after": loop.least, "taken": loop.best is not None}
    experts = state.experts if loop.best is None else replace(state.experts, **cast(dict[str, Any], loop.best))
    return replace(state, experts=experts, notes={**state.notes, "reconstruct": notes})


def _error(experts: Experts, data: list[Tensor]) -> float:
    """Return |target - output|^2 / |target|^2 over tokens."""
    inputs_TD, index_TK, weight_TK, target_TD = data
    error = 0.0
    for rows in torch.split(torch.arange(len(inputs_TD)), _CHUNK):
        output_TD = routed_output(experts, inputs_TD[rows], index_TK[rows], weight_TK[rows])
        error += float((output_TD - target_TD[rows]).double().square().sum())
    return error / max(1e-300, float(target_TD.double().square().sum()))
