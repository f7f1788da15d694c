"""How much memory a run takes: said before it, stage by stage, and measured after it.

A stage is a list of lines, each what takes memory and how many bytes; its lines exist at the same time, stages come one
after another. Functions give the lines of each kind of stage: a unit that streams by (while it is read and converted,
or compressed, parts of it exist twice; while it runs, it is there once), the activations of a batch, logits, a token
sample, text, whole models.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from coterie.amounts import format_bytes
from coterie.errors import NotEnoughMemory
from coterie.model.arch.layers import MoELayer
from coterie.model.stream.stream import Stream

log = logging.getLogger(__name__)

#: What takes memory, and its bytes.
Line = tuple[str, int]

#: Copies of a unit that exist at the same time, at most, while it is read and run, and while it is compressed.
READ_COPIES, COMPRESS_COPIES = 2.0, 2.5

#: The interpreter and its libraries, and what the C library keeps for later.
FIXED_BYTES = 3 * 2**28

#: Names of lines.
BATCH, SAMPLE, STATISTICS, TEXT, LOGITS, MASKS = (
    "activations of a batch", "token sample", "statistics", "text", "logits", "masks"
)  # fmt: skip
WEIGHTS, CACHE, REST = "weights", "keys and values", "the rest"

#: What makes a line smaller.
WAYS_OUT = {
    BATCH: "--seq-len",
    SAMPLE: "--sample-tokens",
    TEXT: "--tokens",
    LOGITS: "--seq-len",
    MASKS: "--tokens or --seq-len",
    CACHE: "--seq-len",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What takes memory at the same time.

    Attributes:
        name: what is done, as a noun.
        lines: what takes memory, and its bytes; "the rest" (`FIXED_BYTES`) is added.
        way_out: what to do where no line can be made smaller.
        device: where, without a limit, no more may be taken than is free; None where that is not looked at.
    """

    name: str
    lines: tuple[Line, ...]
    way_out: str = "no setting makes it smaller, since one layer must fit: use a machine with more memory"
    device: torch.device | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return total_of(self.lines) + FIXED_BYTES

    def __str__(self) -> str:
        lines = (*self.lines, (REST, FIXED_BYTES))
        parts = " + ".join(f"{format_bytes(size)} ({what})" for what, size in lines if size)
        return f"{self.name} takes at most {format_bytes(self.num_bytes)} of memory: {parts}"

    def allowed(self, limit: int | None) -> int | None:
        """Return the bytes that it may take: those of a limit or, where that is looked at, as many as are free."""
        return free_bytes(self.device) if limit is None and self.device is not None else limit

    def check(self, limit: int | None) -> None:
        """Raise NotEnoughMemory where it takes more than is allowed, with the numbers and the way out.

        Args:
            limit: bytes that may be taken; None for no limit.
        """
        allowed = self.allowed(limit)
        if allowed is not None and self.num_bytes > allowed:
            room = format_bytes(allowed)
            says = f"{room} are free" if limit is None else f"--max-memory allows {room}"
            raise NotEnoughMemory(f"{self}; {says}: {self._way_out(allowed)}")

    def _way_out(self, allowed: int) -> str:
        for what, size in sorted(self.lines, key=lambda line: -line[1]):
            if what in WAYS_OUT and self.num_bytes - size < allowed:
                least = format_bytes(self.num_bytes - size)
                return f"with a smaller {WAYS_OUT[what]} {least} and a little would do ({what})"
        return self.way_out


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The most memory that a run will take."""

    stages: tuple[Stage, ...]

    @property
    def largest(self) -> Stage:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes that the largest stage takes."""
        return self.largest.num_bytes

    def check(self, limit: int | None) -> None:
        """Log what each stage takes; raise NotEnoughMemory where one takes more than is allowed, see `Stage.check`."""
        for stage in sorted(self.stages, key=lambda stage: -stage.num_bytes):
            stage.check(limit)
        log.info("memory: at most %s", format_bytes(self.num_bytes))
        for stage in self.stages:
            log.info("memory: %s", stage)


def unit_lines(stream: Stream, running: Sequence[Line] = (), *, copies: float = READ_COPIES) -> tuple[Line, ...]:
    """Return what the largest unit of a stream takes; only headers are looked at.

    Args:
        stream: the model.
        running: what is there while a unit runs, and not while one is read.
        copies: how many times parts of the unit exist while it is read, or compressed.
    """
    largest = max(stream.units, key=stream.unit_bytes)
    size = stream.unit_bytes(largest)
    reading: Sequence[Line] = ((f"reading and converting {largest.name}", int((copies - 1) * size)),)
    both = (*reading, *running) if stream.reads_ahead else max(reading, running, key=total_of)
    return ((largest.name, size), *both)


def total_of(lines: Iterable[Line]) -> int:
    """Return the bytes of lines together."""
    return sum(size for _, size in lines)


def batch_lines(
    stream: Stream,
    layers: Sequence[MoELayer],
    *,
    batch_size: int,
    seq_len: int,
    tokens: int = 0,
    gradients: bool = False,
) -> tuple[Line, ...]:
    """Return what running batches through a layer takes, and what they keep while others are run.

    Args:
        stream: the model.
        layers: its MoE layers, where they are known.
        batch_size: sequences of a batch.
        seq_len: tokens of a sequence.
        tokens: tokens of all batches.
        gradients: whether gradients are sent back.
    """
    config: Any = stream.model.config.get_text_config()
    embedding: Any = stream.model.get_input_embeddings()
    hidden_size = int(embedding.weight.shape[-1])
    inner = max((layer.top_k * (3 * layer.width + layer.hidden_size) for layer in layers), default=4 * hidden_size)
    # Numbers that a token leaves behind, as measured on the bundled models; what the heap keeps is in the rest.
    numbers = (16 * hidden_size + 2 * inner) if gradients else (8 * hidden_size + 2 * inner)
    written_out = config._attn_implementation != "sdpa"
    if written_out:
        numbers += (6 if gradients else 3) * int(config.num_attention_heads) * seq_len
    lines = [(BATCH, 4 * numbers * batch_size * seq_len)]
    # Masks that are written out are moved to files when they are first used; one kind may be used by later layers only.
    kinds = len(set(getattr(config, "layer_types", None) or ()))
    if written_out and kinds > 1:
        lines.append((MASKS, 4 * seq_len * tokens * (kinds - 1)))
    return tuple(lines)


def head_lines(stream: Stream) -> tuple[Line, ...]:
    """Return what the units outside the base model, as a rule the head, take together."""
    size = sum(stream.unit_bytes(unit) for unit in stream.outside())
    return (("head, read and converted", int(READ_COPIES * size)),)


def sample_lines(layers: Iterable[MoELayer], sample_tokens: int) -> tuple[Line, ...]:
    """Return what the token sample of one layer takes.

    For a token two vectors of the model's width, the scores of all experts and a handful of choices, four bytes each.
    """
    widest = max((2 * layer.hidden_size + layer.num_experts + 64 for layer in layers), default=0)
    return ((SAMPLE, 4 * sample_tokens * widest),)


def text_lines(tokens: int) -> tuple[Line, ...]:
    """Return what the token ids of a text that was drawn take."""
    return ((TEXT, 8 * tokens),)


def whole_lines(names_and_bytes: Iterable[Line]) -> tuple[Line, ...]:
    """Return what models take that are in memory as a whole, by their names."""
    return tuple((f"{WEIGHTS} of {name}", size) for name, size in names_and_bytes)


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
