"""What a run would take, said without doing it: memory and time of each stage, and the disk.

Time is measured where that is cheap: the first layers, up to the one that holds the first experts, are read, and one
batch of text runs through them. What that takes corrects what was reckoned by operations and bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coterie.amounts import format_bytes
from coterie.model.arch.layers import MoELayer
from coterie.model.stream.memory import SAMPLE, STATISTICS, Forecast
from coterie.model.stream.stream import Stream
from coterie.model.stream.work import BYTES_A_SECOND, unit_work
from coterie.profile.measure import Measure
from coterie.progress import StageTime, duration

#: Bytes of the first layers up to which measuring them is cheap.
CHEAP_BYTES = 8 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How a machine does, against what was reckoned.

    Attributes:
        reading: seconds of reading weights for each that was reckoned.
        computing: the same of computing.
        basis: where it comes from, in words.
    """

    reading: float
    computing: float
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What a run would take.

    Attributes:
        memory: the most that each stage takes, as it is announced when the run begins.
        times: how long each stage takes, about.
        basis: what the times are based on.
        disk: bytes that are written, by what they are.
        free: bytes that are free where they go.
    """

    memory: Forecast
    times: tuple[StageTime, ...]
    basis: str
    disk: Mapping[str, int]
    free: int

    @property
    def seconds(self) -> float:
        """How long all stages take together, about."""
        return sum(stage.seconds for stage in self.times)

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return {
            "memory": {stage.name: stage.num_bytes for stage in self.memory.stages},
            "memory_bytes": self.memory.num_bytes,
            "seconds": {stage.name: round(stage.seconds, 1) for stage in self.times},
            "seconds_in_all": round(self.seconds, 1),
            "basis_of_seconds": self.basis,
            "disk": dict(self.disk),
            "disk_free": self.free,
        }

    def sentences(self) -> list[str]:
        """Say it line by line."""
        lines = [str(stage) for stage in self.memory.stages]
        stages = ", ".join(f"{stage.name} {duration(stage.seconds)}" for stage in self.times)
        lines.append(f"time: about {duration(self.seconds)} ({stages}); {self.basis}")
        parts = " + ".join(f"{format_bytes(size)} ({what})" for what, size in self.disk.items() if size)
        lines.append(f"disk: {format_bytes(sum(self.disk.values()))}: {parts}; {format_bytes(self.free)} are free")
        return lines


def scaled(times: Sequence[StageTime], pace: Pace) -> tuple[StageTime, ...]:
    """Return stages with their seconds at a machine's pace."""
    return tuple(
        replace(
            stage,
            seconds=stage.reading * pace.reading + (stage.seconds - stage.reading) * pace.computing,
            reading=stage.reading * pace.reading,
        )
        for stage in times
    )


def measured_pace(
    stream: Stream,
    layers: Sequence[MoELayer],
    ids_BS: Tensor,
    *,
    limit: int | None,
    measure: Measure | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Pace:
    """Read the first layers of a model and run one batch through them, up to the first that holds experts.

    Args:
        stream: the model, not open.
        layers: its MoE layers.
        ids_BS: token ids (B, S).
        limit: bytes of memory that may be taken; None for no limit.
        measure: what is measured meanwhile; None for nothing.
        clock: seconds since whenever.
    """
    first = next(place for place, unit in enumerate(stream.units) if unit.holds(layers[0].experts))
    units = stream.units[: first + 1]
    sizes = {unit.name: stream.unit_bytes(unit) for unit in units}
    largest = max(sizes.values())
    if sum(sizes.values()) > CHEAP_BYTES or (limit is not None and 3 * largest > limit):
        gigabyte = 2**30 / BYTES_A_SECOND
        return Pace(
            reading=1.0, computing=1.0,
            basis=f"reckoned by operations at this machine's speed, and {gigabyte:.1f} s for each GiB of weights that "
            "is read: its layers are too large to try one",
        )  # fmt: skip
    work = unit_work(stream, layers, tokens=ids_BS.numel(), base=True)
    reading = computing = expected_reading = expected_computing = 0.0
    with stream:
        at = clock()
        for stage in stream.run([stream.base_job(ids_BS)]):
            read_at = clock()
            [call] = stage.calls
            here = tuple(layer for layer in layers if stage.unit.holds(layer.experts))
            if measure is None or measure.gradients or not here:
                call.finish(call.compute())
            else:
                collectors = {layer.index: measure.collector() for layer in here}
                measure.measure_call(stream, call, here, backward=False, domain=0, counts_T=None, collectors=collectors)
            if stream.device.type == "cuda":
                torch.cuda.synchronize(stream.device)
            done_at = clock()
            reckoned = sizes[stage.unit.name] / BYTES_A_SECOND if stage.unit.name in sizes else 0.0
            reading, computing = reading + read_at - at, computing + done_at - read_at
            expected_reading += reckoned
            expected_computing += max(0.0, work.seconds.get(stage.unit.name, 0.0) - reckoned)
            at = done_at
            if here:
                break
    return Pace(
        reading=reading / max(1e-9, expected_reading),
        computing=computing / max(1e-9, expected_computing),
        basis=f"measured on the first {len(units)} of {len(stream.units)} parts of the model, with "
        f"{ids_BS.numel():,} tokens",
    )


def profile_disk(stream: Stream, layers: Sequence[MoELayer], measure: Measure) -> int:
    """Return the bytes that a profile takes on disk, at most."""
    lines = dict(measure.forecast(stream, tuple(layers)).stages[0].lines)
    return len(layers) * (lines[SAMPLE] + lines[STATISTICS])
