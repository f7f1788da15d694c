"""How fast this machine is at what a run does: reads of experts, products with their matrices, small operations.

Everything is measured with what the run uses: the same files, threads and reads, the same products in the same number
format. Weights are more than processors keep, where there are as many, so that they come from memory.

Legend: D model width, T tokens, K chosen experts.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from coterie.model.arch.layers import MoELayer
from coterie.model.arch.seam import intercepted
from coterie.run.arena import Arena
from coterie.run.experts import StreamedExperts
from coterie.run.prepare import Prepared
from coterie.run.reader import Reader
from coterie.run.records import Key, Record, slot_bytes
from coterie.run.residency import Residency
from coterie.run.weight_file import WeightFile

_T = TypeVar("_T")

#: Seconds that the disk is read for, at most.
DISK_SECONDS = 3.0

#: Seconds that one kind of product is repeated for.
_PRODUCT_SECONDS = 0.15

#: Bytes of weights that are gone through in turn, more than processors keep.
BEYOND_CACHES = 96 * 2**20

#: File systems that are memory.
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskSpeed:
    """How fast experts are read.

    Attributes:
        record_bytes: bytes of an expert's read.
        seconds_of: seconds until so many experts that are asked for at once are all there: 1, 2, 4 and so on.
        num_reads: experts that were read.
        is_direct: reads went past the page cache.
        file_system: its kind, like ext4; empty where the system does not say.
    """

    record_bytes: int
    seconds_of: Mapping[int, float]
    num_reads: int
    is_direct: bool
    file_system: str

    @property
    def latency(self) -> float:
        """Seconds until one expert alone is there."""
        return self.seconds_of[1]

    @property
    def bytes_per_second(self) -> float:
        """Bytes a second where many are asked for at once."""
        return max(count * self.record_bytes / seconds for count, seconds in self.seconds_of.items())

    @property
    def in_memory(self) -> bool:
        """It is no disk: the files are in memory already."""
        return self.file_system in _IN_MEMORY

    def seconds(self, count: float) -> float:
        """Return the seconds until so many experts are there that are asked for at once."""
        counts = sorted(self.seconds_of)
        if count >= counts[-1]:
            return self.seconds_of[counts[-1]] * count / counts[-1]
        before = max((each for each in counts if each <= count), default=0)
        after = min(each for each in counts if each > count)
        begin = self.seconds_of.get(before, 0.0)
        return begin + (self.seconds_of[after] - begin) * (count - before) / (after - before)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        more = {"latency": self.latency, "bytes_per_second": self.bytes_per_second, "in_memory": self.in_memory}
        return asdict(self) | {"seconds_of": {str(count): each for count, each in self.seconds_of.items()}} | more


def probe_disk(
    records: Mapping[Key, Record],
    *,
    lanes: int,
    most: int,
    policy: str = "follow",
    seconds: float = DISK_SECONDS,
    direct: bool = True,
    seed: int = 0,
) -> DiskSpeed:
    """Read experts at random places, one alone and several of a layer at once, as a run does where they are missing.

    Args:
        records: where the experts lie.
        lanes: threads that read.
        most: experts that are asked for at once, at most.
        policy: which experts stay in memory.
        seconds: how long it may take in all.
        direct: read past the page cache, where the file system can.
        seed: seed of the places.
    """
    layers: dict[int, list[int]] = {}
    for layer, expert in sorted(records):
        layers.setdefault(layer, []).append(expert)
    fewest = min(map(len, layers.values()))
    counts = [2**power for power in range(most.bit_length()) if 2**power <= min(most, fewest)]
    rounds: dict[int, list[float]] = {count: [] for count in counts}
    draw, begun = random.Random(seed), time.perf_counter()
    arena, reader = Arena(counts[-1], slot_bytes(records.values())), Reader(lanes=lanes, direct=direct)
    with Residency(arena, reader, records, policy) as residency:
        # Round about, so that what else the machine does meets all alike.
        while len(rounds[counts[-1]]) < 3 or time.perf_counter() - begun < seconds:
            for count in counts:
                layer = draw.choice(list(layers))
                experts = sorted(draw.sample(layers[layer], count))
                before, start = residency.counters.misses, time.perf_counter()
                with residency.acquire(layer, experts) as leases:
                    for lease in leases:
                        del lease  # it holds memory of the arena
                taken = time.perf_counter() - start
                if residency.counters.misses - before == count:
                    rounds[count].append(taken)
            if time.perf_counter() - begun > 3 * seconds:
                break
    path = records[min(records)].pieces[0].file
    file = WeightFile(path, direct=direct)
    file.close()
    return DiskSpeed(
        record_bytes=round(sum(record.slot_bytes for record in records.values()) / len(records)),
        seconds_of={count: fmean(each) for count, each in rounds.items() if each},
        num_reads=sum(count * len(each) for count, each in rounds.items()),
        is_direct=file.is_direct, file_system=file_system_of(path),
    )  # fmt: skip


def file_system_of(path: Path) -> str:
    """Return the kind of the file system that a file lies on, like ext4; empty where the system does not say."""
    try:
        mounts = psutil.disk_partitions(all=True)
    except OSError:
        return ""
    real = path.resolve()
    holding = [mount for mount in mounts if real.is_relative_to(mount.mountpoint)]
    return max(holding, key=lambda mount: len(mount.mountpoint)).fstype if holding else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeSpeed:
    """How long the parts of a pass take that do not read files.

    Attributes:
        layer: seconds of the experts of a layer for one token that finds all of them in memory, unpacked where they are
            packed.
        layer_chunk: the same for a chunk of a prompt whose tokens choose all experts.
        dense: seconds of the products that every token passes, for one token.
        dense_chunk: seconds of these products for a chunk.
        rest: seconds of all other operations of a pass, which are small.
        expert_bytes: bytes of an expert.
        top_k: experts that a token chooses.
        dense_bytes: bytes of the weights of what every token passes.
        load: how many times as long all that takes as it would on a machine that does nothing else.
    """

    layer: float
    layer_chunk: float
    dense: float
    dense_chunk: float
    rest: float
    expert_bytes: int
    top_k: int
    dense_bytes: int
    load: float

    @property
    def expert_bytes_per_second(self) -> float:
        """Bytes of experts that a token goes through in a second."""
        return self.expert_bytes * self.top_k / self.layer

    @property
    def dense_bytes_per_second(self) -> float:
        """Bytes of other weights that a token goes through in a second."""
        return self.dense_bytes / max(self.dense, 1e-12)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self) | {
            "expert_bytes_per_second": self.expert_bytes_per_second,
            "dense_bytes_per_second": self.dense_bytes_per_second,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """What a pass computes beside its experts.

    Attributes:
        products: (outputs, inputs) of the matrices that every token is multiplied with, and how many there are of each.
        num_small: operations that are no such product.
        head: that of the matrix behind the last layer, which scores the vocabulary.
    """

    products: Mapping[tuple[int, int], int]
    num_small: int
    head: tuple[int, int]


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and products by the shape of their matrix."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[tuple[int, int]] = Counter()
        self.num_small = 0
        self.last = (0, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        # A product with what is no contiguous matrix of tokens comes as a batch of one.
        if name in ("mm", "addmm") or (name == "bmm" and len(args[-1]) == 1):
            inputs, outputs = args[-1].shape[-2:]
            self.last = int(outputs), int(inputs)
            self.products[self.last] += 1
        else:
            self.num_small += 1
        return func(*args, **(kwargs or {}))


def count_operations(model: PreTrainedModel) -> Operations:
    """Return what one token makes a model compute beside its experts, seen in a run of its meta model.

    Args:
        model: on the meta device.
    """

    def nothing(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return torch.zeros_like(hidden_TD)

    counting = _Counting()
    with torch.no_grad(), intercepted(model, nothing), FakeTensorMode(allow_non_fake_inputs=True), counting:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="meta"), use_cache=True)
    return Operations(products=dict(counting.products), num_small=counting.num_small, head=counting.last)


def probe_compute(prepared: Prepared, *, chunk: int, room: int) -> ComputeSpeed:
    """Measure what a pass computes.

    Args:
        prepared: the model.
        chunk: tokens of a prompt that pass the model at once.
        room: bytes of memory that it may take.
    """
    room = min(BEYOND_CACHES, room)
    records, dtype = prepared.records, prepared.dtype
    operations = count_operations(prepared.architecture.model)
    watch = Stopwatch()
    layer, layer_chunk = _layer_seconds(prepared, chunk, room, watch)
    dense = dense_chunk = 0.0
    for (outputs, inputs), count in operations.products.items():
        copies = max(1, min(64, room // (outputs * inputs * dtype.itemsize)))
        matrices = [torch.full((outputs, inputs), 0.01, dtype=dtype) for _ in range(copies)]
        one, many = (torch.full((tokens, inputs), 0.01, dtype=dtype) for tokens in (1, chunk))
        product = count * watch.seconds(partial(nn.functional.linear, one), matrices)
        dense += product
        # The head is asked for the last token alone.
        is_head = (outputs, inputs) == operations.head
        dense_chunk += product if is_head else count * watch.seconds(partial(nn.functional.linear, many), matrices)
        del matrices
    small = _small_operation_seconds(dtype, watch)
    products = sum(outputs * inputs * count for (outputs, inputs), count in operations.products.items())
    return ComputeSpeed(
        layer=watch.load * layer, layer_chunk=watch.load * layer_chunk, dense=watch.load * dense,
        dense_chunk=watch.load * dense_chunk, rest=watch.load * operations.num_small * small,
        expert_bytes=round(sum(record.num_bytes for record in records.values()) / len(records)),
        top_k=max(each.top_k for each in prepared.architecture.layers), dense_bytes=products * dtype.itemsize,
        load=watch.load,
    )  # fmt: skip


def _layer_seconds(prepared: Prepared, chunk: int, room: int, watch: Stopwatch) -> tuple[float, float]:
    """Return seconds of the experts of a layer, all of which are in memory: for one token, and for a whole chunk."""
    layers, model, dtype = prepared.architecture.layers, prepared.architecture.model, prepared.dtype
    size = slot_bytes(prepared.records.values())
    most = max(layer.top_k for layer in layers)
    num_slots = max(most, min(room // size, len(prepared.records)))
    chosen = random.Random(0).sample(layers, max(1, min(len(layers), num_slots // most)))
    for layer in layers:
        zero_biases(model.get_submodule(layer.experts), dtype)
    with Residency(Arena(num_slots, size), Reader(), prepared.records) as residency:
        streamed = StreamedExperts(model, prepared.places, residency, num_slots=num_slots, dtype=dtype)
        tokens = [_routed(model, layer, 1, layer.num_experts, dtype) for layer in chosen]
        one = watch.seconds(lambda call: streamed.compute(*call), tokens, times=4)
        # As many experts as there is room for, each with as many tokens as it would have of the chunk.
        count = min(num_slots, layers[0].num_experts)
        share = count / layers[0].num_experts
        many = _routed(model, layers[0], max(1, round(share * chunk)), count, dtype)
        return one, watch.seconds(lambda call: streamed.compute(*call), [many]) / share


def _routed(
    model: PreTrainedModel, layer: MoELayer, num_tokens: int, num_experts: int, dtype: torch.dtype
) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return what a layer's experts are asked for by tokens that choose at random among the first experts."""
    draw = torch.Generator().manual_seed(0)
    index_TK = torch.rand(num_tokens, num_experts, generator=draw).topk(min(layer.top_k, num_experts)).indices
    weight_TK = torch.full(index_TK.shape, 1 / layer.top_k, dtype=dtype)
    hidden_TD = torch.full((num_tokens, layer.hidden_size), 0.01, dtype=dtype)
    return model.get_submodule(layer.experts), hidden_TD, index_TK, weight_TK


