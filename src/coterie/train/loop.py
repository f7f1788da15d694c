"""The one training loop: some tensors, a loss of some rows, a schedule and an optimiser.

    loop = Loop(weights, loss, optimiser=Adam(weights), schedule=schedule, micro=2, workers=4)
    loop.run(says="training", save=keep)

A step is computed in micro-batches of `micro` rows, by threads that share them out; what they give is added up in
their order, so that the result does not depend on the threads. All that the next step depends on is the state: a loop
that is restored from it goes on with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.model.threads import shared_out
from coterie.progress import advance, track
from coterie.train.optimiser import Optimiser
from coterie.train.schedule import Schedule

#: The mean loss of some rows, by their numbers; a scalar that depends on the weights.
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A look at what the weights are worth, so that those that were worth most are kept.

    Attributes:
        every: steps between two looks; there is one behind the last step too.
        measure: what is to be small, with the weights as they are when it is called; as a rule an error on held-out
            rows. No gradients are computed meanwhile.
        least: what must be undercut for weights to be kept.
    """

    every: int
    measure: Callable[[], float]
    least: float


class Loop:
    """Training on its way.

    Attributes:
        weights: the tensors that are trained, by name; they are changed in place, and need gradients from now on.
        schedule: how long, on what, and how fast.
        step: steps done.
        best: copies of the weights that looked best, by name; None as long as no look undercut `Look.least`.
        least: the least that a look measured, or `Look.least`; infinite where nobody looks.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        loss: Loss,
        *,
        optimiser: Optimiser,
        schedule: Schedule,
        micro: int | None = None,
        workers: int = 1,
        look: Look | None = None,
    ) -> None:
        """Begin; nothing is computed yet.

        Args:
            weights: the tensors.
            loss: of rows that the schedule names.
            optimiser: made from the same tensors in the same order.
            schedule: how long, on what, and how fast.
            micro: rows that are computed at once; None for all of a step.
            workers: threads that share out a step.
            look: see there; None for none.
        """
        self.weights = dict(weights)
        self.schedule = schedule
        self.step = 0
        self.best: dict[str, Tensor] | None = None
        self.least = float("inf") if look is None else look.least
        self._loss = loss
        self._optimiser = optimiser
        self._micro = micro
        self._workers = workers
        self._look = look
        for tensor in self.weights.values():
            tensor.requires_grad_(True)

    def run(
        self,
        *,
        says: str | None = None,
        after: Callable[[int, float], None] | None = None,
        save: Callable[[int, dict[str, Tensor]], None] | None = None,
        save_seconds: float = 60.0,
    ) -> None:
        """Take all steps that are left.

        Args:
            says: what the progress bar says; None for no bar.
            after: called after each step with the number of steps done and the mean loss before the step.
            save: called with the number of steps done and the state, at the end and whenever `save_seconds` have
                passed; the state is only good until it returns.
            save_seconds: seconds between two calls of `save`.
        """
        steps = range(self.step, self.schedule.steps)
        at = time.monotonic()
        for _ in steps if says is None else track(steps, says, total=len(steps)):
            loss = self.advance()
            if says is None:
                advance(1 / len(steps))
            if after is not None:
                after(self.step, loss)
            if save is not None and (self.step == self.schedule.steps or time.monotonic() - at >= save_seconds):
                save(self.step, self.state())
                at = time.monotonic()

    def advance(self) -> float:
        """Take one step; return the mean loss of its rows before it."""
        loss, gradients = self._gradients(self.schedule.rows(self.step))
        self._optimiser.step(gradients, self.schedule.rate(self.step))
        del gradients
        self.step += 1
        if self._look is not None and (self.step % self._look.every == 0 or self.step == self.schedule.steps):
            self._compare(self._look)
        return loss

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on, as one flat dict; its tensors are the loop's own, not copies."""
        state = {"step": torch.tensor(self.step), "least": torch.tensor(self.least, dtype=torch.float64)}
        state |= {f"weight.{name}": tensor.detach() for name, tensor in self.weights.items()}
        state |= {f"optimiser.{name}": tensor for name, tensor in self._optimiser.state().items()}
        state |= {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, which is only read."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

        self.step = int(state["step"])
        self.least = float(state["least"])
        for name, tensor in self.weights.items():
            tensor.copy_(state[f"weight.{name}"])
        self._optimiser.restore(below("optimiser."))
        best = {name: tensor.to(self.weights[name].device, copy=True) for name, tensor in below("best.").items()}
        self.best = best or None

    def _gradients(self, rows_N: Tensor) -> tuple[float, list[Tensor]]:
        """Return the mean loss of some rows, and its gradients in the order of the weights."""
        weights = list(self.weights.values())

        def compute(micro_batch_N: Tensor) -> tuple[float, tuple[Tensor, ...]]:
            with torch.enable_grad():  # holds for one thread only
                loss = self._loss(micro_batch_N)
                # A weight may have no influence: an expert that nobody chose, a bias that only steers the choice.
                gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
                return float(loss.detach()), gradients

        micro_batches = _micro_batches(rows_N, self._micro)
        total, sums = 0.0, list[Tensor]()
        with shared_out(compute, micro_batches, self._workers) as results:
            for micro_batch_N, (loss, gradients) in zip(micro_batches, results, strict=True):
                total += loss * len(micro_batch_N)
                share = len(micro_batch_N) / len(rows_N)
                if sums:
                    for accumulated, gradient in zip(sums, gradients, strict=True):
                        accumulated += share * gradient
                else:
                    sums = [gradient if share == 1 else share * gradient for gradient in gradients]
                del gradients  # else they would be in memory while the next ones are computed
        return total / len(rows_N), sums

    @torch.no_grad()
    def _compare(self, look: Look) -> None:
        now = look.measure()
        if now < self.least:
            self.least = now
            self.best = {name: tensor.detach().clone() for name, tensor in self.weights.items()}


def mean_loss(loss: Loss, rows_N: Tensor, *, micro: int | None = None, workers: int = 1) -> float:
    """Return the mean loss of rows; no gradients are computed.

    Args:
        loss: see `Loss`.
        rows_N: numbers of the rows.
        micro: rows that are computed at once; None for all.
        workers: threads that share them out; the result does not depend on it.
    """

    def compute(micro_batch_N: Tensor) -> float:
        with torch.no_grad():  # holds for one thread only
            return float(loss(micro_batch_N)) * len(micro_batch_N)

    with shared_out(compute, _micro_batches(rows_N, micro), workers) as losses:
        return float(sum(losses) / len(rows_N))


def _micro_batches(rows_N: Tensor, micro: int | None) -> tuple[Tensor, ...]:
    return torch.split(rows_N, len(rows_N) if micro is None else micro)
