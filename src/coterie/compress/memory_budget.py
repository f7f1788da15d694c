"""A budget for the memory of a running result: what the run takes beside weights is put aside. No torch here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.amounts import format_bytes, parse_bytes
from coterie.compress.header_weights import weights_of_headers
from coterie.compress.target import Reader
from coterie.compress.weights import bytes_saved, smallest_types
from coterie.errors import Infeasible, InputError
from coterie.model.arch.inspect import Headers, read_headers
from coterie.model.arch.run_memory import RunMemory, run_memory, trained_context
from coterie.model.arch.run_settings import Running
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.quantized import dequantized

log = logging.getLogger(__name__)

#: Contexts that are tried when the largest that fits is looked for go up by this.
_STEP = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBudget:
    """A budget for memory, and where it goes.

    Attributes:
        total: bytes of all.
        beside: what the run takes beside weights.
        growth: bytes that weights take more there than in a checkpoint: what is no matrix has 32 bits in a GGUF file.
    """

    total: int
    beside: RunMemory
    growth: int

    @property
    def weights(self) -> int:
        """Bytes that are left for the tensors of the result."""
        return self.total - self.beside.num_bytes - self.growth

    def sentence(self) -> str:
        """Say what goes where."""
        return f"of {format_bytes(self.total)} in llama.cpp {format_bytes(self.weights)} are for weights, " + (
            self.beside.sentence()
        )

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return {"total": self.total, "weights": self.weights, "growth": self.growth, **self.beside.content()}


def memory_budget(model: str | Path, budget: str | int, running: Running) -> MemoryBudget:
    """Return where a budget for memory goes when a result runs in llama.cpp.

    Args:
        model: a model folder or a hub id; only headers are read.
        budget: bytes, or an amount like "12GiB".
        running: how the result is to run.

    Raises:
        Infeasible: nothing is left for weights; says the largest context that fits.
        ArchitectureMismatch: what the model keeps of a text is not known.
        InputError: `budget` or `running` is out of range.
        UnsupportedDtype: the model is quantised in a way that cannot be undone.
    """
    running.check()
    limit = parse_bytes(budget)
    return memory_budget_of(read_headers(dequantized(Checkpoint.open(model, fetch="headers"))), limit, running)


def weights_budget(
    model: str | Path, budget: str | int | None, running: Running | None, reader: Reader | None = None
) -> str | int | None:
    """Return what a budget is for weights: all of it, or what a run leaves of it, which is said.

    Args:
        model: a model folder or a hub id.
        budget: what is asked for; None where the size of the result is said otherwise.
        running: how the result is to run, where the budget is for the memory of that; else None.
        reader: who is to read the result, see `coterie.compress.target.Target`.

    Raises:
        InputError: a run, and no budget, or a result that llama.cpp cannot read. For more see `memory_budget`.
    """
    if running is None:
        return budget
    if budget is None:
        raise InputError("--budget-for memory says what a budget is for; give --budget, or leave it out")
    if reader not in (None, "gguf"):
        raise InputError(
            f"--budget-for memory is about llama.cpp, which reads no --target {reader}: leave one of them out"
        )
    planned = memory_budget(model, budget, running)
    log.info("%s", planned.sentence())
    return planned.weights


def memory_budget_of(headers: Headers, limit: int, running: Running) -> MemoryBudget:
    """Return where a budget goes, for headers of plain numbers that were read; see `memory_budget`."""
    weights = weights_of_headers(headers, headers.accounting())
    matrices = {name for weight in weights for name in weight.names}
    growth = sum(
        max(0, 4 * info.num_elements - info.num_bytes)
        for name, info in headers.checkpoint.tensors.items()
        if name not in matrices
    )
    planned = MemoryBudget(total=limit, beside=run_memory(headers, running), growth=growth)
    trained = trained_context(headers)
    if trained is not None and running.context > trained:
        log.warning("a context of %s is more than the %s that the model is for", f"{running.context:,}", f"{trained:,}")
    if planned.weights <= 0:
        least = headers.checkpoint.num_bytes - bytes_saved(weights, smallest_types(weights)) + growth
        raise Infeasible(_too_small(headers, planned, least))
    return planned


def _too_small(headers: Headers, planned: MemoryBudget, least: int) -> str:
    said = (
        f"a budget of {format_bytes(planned.total)} for memory leaves nothing for weights: {planned.beside.sentence()}"
    )
    running = planned.beside.running

    def fits(context: int) -> bool:
        shorter = Running(context=context, batch=running.batch, kv_type=running.kv_type)
        return run_memory(headers, shorter).num_bytes + least <= planned.total

    low, high = 0, running.context // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
    if low:
        return f"{said}; --context {low * _STEP} is the largest with which all experts fit in the smallest types"
    return f"{said}; with any context all experts in the smallest types, {format_bytes(least)}, are too large"
