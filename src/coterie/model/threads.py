"""Share work out among threads of the CPU, each with one of torch's own.

Many operations on tensors that fit into a cache gain nothing from torch's own threads, which share out single large
operations; whole pieces of work that do not hang on each other do. Other devices share out by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Argument = TypeVar("Argument")
Value = TypeVar("Value")


def workers_on(device: torch.device) -> int:
    """Return how many threads share out work on a device: as many as torch is set to, and one beside a CPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def each_computed(
    function: Callable[[Argument], Value], arguments: Sequence[Argument], device: torch.device
) -> list[Value]:
    """Return what a function makes of each argument, without gradients, shared out among the threads of a CPU.

    A single argument is left to torch's own threads. The results are the same whatever the number of threads, where
    those of the function are.
    """

    def computed(argument: Argument) -> Value:
        with torch.no_grad():  # holds for one thread only
            return function(argument)

    with shared_out(computed, arguments, max(1, min(len(arguments), workers_on(device)))) as values:
        return list(values)


@contextmanager
def shared_out(
    function: Callable[[Argument], Value], arguments: Sequence[Argument], workers: int
) -> Iterator[Iterator[Value]]:
    """Yield what a function makes of each argument, in the order of the arguments.

    With several workers torch has one thread within the function, so work that shares out further is done in turn. What
    hangs on a thread, as whether gradients are kept, is for the function to set.
    """
    if workers == 1:
        yield map(function, arguments)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield pool.map(function, arguments)
    finally:
        torch.set_num_threads(before)
