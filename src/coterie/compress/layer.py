"""One MoE layer on its way: through the passes of a recipe, and back into a model that computes with the result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.compress.methods import load_pass
from coterie.compress.plan import Plan
from coterie.compress.shards import Shard
from coterie.compress.sizes import layer_tensors
from coterie.compress.state import LayerSize, LayerState
from coterie.errors import ArchitectureMismatch
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion, put
from coterie.model.arch.experts import canonical_experts, native_experts
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.arch.load import result_meta_model
from coterie.model.arch.ragged import Place, cut, places_of
from coterie.model.arch.reroute import Reroute
from coterie.model.arch.seam import intercepted
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.filled import filled_up
from coterie.model.disk.header import read_header
from coterie.model.nested import mapped
from coterie.model.stream.stream import Call, Stream
from coterie.model.stream.unit import Unit
from coterie.profile.profile import Sample
from coterie.profile.statistics import over_domains


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """What the manifest says of one layer."""

    expert_map: list[int]
    centres: list[int] | None
    num_experts: int
    width: int
    notes: Mapping[str, object]

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self)


def compress_layer(
    model: PreTrainedModel,
    layer: MoELayer,
    size: LayerSize,
    passes: Sequence[tuple[str, Mapping[str, Any]]],
    by_domain: Mapping[str, Tensor],
    sample: Sample,
    reroute: Reroute,
    seed: int,
    peaks_LE: Tensor | None = None,
) -> tuple[dict[str, Tensor], LayerSummary]:
    """Send a layer whose weights are in memory through the passes.

    Args:
        model: the model that holds the layer's weights.
        layer: which one.
        size: what it gets.
        passes: names of passes and their options.
        by_domain: the layer's statistics, domains first.
        sample: its token sample.
        reroute: the model's own routers, for other router tensors.
        seed: seed of everything random in the passes.
        peaks_LE: the statistic ``output_peak`` of all layers, where a pass needs it and the whole model was measured.

    Returns:
        The tensors of its experts and router by name in memory, float32, on the CPU; and what was done.
    """
    module = model.get_submodule(layer.experts)
    experts = canonical_experts(module).map(lambda tensor: tensor.to("cpu", torch.float32))
    state_dict = {name: model.state_dict()[name] for name, _ in layer.router_tensors}
    router = {name: tensor.to("cpu", torch.float32) for name, tensor in state_dict.items()}
    state = LayerState(
        layer=layer,
        experts=experts,
        router=router,
        original_router=router,
        expert_map_E=torch.arange(layer.num_experts),
        statistics={name: over_domains(name, value_G) for name, value_G in by_domain.items()},
        by_domain=by_domain,
        sample=_copied(sample),
        original=experts,
        route=functools.partial(reroute, layer),
        seed=seed,
        peaks_LE=peaks_LE,
    )
    del experts, state_dict
    for name, options in passes:
        state = load_pass(name)(state, size, **options)
    summary = LayerSummary(
        expert_map=state.expert_map_E.tolist(),
        centres=None if state.centres_M is None else state.centres_M.tolist(),
        num_experts=state.experts.num_experts,
        width=state.experts.width,
        notes=dict(state.notes),
    )
    native = native_experts(module, state.experts)
    return {f"{layer.experts}.{name}": tensor for name, tensor in native.items()} | dict(state.router), summary


def _copied(sample: Sample) -> Sample:
    """Return a copy: matrix products may differ in the last bit where a file's tensors lie at odd places in memory."""
    return replace(sample, **{name: tensor.clone() for name, tensor in sample.tensors().items()})


