"""Re-fit the router's rows so that the block's output is as near the original's as it can be.

After experts were merged or dropped, the rows that are left choose among other experts than they were trained for. The
family's own router is run with trainable rows (and biases), and the squared error of the routed output on the token
sample is minimised by Adam. The experts do not change, so what they output is reduced once, token by token, to their
inner products among each other and with the target; a step costs little more than the router itself.

No published method is followed. A quarter of the sample is held out. The rows of the step that did best there are kept,
and the old rows where none did better.

Legend: E experts of the original, M experts now, D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.state import LayerState
from coterie.model.arch.experts import Experts
from coterie.train.loop import Look, Loop
from coterie.train.optimiser import Adam
from coterie.train.schedule import Schedule, all_rows, falling_rate
from coterie.train.split import split

#: Largest number of float32 values that the inner products may take; of a larger sample, evenly spaced tokens are used.
LIMIT = 2**26

#: Every so many-th token of the sample is held out, where nobody says otherwise.
HELD_OUT = 4

#: Size of the first steps, as a share of a tensor's root mean square; it falls to 0 over the steps.
RATE = 0.03

#: How much of the moments of the gradient stays in a step, and what is added to the root of the second one where the
#: error to begin with counts as 1.
BETAS, EPSILON = (0.9, 0.999), 1e-6

#: Steps between two looks at the held-out tokens.
LOOK = 10

#: A gain on held-out tokens below this share of the error is none.
GAIN = 1e-3

#: A relative error below this is rounding: there is nothing to gain.
ROUNDING = 1e-6

_VALUES = 2**24  # outputs that are held at a time


def needs(**options: object) -> tuple[str, ...]:
    """Only the token sample is read."""
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What the experts output on some tokens, as far as the error of their weighted sums depends on it.

    Attributes:
        router_inputs_TD: what the block received.
        square_T: |y_t|^2 of the target.
        cross_TM: y_t . f_m(x_t).
        product_TMM: f_m(x_t) . f_n(x_t).
    """

    router_inputs_TD: Tensor
    square_T: Tensor
    cross_TM: Tensor
    product_TMM: Tensor

    @classmethod
    def of(cls, state: LayerState, token_N: Tensor) -> Outputs:
        """Compute the outputs of all experts of a layer on tokens of its sample."""
        experts, sample = state.experts, state.sample
        crosses, products = [], []
        chunk = max(1, _VALUES // (experts.num_experts * sample.output_TD.shape[1]))
        for rows in torch.split(token_N, chunk):
            output_TMD = _all_outputs(experts, sample.inputs_TD[rows].float())
            crosses.append((output_TMD @ sample.output_TD[rows].float()[:, :, None])[:, :, 0])
            products.append(output_TMD @ output_TMD.transpose(1, 2))
        return cls(
            router_inputs_TD=sample.router_inputs_TD[token_N].float(),
            square_T=sample.output_TD[token_N].float().square().sum(1),
            cross_TM=torch.cat(crosses),
            product_TMM=torch.cat(products),
        )

    def error(self, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return ``sum_t |y_t - sum_k w_tk f_{i_tk}(x_t)|^2 / sum_t |y_t|^2``; an index of M means "no expert"."""
        count = self.cross_TM.shape[1]
        weight_TK = weight_TK.masked_fill(index_TK >= count, 0)
        index_TK = index_TK.clamp(max=count - 1)
        cross_TK = self.cross_TM.gather(1, index_TK)
        token_T11 = torch.arange(len(index_TK), device=index_TK.device)[:, None, None]
        product_TKK = self.product_TMM[token_T11, index_TK[:, :, None], index_TK[:, None, :]]
        quadratic_T = (weight_TK[:, :, None] * product_TKK * weight_TK[:, None, :]).sum((1, 2))
        error_T = self.square_T - 2 * (weight_TK * cross_TK).sum(1) + quadratic_T
        return error_T.sum().clamp(min=0) / self.square_T.sum().clamp(min=1e-30)


def refit_router(state: LayerState, plan: LayerPlan, *, steps: int = 300, held_out: int = HELD_OUT) -> LayerState:
    """Re-fit the rows of a router that has one for each expert of the layer.

    Every router tensor of real numbers that the routing weights depend on is fitted; a correction bias that only steers
    the choice keeps its values, and so do rows behind the experts'.

    Args:
        state: a layer whose router has as many rows as it has experts.
        plan: not read.
        steps: steps of Adam.
        held_out: every so many-th token of the sample is held out.

    Raises:
        ArchitectureMismatch: the family's router cannot be run by itself.
    """
    layer, experts = state.layer, state.experts
    if (experts.num_experts, experts.width) == (layer.num_experts, layer.width):  # nothing was taken away
        return state
    fit_N, test_N = _split(state, held_out)
    fit, test = Outputs.of(state, fit_N), Outputs.of(state, test_N)
    best = start = dict(state.router)
    before = error = _error(state, test, start)
    trainable = _trainable(state, fit, start)
    if trainable and before > ROUNDING:
        change = {name: torch.zeros_like(start[name]) for name in trainable}

        def loss(rows_N: Tensor) -> Tensor:
            return fit.error(*state.route(_moved(start, change, trainable), fit.router_inputs_TD))

        loop = Loop(
            change,
            loss,
            # Steps are shares of each tensor already, by `_moved`.
            optimiser=Adam(change, betas=BETAS, epsilon=EPSILON, relative=False, unit=before),
            schedule=Schedule(
                steps=steps, rows=all_rows(len(fit_N)), rate=lambda step: falling_rate(step, steps, RATE)
            ),
            look=Look(every=LOOK, measure=lambda: _error(state, test, _moved(start, change, trainable)), least=before),
        )
        loop.run()
        if loop.best is not None:
            best, error = _moved(start, loop.best, trainable), loop.least
    accepted = error < before * (1 - GAIN)
    notes = {"heldout_error_before": before, "heldout_error_refit": error if accepted else before, "kept": not accepted}
    return replace(state, router=best if accepted else start, notes={**state.notes, "refit-router": notes})


def measure_router(state: LayerState, router: Mapping[str, Tensor], *, held_out: int = HELD_OUT) -> float:
    """Return the relative squared error of the block's routed output on held-out tokens with other router rows."""
    return _error(state, Outputs.of(state, _split(state, held_out)[1]), router)


def _split(state: LayerState, held_out: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of the sample to fit on, and those that are held out."""
    num_tokens = len(state.sample.inputs_TD)
    count = min(num_tokens, max(held_out, LIMIT // state.experts.num_experts**2))
    token_N = torch.arange(count) * num_tokens // count
    fit_N, heldout_N = split(count, held_out)
    return token_N[fit_N], token_N[heldout_N]


def _all_outputs(experts: Experts, inputs_TD: Tensor) -> Tensor:
    return torch.stack([experts.output(expert, inputs_TD) for expert in range(experts.num_experts)], dim=1)


def _error(state: LayerState, outputs: Outputs, router: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        return float(outputs.error(*state.route(router, outputs.router_inputs_TD)))


def _trainable(state: LayerState, fit: Outputs, router: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, for every tensor that the routing weights depend on, what a step of size 1 adds to each value."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in router.items() if tensor.is_floating_point()}
    with torch.enable_grad():
        loss = fit.error(*state.route({**router, **leaves}, fit.router_inputs_TD))
        if not loss.requires_grad:
            return {}
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    axes, scales = dict(state.layer.router_tensors), {}
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None and bool(gradient.any()):
            scale = torch.zeros_like(router[name])
            size = float(router[name].square().mean().sqrt()) or 1.0
            scale.narrow(axes[name], 0, state.experts.num_experts).fill_(size)
            scales[name] = scale
    return scales


def _moved(start: Mapping[str, Tensor], change: Mapping[str, Tensor], scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + scale[name] * change[name] if name in change else tensor for name, tensor in start.items()}