def zero_biases(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module of the meta model values where a product adds some; matrices stay as they are."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta and "bias" in name:
                setattr(owner, name, nn.Parameter(torch.zeros(parameter.shape, dtype=dtype), requires_grad=False))


def _small_operation_seconds(dtype: torch.dtype, watch: Stopwatch) -> float:
    """Return the seconds of one of the small operations that modules consist of, with what Python adds."""
    norm = nn.RMSNorm(64, dtype=dtype)
    x_1D = torch.full((1, 1, 64), 0.01, dtype=dtype)

    def operations(_: int) -> None:
        wide = x_1D.to(torch.float32)
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        turned = (norm.weight * scaled.to(dtype)).view(1, 1, 4, 16).transpose(1, 2)
        torch.cat((-turned[..., 8:], turned[..., :8]), dim=-1)

    counting = _Counting()
    with torch.no_grad(), counting:
        operations(0)
    return watch.seconds(operations, range(64)) / counting.num_small


class Stopwatch:
    """Measures computations in seconds of the processor, and how many seconds one of these takes.

    On a machine that does other work besides, what is short meets much of it or none. So all that is measured shares
    one factor, `load`.
    """

    def __init__(self) -> None:
        """Begin."""
        self._passed = self._worked = 0.0

    @property
    def load(self) -> float:
        """Seconds that a second of the processor took, 1 on a machine that does nothing else."""
        return max(1.0, self._passed / self._worked) if self._worked else 1.0

    def seconds(self, compute: Callable[[_T], object], each: Sequence[_T], *, times: int = 1) -> float:
        """Return the mean seconds of the processor of a computation, gone through all of its inputs again and again.

        Args:
            compute: the computation.
            each: its inputs.
            times: how many times as long as others it is repeated for.
        """
        with torch.no_grad():
            for one in each:
                compute(one)
            begun, worked, rounds = time.perf_counter(), time.thread_time(), 0
            while rounds < 2 or time.perf_counter() - begun < times * _PRODUCT_SECONDS:
                for one in each:
                    compute(one)
                rounds += 1
            passed, worked = time.perf_counter() - begun, time.thread_time() - worked
        self._passed += passed
        self._worked += worked
        return worked / (rounds * len(each))