class ResultModel:
    """The meta model of the result; lends its units, filled with compressed weights, to a stream.

    Attributes:
        model: the meta model of the result.
    """

    def __init__(self, stream: Stream, architecture: Architecture, plan: Plan) -> None:
        self._stream = stream
        self._architecture = architecture
        self._count = plan.sizes[0].num_experts
        self._width = plan.sizes[0].width
        self._top_k = plan.sizes[0].top_k
        self._mapped = plan.router == "map"
        self._places: dict[str, Place] = {}
        if plan.ragged:
            parts = layer_tensors(stream.checkpoint, architecture.layers, stream.conversion)
            self._places = places_of(stream.conversion, architecture, [part.experts for part in parts])
        self._widths = {index: size.widths for index, size in enumerate(plan.sizes) if size.widths is not None}
        self.model = self._meta_model()
        self._scratch: PreTrainedModel | None = None

    @property
    def ragged(self) -> dict[str, Any] | None:
        """What the manifest of a ragged result says, for `coterie.model.disk.filled.filled_up`; else None."""
        if not self._places:
            return None
        axes = {place.pattern: place.axis for place in self._places.values()}
        return {"width": self._architecture.layers[0].width, "axes": axes}

    def on_disk(self, memory: Mapping[str, Tensor], conversions: list[Any]) -> dict[str, Tensor]:
        """Return the tensors of layers as a weight file holds them, by name on disk."""
        return cut(self._stream.conversion.write(self.model, memory, conversions), self._places, self._widths)

    def rounded(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors as a loader will see them: rounded to the number format on disk."""
        stream = self._stream
        on_disk = {name: stream.conversion.sources[name][0] for name in memory}
        return {
            name: tensor.to(TORCH_DTYPES[stream.checkpoint.tensors[on_disk[name]].dtype])
            for name, tensor in memory.items()
        }

    def read(self, folder: Path, shard: Shard, layers: Sequence[MoELayer]) -> dict[str, Tensor]:
        """Read the experts and routers of layers, by name in memory, back from a weight file of the result."""
        _, tensors, _ = self._open(folder, shard)
        wanted = tuple(name for layer in layers for name in (f"{layer.experts}.", *dict(layer.router_tensors)))
        return {name: tensor for name, tensor in tensors.items() if name.startswith(wanted)}

    def changed(self, folder: Path, shard: Shard, memory: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the tensors of a weight file by name on disk, with some replaced; None when it holds none of those."""
        raw, tensors, conversions = self._open(folder, shard)
        new = {name: tensor for name, tensor in memory.items() if name in tensors}
        if not new:
            return None
        filled = self._stream.conversion.write(self.model, new, conversions)
        return cut({**raw, **filled}, self._places, self._widths)

    def _open(self, folder: Path, shard: Shard) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any]]:
        """Return the tensors of a weight file by name on disk (filled up) and in memory, and the conversions."""
        part = Checkpoint(path=folder, config={}, tensors=read_header(folder / shard.file), digest="")
        part = filled_up(part, self.ragged)
        self._scratch = self._scratch or self._meta_model()
        with part.reader() as reader:
            raw = {name: reader.read(name) for name in part.tensors}
        return raw, *WeightConversion(part, self._scratch).convert(dict(raw), lambda name: torch.float32)

    @contextmanager
    def filled(
        self, unit: Unit, memory: Mapping[str, Tensor], maps: Mapping[int, Sequence[int]]
    ) -> Iterator[nn.Module]:
        """Within the block, the result's counterpart of a unit has weights: new ones, else those of the unit itself.

        Args:
            unit: a unit of the stream whose weights are in memory.
            memory: new tensors by name in memory.
            maps: by index of the layer, the expert that stands for each router row; used by a mapped result only.
        """
        stream, empty = self._stream, self.model.state_dict()
        own = {name: tensor.detach() for name, tensor in stream.model.state_dict().items() if name in unit.names}
        for name in unit.names:
            put(self.model, name, memory[name].to(stream.device, own[name].dtype) if name in memory else own[name])
        if self._mapped:
            for layer in self._architecture.layers:
                if layer.index in maps:
                    experts: Any = self.model.get_submodule(layer.experts)
                    experts.coterie_expert_map = torch.tensor(maps[layer.index])
        module = self.model.get_submodule(unit.name)
        stream.move_buffers(module, stream.device)
        try:
            yield module
        finally:
            for name in unit.names:
                put(self.model, name, empty[name])
            stream.move_buffers(module, torch.device("cpu"))

    def check_rest(self, call: Call, module: nn.Module) -> None:
        """Check that a unit of narrower experts does all that is not theirs as before.

        Where the entry of config.json that is their width sizes other parts too, a second entry was changed to make up
        for it (`coterie.model.arch.width`), and nothing but this shows that it has no other meaning. Routing (where
        experts were not cut) and output are compared, with the experts left out on both sides.

        Args:
            call: of the unit, whose weights are in memory.
            module: the result's counterpart, `filled`.

        Raises:
            ArchitectureMismatch: something differs.
        """
        before = _without_experts(self._stream.model, call.compute, routing=self._top_k is None)
        after = _without_experts(self.model, lambda: call.compute(module), routing=self._top_k is None)
        for one, other in zip(before, after, strict=True):
            same = torch.equal(one, other)
            if not same and one.shape == other.shape and one.is_floating_point():
                same = float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())
            if not same:
                raise ArchitectureMismatch(
                    "with config.json changed to narrower experts, this family computes something else beside them; "
                    "use a recipe that lowers the number of experts, and please report it"
                )

    def _meta_model(self) -> PreTrainedModel:
        unset = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in self._architecture.layers]
        return result_meta_model(
            self._architecture,
            self._count,
            maps=unset if self._mapped else None,
            dtype=self._stream.dtype,
            width=self._width,
            top_k=self._top_k,
        )


def _without_experts(model: PreTrainedModel, compute: Callable[[], Any], *, routing: bool) -> list[Tensor]:
    """Return what experts of a model received while something was computed, and its output had they returned zeros."""
    seen: list[Tensor] = []

    def skip(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        seen.extend((hidden_TD, index_TK, weight_TK) if routing else (hidden_TD,))
        return torch.zeros_like(hidden_TD)

    with intercepted(model, skip):
        mapped(compute(), seen.append)
    return seen
