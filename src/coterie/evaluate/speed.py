"""Speed and memory: what a model costs to run here, next to the base. Both are in memory as a whole for that."""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from coterie.errors import InputError
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.quantized import is_read_by_us_alone
from coterie.model.stream.likelihood import logits_of
from coterie.model.stream.memory import Stage, whole_lines
from coterie.model.stream.stream import Stream

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Throughput of forward passes over a batch.

    Attributes:
        tokens_per_second: median over the rounds.
        ratio: median over the rounds of the model's throughput divided by the base's in the same round, or None
            without a base.
        rounds: how many rounds were measured.
    """

    tokens_per_second: float
    ratio: float | None
    rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningCost:
    """What a whole model costs to run; see `coterie.evaluate.scorecard.Scorecard` for the attributes."""

    memory_bytes: int
    peak_memory_bytes: int
    tokens_per_second: float
    speed_ratio: float | None


@dataclass(slots=True)
class Peak:
    """What `peak_memory` found, in bytes; valid after its block."""

    num_bytes: int = 0


def whole_stage(models: Mapping[str, Stream], *, option: str = "--speed") -> Stage:
    """Say what models take that are loaded as a whole next to each other, which must be possible.

    Args:
        models: the models by name.
        option: what it is for, on the command line.

    Raises:
        InputError: one is stored in a way that only reading it unit by unit understands.
    """
    for stream in models.values():
        checkpoint = stream.checkpoint
        packed = any(info.packed is not None for info in checkpoint.tensors.values())
        if checkpoint.pickled or (packed and not is_read_by_us_alone(Checkpoint.open(checkpoint.path))):
            stored = "as pickles" if checkpoint.pickled else "quantised"
            raise InputError(
                f"{checkpoint.path} is stored {stored} and cannot be loaded as a whole; leave {option} out, or measure "
                "a checkpoint of plain safetensors made from it"
            )
    sizes = {name: sum(stream.unit_bytes(unit) for unit in stream.units) for name, stream in models.items()}
    return Stage(
        name=f"{option} with models in memory as a whole",
        lines=whole_lines(sizes.items()),
        way_out=f"leave {option} out, which measures all else with one layer in memory",
        device=next(iter(models.values())).device,
    )


def measure_cost(
    contestants: Sequence[tuple[Path, Tensor]],
    *,
    base: Path | None,
    dtype: torch.dtype | None,
    device: torch.device,
    seconds: float,
) -> list[RunningCost]:
    """Load models as a whole, one after another, and measure what they cost to run.

    Args:
        contestants: each model's folder, and the token ids (B, S) that it (and the base) read.
        base: folder of the model to compare with, which stays in memory; or None.
        dtype: see `coterie.model.arch.load.load_model`.
        device: where they run.
        seconds: time to spend on each, see `measure_speed`.
    """
    original = None
    if base is not None:
        original = load_model(base, dtype=dtype, device=device)
        own_memory(original)
    costs = []
    for path, ids_BS in contestants:
        before = memory_in_use(device)
        model = load_model(path, dtype=dtype, device=device)
        own_memory(model)
        with peak_memory(device, above=before) as peak:
            logits_of(model, ids_BS)
        speed = measure_speed(model, ids_BS, base=original, seconds=seconds)
        costs.append(
            RunningCost(
                memory_bytes=memory_bytes(model),
                peak_memory_bytes=peak.num_bytes,
                tokens_per_second=speed.tokens_per_second,
                speed_ratio=speed.ratio,
            )
        )
        del model
    return costs


def measure_speed(model: Any, ids_BS: Tensor, *, base: Any = None, rounds: int = 25, seconds: float = 20.0) -> Speed:
    """Measure forward passes of a model, alternating with the base so that both meet the same conditions.

    Both run once untimed, then once a round; who goes first alternates from round to round.

    Args:
        model: the model.
        ids_BS: the batch that both read.
        base: what to compare with, or None.
        rounds: rounds at most.
        seconds: no further round starts when so much time has passed, but three are measured in any case.
    """
    contestants = [model] if base is None else [model, base]
    for contestant in contestants:
        _timed(contestant, ids_BS)
    begin = time.perf_counter()
    times: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - begin > seconds:
            break
        places = range(len(contestants)) if number % 2 == 0 else reversed(range(len(contestants)))
        for place in places:
            times[place].append(_timed(contestants[place], ids_BS))
    ratio = None
    if base is not None:
        ratio = statistics.median(base_time / time_ for time_, base_time in zip(*times, strict=True))
    return Speed(
        tokens_per_second=statistics.median(ids_BS.numel() / time_ for time_ in times[0]),
        ratio=ratio,
        rounds=len(times[0]),
    )


def memory_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers; tensors that share memory (tied weights) count once."""
    sizes: dict[tuple[torch.device, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def own_memory(model: torch.nn.Module) -> None:
    """Copy a model's tensors on the CPU into memory of their own, in place, one by one; ties stay ties.

    A loader may leave them as views of the mapped file, which keeps all of the file's pages resident, those of tensors
    that were converted included: the model would seem to need up to twice its size.
    """
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "cpu":
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().clone()
        tensor.data = copies[key]


def memory_in_use(device: torch.device) -> int:
    """Return the bytes in use: torch's allocations on a CUDA device, else the resident memory of this process.

    Free memory that the process has kept from earlier is handed back first where the C library can; it would else be
    used again unseen, and what comes next would seem to need less than it does.
    """
    _release_free_memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


@contextmanager
def peak_memory(device: torch.device, *, above: int) -> Iterator[Peak]:
    """Measure the highest `memory_in_use` within the block, as bytes above an earlier reading.

    On CUDA it is exact. Elsewhere it is the kernel's high-water mark of this process where that can be reset (Linux),
    else the highest of many samples, which can miss a short peak.

    Args:
        device: the device that is measured.
        above: what `memory_in_use` said before the things that are to count were there.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - above
        return
    _release_free_memory()
    with _high_water() as highest:
        yield peak
    peak.num_bytes = max(0, highest() - above)


def reset_peak() -> bool:
    """Let what `peak_bytes` says begin anew, from what is in use now; tell whether it could."""
    _release_free_memory()
    try:
        _CLEAR_REFS.write_text("5")
        _kernel_high_water()
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _high_water() -> Iterator[Callable[[], int]]:
    """Yield a function that, after the block, returns the highest resident memory within it, in bytes."""
    try:
        _CLEAR_REFS.write_text("5")
        _kernel_high_water()
    except (OSError, ValueError):
        with _sampled_high_water() as highest:
            yield highest
        return
    num_bytes = 0

    def highest_seen() -> int:
        return num_bytes

    yield highest_seen
    num_bytes = _kernel_high_water()


def _kernel_high_water() -> int:
    """Return the process's resident high-water mark in bytes; raises OSError or ValueError where there is none."""
    for line in _STATUS.read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "VmHWM":
            return int(amount.split()[0]) * 1024
    raise ValueError("no VmHWM")


@contextmanager
def _sampled_high_water() -> Iterator[Callable[[], int]]:
    process = psutil.Process()
    highest = process.memory_info().rss
    stopped = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not stopped.wait(_SAMPLE_SECONDS):
            highest = max(highest, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield lambda: highest
    finally:
        stopped.set()
        sampler.join()
        highest = max(highest, process.memory_info().rss)


def _release_free_memory() -> None:
    """Collect garbage and, with glibc, give the heap's free pages back to the system."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return  # another C library; the measurement is then a lower bound


def _timed(model: Any, ids_BS: Tensor) -> float:
    """Return the seconds that one forward pass takes, with the device's queue empty before and after."""
    _synchronize(model)
    begin = time.perf_counter()
    logits_of(model, ids_BS)
    _synchronize(model)
    return time.perf_counter() - begin


def _synchronize(model: Any) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
