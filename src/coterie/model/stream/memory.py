"""How much memory a run takes: said before it, measured after it.

A run holds one unit of the model (as a rule a decoder layer) in the number format that it computes in. While the unit
is read and converted, or compressed, parts of it exist twice; the rest is one layer's token sample and fixed buffers.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from coterie.amounts import format_bytes
from coterie.errors import Infeasible
from coterie.model.stream.stream import Stream

log = logging.getLogger(__name__)

#: Copies of the largest unit that exist at the same time, at most.
UNIT_COPIES = 2.5

#: Everything else: the interpreter and its libraries, one batch's activations, outputs that are not in files.
FIXED_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The most memory that a run will take.

    Attributes:
        unit: name of the largest unit.
        unit_bytes: its bytes in the working number format.
        sample_bytes: bytes of one layer's token sample.
        logits_bytes: bytes of the logits of a batch and their gradients, where gradients are computed.
    """

    unit: str
    unit_bytes: int
    sample_bytes: int
    logits_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return int(UNIT_COPIES * self.unit_bytes) + self.sample_bytes + self.logits_bytes + FIXED_BYTES

    def check(self, limit: int | None) -> None:
        """Log the forecast; raise Infeasible when it is above `limit` bytes, with what would fit."""
        parts = (
            f"{UNIT_COPIES:g} x {format_bytes(self.unit_bytes)} ({self.unit}) + {format_bytes(self.sample_bytes)} "
            f"(token sample) + {format_bytes(FIXED_BYTES)}"
        )
        if self.logits_bytes:
            parts += f" + {format_bytes(self.logits_bytes)} (logits)"
        if limit is not None and self.num_bytes > limit:
            least = self.num_bytes - self.sample_bytes
            way = (
                f"with a small sample (--sample-tokens) {format_bytes(least)} and a little would do"
                if least < limit
                else "no setting makes it smaller, since one layer must fit: use a machine with more memory"
            )
            raise Infeasible(
                f"this run may take {format_bytes(self.num_bytes)} of memory ({parts}), --max-memory allows "
                f"{format_bytes(limit)}; {way}"
            )
        log.info("memory: at most %s (%s)", format_bytes(self.num_bytes), parts)


def forecast(stream: Stream, *, sample_tokens: int = 0, hidden_size: int = 0, num_experts: int = 0) -> Forecast:
    """Say how much memory running a stream will take at most.

    Args:
        stream: what will run; only its headers are looked at.
        sample_tokens: tokens of one layer's sample, 0 when none is taken.
        hidden_size: D.
        num_experts: E.
    """
    largest = max(stream.units, key=stream.unit_bytes)
    # Two vectors of the model's width, the scores of all experts and a handful of choices, four bytes each.
    sample_bytes = sample_tokens * (2 * hidden_size + num_experts + 64) * 4
    return Forecast(unit=largest.name, unit_bytes=stream.unit_bytes(largest), sample_bytes=sample_bytes)


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a device is free, in bytes; what the machine can spare for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the peak of the program that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory: Any = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fitting_batch(wanted: int, *, seq_len: int, hidden_size: int) -> int:
    """Return how many sequences make a batch: at most `wanted`, fewer where a model is so wide that they are large."""
    return max(1, min(wanted, 2**25 // (8 * seq_len * hidden_size)))
