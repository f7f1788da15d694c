"""How long it takes to run text through a model, reckoned beforehand by operations and bytes.

Seconds that are reckoned are good for proportions: between layers, and between what is measured, compressed and
trained. What they really come to is measured as a run goes, see `coterie.progress`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coterie.model.arch.layers import MoELayer
from coterie.model.stream.stream import Stage, Stream
from coterie.progress import total_weight

#: Share of the speed of one large matrix product that a model reaches: small products, attention, norms and what is
#: measured take the rest. On the bundled models it was 0.3 to 0.5 on CPU cores.
REACHED = 0.4

#: Bytes a second that weights are read, converted and written with: those of a disk of today, with some conversion.
BYTES_A_SECOND = 5e8

#: Operations of a pass forward and of one there and back for each of one forward, with what is measured there.
FORWARD, WITH_GRADIENTS = 1.0, 4.0

_SIDE = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitWork:
    """What running text through the units of a model takes.

    Attributes:
        seconds: by name of the unit.
        operations: of all units together.
        read_bytes: bytes of weights of all units.
        factor: operations for each of a pass forward.
    """

    seconds: Mapping[str, float]
    operations: float
    read_bytes: int
    factor: float = FORWARD

    def of(self, stage: Stage) -> float:
        """Return the seconds of the unit that is in memory; with gradients those of its way there, or back."""
        seconds = self.seconds.get(stage.unit.name, 0.0)
        if self.factor == FORWARD:
            return seconds
        return seconds * (1 - FORWARD / self.factor if stage.backward else FORWARD / self.factor)

    @property
    def reading(self) -> float:
        """Seconds of these that go into reading."""
        return self.read_bytes / BYTES_A_SECOND

    @property
    def total(self) -> float:
        """Seconds of all units together."""
        return total_weight(self.seconds)[0]

    @property
    def largest(self) -> float:
        """Seconds of the longest unit."""
        return total_weight(self.seconds)[1]


def unit_work(
    stream: Stream, layers: Sequence[MoELayer], *, tokens: int, factor: float = FORWARD, base: bool = False
) -> UnitWork:
    """Reckon what running tokens through a stream takes.

    Args:
        stream: the model.
        layers: its MoE layers; of their experts a token meets the chosen ones.
        tokens: how many.
        factor: operations for each of a pass forward, see `FORWARD`.
        base: whether only the base model runs: what lies outside, as a rule the head, does not.
    """
    weights = _weights_of_units(stream, layers)
    outside = {unit.name for unit in stream.outside()} if base else set()
    speed, passes = speed_of(stream.device.type), 1 if factor == FORWARD else 2
    seconds, operations, num_bytes = {}, 0.0, 0
    for unit in stream.units:
        if unit.name in outside:
            continue
        size = stream.unit_bytes(unit)
        here = 2.0 * factor * tokens * weights[unit.name]
        seconds[unit.name] = here / speed + passes * size / BYTES_A_SECOND
        operations, num_bytes = operations + here, num_bytes + passes * size
    return UnitWork(seconds=seconds, operations=operations, read_bytes=num_bytes, factor=factor)


def head_seconds(stream: Stream, *, tokens: int) -> float:
    """Reckon how long it takes to turn what the base model returned into logits."""
    weights, outside = _weights_of_units(stream, ()), stream.outside()
    operations = 2.0 * tokens * sum(weights[unit.name] for unit in outside)
    size = sum(stream.unit_bytes(unit) for unit in outside)
    return operations / speed_of(stream.device.type) + size / BYTES_A_SECOND


def _weights_of_units(stream: Stream, layers: Sequence[MoELayer]) -> dict[str, float]:
    """Return how many weights of each unit a token is multiplied with: embeddings are looked up, and experts chosen."""
    model: Any = stream.model
    shares = {f"{layer.experts}.": layer.top_k / layer.num_experts for layer in layers}
    looked_up = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters(remove_duplicate=False)}
    weights: dict[str, float] = {}
    for unit in stream.units:
        weights[unit.name] = sum(
            sizes.get(name, 0) * next((share for prefix, share in shares.items() if name.startswith(prefix)), 1.0)
            for name in unit.names
            if name.rpartition(".")[0] not in looked_up
        )
    return weights


@functools.cache
def speed_of(device_type: str) -> float:
    """Return operations a second that a model reaches on a device; measured once, in a fraction of a second."""
    matrix = torch.ones(_SIDE, _SIDE, device=device_type)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        # Reading a value waits for the device.
        float((matrix @ matrix)[0, 0])
        best = max(best, 2 * _SIDE**3 / max(1e-9, time.perf_counter() - started))
    return REACHED * best
