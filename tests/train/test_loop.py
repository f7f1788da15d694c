"""The loop: steps against a slow one, the same bits with more threads and from every saved state, the best look."""

import math

import pytest
import torch

from coterie.train.loop import Look, Loop, mean_loss
from coterie.train.optimiser import Adam
from coterie.train.schedule import Drawn, Schedule, all_rows, rate_at, shuffled
from some import first

STEPS, COUNT = 9, 30
ORDERS = {
    "shuffled": lambda: shuffled(COUNT, 7, seed=2),
    "drawn": lambda: Drawn(COUNT, 7, seed=2),
    "more than there are": lambda: Drawn(COUNT, 100, seed=2),
    "all": lambda: all_rows(COUNT),
}


class Descent:
    """Plain gradient descent, so that a slow loop is short."""

    def __init__(self, weights):
        self._weights = weights

    @torch.no_grad()
    def step(self, gradients, rate):
        for tensor, gradient in zip(self._weights.values(), gradients, strict=True):
            tensor -= rate * gradient

    def state(self):
        return {}

    def restore(self, state):
        assert not state


def problem(order="shuffled", *, look_every=None, optimiser=Adam, micro=2, workers=1, dtype=torch.float32):
    """A small network that learns a function; one of its weights has no influence."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs, targets = draw(COUNT, 4), draw(COUNT, 3)
    held_inputs, held_targets = draw(10, 4), draw(10, 3)
    weights = {"first": draw(4, 5), "unused": draw(2), "second": draw(5, 3)}

    def error(x, y):
        return ((x @ weights["first"]).tanh() @ weights["second"] - y).square().mean()

    schedule = Schedule(steps=STEPS, rows=ORDERS[order](), rate=lambda step: rate_at(step, STEPS, 0.1))
    look = None
    if look_every is not None:
        look = Look(every=look_every, measure=lambda: float(error(held_inputs, held_targets)), least=1e9)
    return Loop(
        weights, lambda rows: error(inputs[rows], targets[rows]), optimiser=optimiser(weights), schedule=schedule,
        micro=micro, workers=workers, look=look,
    )  # fmt: skip


def same(one, other):
    assert one.step == other.step
    first, second = one.state(), other.state()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("micro", [2, None])
def test_steps_equal_those_of_a_slow_loop(order, micro):
    loop = problem(order, optimiser=Descent, micro=micro, dtype=torch.float64)
    other = problem(order, optimiser=Descent, dtype=torch.float64)
    rows_of, losses = ORDERS[order](), []
    loop.run(after=lambda step, loss: losses.append((step, loss)))
    for step in range(STEPS):
        sums = {name: torch.zeros_like(tensor) for name, tensor in other.weights.items()}
        rows, total = rows_of(step), 0.0
        for row in rows:
            loss = other._loss(row[None])
            total += float(loss.detach())
            for name in ("first", "second"):
                sums[name] += torch.autograd.grad(loss, other.weights[name], retain_graph=True)[0]
        assert losses[step] == (step + 1, pytest.approx(total / len(rows), rel=1e-9))
        with torch.no_grad():
            for name, tensor in other.weights.items():
                tensor -= rate_at(step, STEPS, 0.1) * sums[name] / len(rows)
    for name, tensor in loop.weights.items():
        assert torch.allclose(tensor, other.weights[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("order", ORDERS)
def test_the_number_of_threads_does_not_matter(order):
    loops = [problem(order, look_every=2, workers=workers) for workers in (1, 2, 3)]
    losses = [[], [], []]
    for loop, seen in zip(loops, losses, strict=True):
        loop.run(after=lambda step, loss, seen=seen: seen.append(loss))
    assert losses[0] == losses[1] == losses[2]
    for loop in loops[1:]:
        same(loops[0], loop)


def test_threads_compute_with_one_thread_each_and_the_number_comes_back():
    before = torch.get_num_threads()
    seen = []
    torch.set_num_threads(2)
    try:
        for workers in (1, 2):
            mean_loss(lambda rows: seen.append(torch.get_num_threads()) or torch.zeros(()), torch.arange(4), micro=2,
                      workers=workers)  # fmt: skip
            assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            mean_loss(lambda rows: 1 / 0, torch.arange(4), micro=2, workers=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 2, 1, 1]


@pytest.mark.parametrize("workers", first(1, [2, 1]))
@pytest.mark.parametrize("look_every", first(1, [2, None]))
@pytest.mark.parametrize("order", ORDERS)
def test_it_goes_on_from_every_saved_step_with_the_same_bits(order, look_every, workers):
    whole, states = problem(order, look_every=look_every), {0: {}}
    states[0] = copied(whole.state())
    whole.run(save=lambda step, state: states.update({step: copied(state)}), save_seconds=0.0)
    assert list(states) == list(range(STEPS + 1))
    assert (whole.best is not None) == (look_every is not None)
    for state in states.values():
        kept = copied(state)
        again = problem(order, look_every=look_every, workers=workers)
        for tensor in again.weights.values():
            tensor.data.add_(1.0)  # all comes from the state
        again.restore(state)
        again.run()
        same(whole, again)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in state.items()), "a state is only read"


def test_without_time_passing_only_the_end_is_saved():
    steps = []
    problem().run(save=lambda step, state: steps.append(step), save_seconds=1e9)
    assert steps == [STEPS]


def test_the_weights_of_the_best_look_are_kept():
    worth = iter([5.0, 7.0, 3.0, 3.0, 4.0])  # behind steps 2, 4, 6, 8 and 9
    loop = problem(look_every=2)
    loop._look = Look(every=2, measure=lambda: next(worth), least=4.5)
    seen = {}
    loop.run(after=lambda step, _: seen.update({step: copied(loop.weights)}))
    assert loop.least == 3.0
    assert loop.best is not None
    for name, tensor in loop.best.items():
        assert torch.equal(tensor, seen[6][name]), name
        assert not tensor.requires_grad
    assert not torch.equal(loop.best["first"], seen[9]["first"])
    assert next(worth, None) is None, "the last step has a look of its own"


def test_nothing_is_kept_where_no_look_is_better():
    loop = problem(look_every=3)
    loop._look = Look(every=3, measure=lambda: 1.0, least=1.0)
    loop.least = 1.0
    loop.run()
    assert (loop.best, loop.least) == (None, 1.0)


def test_looking_computes_no_gradients():
    grads = []
    loop = problem(look_every=3)
    loop._look = Look(every=3, measure=lambda: grads.append(torch.is_grad_enabled()) or 1.0, least=2.0)
    with torch.enable_grad():
        loop.run()
    assert grads == [False] * 3


@pytest.mark.parametrize(("micro", "workers"), [(None, 1), (3, 1), (3, 2), (1, 2)])
def test_the_mean_loss_is_that_row_by_row(micro, workers):
    loop = problem(dtype=torch.float64)
    rows = torch.arange(11)
    slow = sum(float(loop._loss(row[None]).detach()) for row in rows) / 11
    assert mean_loss(loop._loss, rows, micro=micro, workers=workers) == pytest.approx(slow, rel=1e-9)


def test_training_needs_no_gradients_switched_on():
    loop = problem()
    with torch.no_grad():
        first = loop.advance()
    other = problem()
    assert first == other.advance()
    same(loop, other)
    assert math.isfinite(first)


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
