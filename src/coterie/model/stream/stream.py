"""Run a model of any size with one of its units in memory at a time.

A *unit* is a decoder layer, an embedding, a norm or a head: any part that holds weights and is called as a whole. The
model is built empty (its weights on the meta device). Every batch is a job that runs the model's own, unchanged
``forward`` in a thread of its own. Wherever a job calls a unit, it waits; when all jobs wait, the unit's weights are
read from the checkpoint, all jobs' calls are computed one after another, and the weights are let go. So nothing about a
family's forward pass needs to be known: masks, several residual streams and extra arguments are its own affair.

    with Stream(checkpoint) as stream:
        run = stream.run([lambda ids=ids: stream.model(input_ids=ids, use_cache=False).logits for ids in batches])
        for stage in run:
            print(stage.unit.name, len(stage.calls))
        logits = run.results

Jobs take turns: one thread runs at a time, so results do not depend on timing. What units return is kept in files
beyond `SPILL_BYTES` of `coterie.model.stream.spill`, so that the memory of a stage does not grow with the text either.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.errors import CorruptCheckpoint
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion, put
from coterie.model.arch.load import checkpoint_meta_model
from coterie.model.device import check_device
from coterie.model.disk.checkpoint import Checkpoint, TensorReader
from coterie.model.disk.damage import check_finite
from coterie.model.nested import mapped, tensors_in
from coterie.model.stream.backward import Backward
from coterie.model.stream.graph import call_unit
from coterie.model.stream.jobs import JobThread
from coterie.model.stream.loss import loss_and_gradient
from coterie.model.stream.spill import Spill, keep_out_of_heaps, share_heaps, trim_memory
from coterie.model.stream.unit import Unit
from coterie.progress import advance


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One job's call of the unit whose weights are in memory.

    `compute` may be called more than once, or never; `finish` hands a value back to the job.
    """

    job: int
    _compute: Callable[..., Any]
    _finish: Callable[[int, Any], None]

    def compute(self, module: nn.Module | None = None, watch: Callable[[Any], None] | None = None) -> Any:
        """Run the unit, or a module in its place, on what the job passed; the output is on the stream's device.

        Where the job wants gradients of the unit's inputs, those are returned, and `watch` is called with what the
        unit returned, before they are computed.
        """
        return self._compute(module=module, watch=watch)

    def finish(self, output: Any) -> None:
        """Let the job go on with `output` after this stage."""
        self._finish(self.job, output)


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A unit in memory, and the calls of it that wait.

    Attributes:
        unit: which one.
        calls: one a job, in the order of the jobs.
        backward: whether the calls want gradients of what they passed before.
        kept: raw tensors by name on disk, as `Stream.run` was asked to keep them.
        conversions: how the unit's names and layouts were changed while reading, for `WeightConversion.write`.
    """

    unit: Unit
    calls: tuple[Call, ...]
    backward: bool
    kept: dict[str, Tensor]
    conversions: list[Any]


class Stream(AbstractContextManager["Stream"]):
    """A checkpoint's model, run one unit at a time.

    Attributes:
        model: the model; its weights are on the meta device except while a unit's stage lasts.
        units: its units, in the order of their modules.
        conversion: between the names on disk and in memory.
        bytes_read: bytes of tensors that were read from the checkpoint so far.
        reads_ahead: whether the next layer is read while one is computed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        scratch: Path | None = None,
    ) -> None:
        """Build the meta model.

        Args:
            checkpoint: what to run.
            dtype: number format of the weights while they are in memory; see `working_dtype`.
            device: where units are computed; everything else stays on the CPU.
            scratch: folder for outputs beyond `coterie.model.stream.spill.SPILL_BYTES`; the system's own when None.

        Raises:
            NotACheckpoint, CorruptCheckpoint: the model cannot be built, or tensors are missing.
            InputError: no such device.
        """
        share_heaps()
        self.checkpoint = checkpoint
        self.device = check_device(device)
        self.dtype = dtype or working_dtype(checkpoint, self.device)
        # Where units are computed elsewhere, the next one is read meanwhile; here that would only cost memory.
        self.reads_ahead = self.device.type != "cpu"
        self.model = checkpoint_meta_model(checkpoint, dtype=self.dtype).requires_grad_(False)
        self.conversion = WeightConversion(checkpoint, checkpoint_meta_model(checkpoint, dtype=torch.float32))
        self._spill = Spill(scratch)
        self._reader: TensorReader | None = None
        self._bytes_read = 0
        self._modules = _unit_modules(self.model)
        self._precise = _kept_precise(self.model, self.dtype)
        self._load_lock = threading.Lock()
        self._sources = self.conversion.all_sources(self.model)
        self.units = tuple(self._describe(name, order) for order, name in enumerate(self._modules))
        # What a job waits for that wants the gradient of its loss: all heads at once, after all units.
        self._loss = Unit(name="loss", order=len(self.units), names=(), disk_names=())
        self.conversion.check_whole(self.model)
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Self:
        self._reader = TensorReader(self.checkpoint)
        for unit in self.units:
            module = self._modules[unit.name]
            self._originals[unit.name] = module.forward
            module.forward = functools.partial(self._called, unit)
        # Weights that containers hold themselves are few and may be used anywhere: they stay in memory.
        for name, tensor in self._load(self._loose_names())[0].items():
            put(self.model, name, tensor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, original in self._originals.items():
            self._modules[name].forward = original
        self._originals.clear()
        assert self._reader is not None
        self._reader.close()
        self._bytes_read, self._reader = self.bytes_read, None

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the checkpoint so far."""
        return self._bytes_read + (0 if self._reader is None else self._reader.num_bytes_read)

    def run(
        self,
        jobs: Sequence[Callable[[], Any]],
        *,
        keep: Callable[[str], bool] = lambda name: False,
        gradients: bool = False,
    ) -> StreamRun:
        """Run jobs; iterate over what is returned to go through the stages.

        Args:
            jobs: functions that call `model`, each run in a thread of its own.
            keep: which raw tensors (by name on disk) a stage hands out in `Stage.kept`.
            gradients: whether jobs may call ``backward`` on what they computed: the units then come by once more, in
                reverse order (`Stage.backward`). What every unit received is kept in files meanwhile.
        """
        if gradients:
            keep_out_of_heaps()
        return StreamRun(self, jobs, keep, gradients)

    def logits_job(self, ids_BS: Tensor) -> Callable[[], Tensor]:
        """Return a job that computes logits (B, S, V) from token ids."""

        def job() -> Tensor:
            logits_BSV: Tensor = self.model(input_ids=ids_BS, use_cache=False).logits
            return logits_BSV

        return job

    def loss_job(
        self, ids_BS: Tensor, counts_BS: Tensor | None = None, see: Callable[[Tensor], None] | None = None
    ) -> Callable[[], float]:
        """Return a job that sends the gradient of the summed next-token loss (nats) back through all layers.

        Args:
            ids_BS: the tokens.
            counts_BS: the loss of which of them counts, bool; None for all.
            see: told what comes into the head, (B, S, D).
        """

        def job() -> float:
            output = self.model.base_model(input_ids=ids_BS, use_cache=False)
            hidden_BSD, kind = output.last_hidden_state, type(output)
            if see is not None:
                see(hidden_BSD.detach())
            worker = threading.current_thread()
            assert isinstance(worker, JobThread), "a loss is sent back in a run of this stream only"
            request = (ids_BS, kind(last_hidden_state=hidden_BSD.detach()), counts_BS)
            loss, gradient_BSD = worker.wait(self._loss, request, {})
            del request
            hidden_BSD.backward(gradient_BSD)
            return float(loss)

        return job

    def base_job(self, ids_BS: Tensor, see: Callable[[Tensor], None] | None = None) -> Callable[[], None]:
        """Return a job that sends token ids (B, S) through all layers, for whoever watches them.

        Args:
            ids_BS: the tokens.
            see: told what comes out at the end, (B, S, D).
        """

        def job() -> None:
            output = self.model.base_model(input_ids=ids_BS, use_cache=False)
            if see is not None:
                see(output.last_hidden_state)

        return job

    def read(self, name: str) -> Tensor:
        """Read one tensor by its name on disk, as it is there."""
        assert self._reader is not None, "the stream is not open"
        return self._reader.read(name)

    def release(self) -> None:
        """Let the system take the memory of outputs that are in files; they stay readable, also of a closed stream."""
        self._spill.release()

    @staticmethod
    def move_buffers(module: nn.Module, device: torch.device) -> None:
        """Move the buffers of a module that checkpoints do not hold, which are never empty."""
        for owner in module.modules():
            for name in owner._non_persistent_buffers_set:
                if (buffer := owner._buffers.get(name)) is not None:
                    owner._buffers[name] = buffer.to(device)

    def unit_bytes(self, unit: Unit) -> int:
        """Bytes of a unit in the working number format."""
        state = self._state
        return sum(state[name].numel() * self._dtype_of(name).itemsize for name in unit.names)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor, Any], Tensor]]:
        """Within the block, a function gives logits (B, S, V) from token ids (B, S) and what the base model returned.

        All units outside the base model (as a rule the head alone) are in memory meanwhile. Where what the base model
        returned wants gradients, the logits have a graph.
        """
        base: Any = self.model.base_model
        outside = self.outside()
        for unit in outside:
            self._fill(self._load_unit(unit, lambda name: False))

        def logits(ids_BS: Tensor, output: Any) -> Tensor:
            base.forward = lambda *args, **kwargs: output
            try:
                with torch.set_grad_enabled(output.last_hidden_state.requires_grad):
                    logits_BSV: Tensor = self.model(input_ids=ids_BS, use_cache=False).logits
                return logits_BSV
            finally:
                del base.forward

        try:
            yield logits
        finally:
            for unit in outside:
                self._empty(unit)

    def outside(self) -> list[Unit]:
        """Return the units outside the base model, as a rule the head alone."""
        base = self.model.base_model
        assert base is not self.model, f"{type(self.model).__name__} has no head"
        inside = {id(module) for module in base.modules()}
        return [unit for unit in self.units if id(self._modules[unit.name]) not in inside]

    def _describe(self, name: str, order: int) -> Unit:
        prefix = f"{name}."
        names = tuple(sorted(key for key in self._state if key.startswith(prefix)))
        return Unit(name=name, order=order, names=names, disk_names=self._disk_names(names))

    def _disk_names(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(sorted({disk for name in names for disk in self._sources.get(name, ())}))

    @functools.cached_property
    def _state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    @functools.cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.model.named_parameters(remove_duplicate=False))

    def _loose_names(self) -> tuple[str, ...]:
        in_units = {name for unit in self.units for name in unit.names}
        return tuple(sorted(self._state.keys() - in_units))

    def _called(self, unit: Unit, *args: Any, **kwargs: Any) -> Any:
        """Stand in for a unit's forward: a job waits for its turn, anybody else computes at once."""
        worker = threading.current_thread()
        if isinstance(worker, JobThread):
            for tensor in tensors_in((args, kwargs)):
                self._spill.settle(tensor)
            return call_unit(worker, unit, args, kwargs) if worker.gradients else worker.wait(unit, args, kwargs)
        args, kwargs = mapped((args, kwargs), lambda tensor: tensor.to(self.device))
        return self._originals[unit.name](*args, **kwargs)

    def _compute(
        self,
        unit: Unit,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        module: nn.Module | None = None,
        watch: Callable[[Any], None] | None = None,
    ) -> Any:
        forward = self._originals[unit.name] if module is None else module.forward
        if args and isinstance(args[0], Backward):
            return args[0].compute(forward, self.device, watch)
        args, kwargs = mapped((args, kwargs), lambda tensor: tensor.to(self.device))
        with torch.no_grad():
            return forward(*args, **kwargs)

    def _load_unit(self, unit: Unit, keep: Callable[[str], bool]) -> Loaded:
        tensors, kept, conversions = self._load(unit.names, keep)
        return Loaded(unit=unit, tensors=tensors, kept=kept, conversions=conversions)

    def _load(
        self, names: Sequence[str], keep: Callable[[str], bool] = lambda name: False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]:
        """Read tensors by their names in memory, in the working number format, on the CPU."""
        assert self._reader is not None, "the stream is not open"
        with self._load_lock:
            raw = {name: self._reader.read(name) for name in self._disk_names(names)}
            for name, tensor in raw.items():
                path = self.checkpoint.path / self.checkpoint.tensors[name].shard
                check_finite(path, name, tensor, infinity=self.conversion.memory_names[name] not in self._parameters)
            kept = {name: tensor for name, tensor in raw.items() if keep(name)}
            converted, conversions = self.conversion.convert(raw, self._dtype_of)
        tied: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        tensors = {}
        for name in names:
            source = name if name in converted else tied.get(name, name)
            if source not in converted:
                source = next((other for other in converted if tied.get(other) == name), source)
            if source not in converted:
                raise CorruptCheckpoint(f"{self.checkpoint.path}: {name} was not made from {self._sources.get(name)}")
            tensors[name] = converted[source]
        return tensors, kept, conversions

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if self._precise(name) else self.dtype

    def _fill(self, loaded: Loaded) -> None:
        """Put a unit's weights in their places."""
        while loaded.tensors:
            name, tensor = loaded.tensors.popitem()
            put(self.model, name, tensor.to(self.device))
        self.move_buffers(self._modules[loaded.unit.name], self.device)

    def _empty(self, unit: Unit) -> None:
        for name in unit.names:
            put(self.model, name, self._state[name])
        self.move_buffers(self._modules[unit.name], torch.device("cpu"))
        trim_memory()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A unit's weights by name in memory, the raw tensors that were to be kept, and the conversions that were used."""

    unit: Unit
    tensors: dict[str, Tensor]
    kept: dict[str, Tensor]
    conversions: list[Any]


class StreamRun:
    """Jobs on their way through a stream; iterate to go through the stages.

    Calls that the loop's body leaves alone are computed when it asks for the next stage.

    Attributes:
        results: what the jobs returned, once the iteration is over.
    """

    def __init__(
        self,
        stream: Stream,
        jobs: Sequence[Callable[[], Any]],
        keep: Callable[[str], bool],
        gradients: bool,
    ) -> None:
        self.results: list[Any] = []
        self._stream = stream
        self._jobs = jobs
        self._keep = keep
        self._gradients = gradients

    def __iter__(self) -> Iterator[Stage]:
        stream = self._stream
        workers = [JobThread(number, job, gradients=self._gradients) for number, job in enumerate(self._jobs)]
        ahead = ThreadPoolExecutor(1) if stream.reads_ahead else None
        next_up: tuple[Unit, Future[Loaded]] | None = None
        try:
            for worker in workers:
                worker.go()
            while waiting := [worker for worker in workers if worker.unit is not None]:
                unit, backward = _next_unit(waiting)
                here = [worker for worker in waiting if worker.unit is unit and worker.goes_back == backward]
                if unit is stream._loss:
                    self._losses(here)
                    continue
                if next_up is not None and next_up[0] is unit:
                    loaded = next_up[1].result()
                else:
                    loaded = stream._load_unit(unit, self._keep)
                next_up = None
                stream._fill(loaded)
                if ahead is not None and (following := self._following(unit, backward)) is not None:
                    next_up = (following, ahead.submit(stream._load_unit, following, self._keep))
                outputs: dict[int, Any] = {}
                try:
                    yield from self._stage(loaded, here, backward, outputs)
                finally:
                    kept = loaded.kept
                    del loaded
                    kept.clear()
                    stream._empty(unit)
                for worker in here:
                    worker.go(outputs.pop(worker.number))
                    stream._spill.release()
            self.results = [worker.result for worker in workers]
        finally:
            for worker in workers:
                worker.abort()
            if ahead is not None:
                ahead.shutdown(wait=True, cancel_futures=True)

    def _losses(self, here: list[JobThread]) -> None:
        """Answer jobs one after another with their loss and its gradient at what the base model returned."""
        stream = self._stream
        vocab_size = int(stream.model.config.get_text_config().vocab_size)
        with stream.head() as head:
            for worker in here:
                (ids_BS, output, counts_BS), _ = worker.request
                loss, gradient_BSD = loss_and_gradient(head, ids_BS, output, vocab_size=vocab_size, counts_BS=counts_BS)
                worker.go((loss, stream._spill.keep(gradient_BSD)))
                del gradient_BSD, output
                stream._spill.release()

    def _stage(self, loaded: Loaded, here: list[JobThread], backward: bool, outputs: dict[int, Any]) -> Iterator[Stage]:
        stream = self._stream
        stream._spill.begin(hold=not self._gradients)

        def finish(job: int, output: Any) -> None:
            outputs[job] = mapped(output, stream._spill.keep)
            stream._spill.release()
            advance(1 / len(here))

        calls = tuple(
            Call(worker.number, functools.partial(stream._compute, loaded.unit, *worker.request), finish)
            for worker in here
        )
        yield Stage(loaded.unit, calls, backward, loaded.kept, loaded.conversions)
        for call in calls:
            if call.job not in outputs:
                call.finish(call.compute())

    def _following(self, unit: Unit, backward: bool) -> Unit | None:
        """Guess the unit that comes next: its neighbour in the same list of layers."""
        later = [other for other in self._stream.units if other.order == unit.order + (-1 if backward else 1)]
        return later[0] if later and _same_list(unit.name, later[0].name) else None


def _next_unit(waiting: Sequence[JobThread]) -> tuple[Unit, bool]:
    """Return the unit whose turn it is, and whether for gradients: the first forward, else the last backward."""
    there = [worker.unit for worker in waiting if worker.unit is not None and not worker.goes_back]
    if there:
        return min(there, key=lambda unit: unit.order), False
    return max((worker.unit for worker in waiting if worker.unit is not None), key=lambda unit: unit.order), True


def working_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the number format that a model runs in: float32 on the CPU, elsewhere the one of most of its weights."""
    if device.type == "cpu":
        return torch.float32
    sizes: dict[torch.dtype, int] = {torch.float32: 0}
    for info in checkpoint.tensors.values():
        if (dtype := TORCH_DTYPES.get(info.dtype)) is not None:
            sizes[dtype] = sizes.get(dtype, 0) + info.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _unit_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that are units by name: the members of each list of layers, and what lies beside the lists."""
    units: dict[str, nn.Module] = {}

    def descend(name: str, module: nn.Module) -> None:
        if not module.state_dict():
            return
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
        holds_list = any(isinstance(inner, nn.ModuleList | nn.ModuleDict) for inner in module.modules())
        for child_name, child in module.named_children():
            if is_list and child.state_dict():
                units[f"{name}.{child_name}"] = child
            elif holds_list and not is_list:
                descend(f"{name}.{child_name}" if name else child_name, child)
        if not holds_list:
            units[name] = module

    descend("", model)
    return units


def _same_list(name: str, other: str) -> bool:
    """Tell whether two units are neighbours in one list of layers."""
    (one, _, first), (two, _, second) = name.rpartition("."), other.rpartition(".")
    return one == two and first.isdigit() and second.isdigit()


def _kept_precise(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return which names a stock loader keeps in float32 whatever the model's number format is."""
    patterns = [re.compile(pattern.replace("*", r"\d+")) for pattern in model._get_dtype_plan(dtype)]
    return lambda name: any(pattern.search(name) for pattern in patterns)
