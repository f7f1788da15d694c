"""One MoE layer on its way: through the passes of a recipe, and back into a model that computes with the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.compress.methods import load_pass
from coterie.compress.plan import Plan
from coterie.compress.shards import Shard
from coterie.compress.state import LayerSize, LayerState
from coterie.model.checkpoint import Checkpoint, read_header
from coterie.model.convert import TORCH_DTYPES, Crossing, put
from coterie.model.layers import Architecture, MoELayer, canonical_experts, native_experts
from coterie.model.load import hollow_result
from coterie.model.stream import Stream, Unit
from coterie.profile.profile import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """What the manifest says of one layer."""

    expert_map: list[int]
    centres: list[int] | None
    num_experts: int
    notes: Mapping[str, object]

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self)


def compress_layer(
    model: PreTrainedModel,
    layer: MoELayer,
    size: LayerSize,
    passes: Sequence[tuple[str, Mapping[str, Any]]],
    statistics: Mapping[str, Tensor],
    sample: Sample,
) -> tuple[dict[str, Tensor], LayerSummary]:
    """Send a layer whose weights are in memory through the passes.

    Args:
        model: the model that holds the layer's weights.
        layer: which one.
        size: what it gets.
        passes: names of passes and their options.
        statistics: the layer's statistics, summed over domains.
        sample: its token sample.

    Returns:
        The tensors of its experts and router by name in memory, float32, on the CPU; and what was done.
    """
    module = model.get_submodule(layer.experts)
    experts = canonical_experts(module).map(lambda tensor: tensor.to("cpu", torch.float32))
    state_dict = {name: model.state_dict()[name] for name, _ in layer.router_tensors}
    state = LayerState(
        layer=layer,
        experts=experts,
        router={name: tensor.to("cpu", torch.float32) for name, tensor in state_dict.items()},
        expert_map_E=torch.arange(layer.num_experts),
        statistics=statistics,
        sample=sample,
        original=experts,
    )
    del experts, state_dict
    for name, options in passes:
        state = load_pass(name)(state, size, **options)
    summary = LayerSummary(
        expert_map=state.expert_map_E.tolist(),
        centres=None if state.centres_M is None else state.centres_M.tolist(),
        num_experts=state.experts.num_experts,
        notes=dict(state.notes),
    )
    native = native_experts(module, state.experts)
    return {f"{layer.experts}.{name}": tensor for name, tensor in native.items()} | dict(state.router), summary


class Swap:
    """The empty model of the result; lends its units, filled with compressed weights, to a stream.

    Attributes:
        model: the empty model of the result.
    """

    def __init__(self, stream: Stream, architecture: Architecture, plan: Plan) -> None:
        self._stream = stream
        self._architecture = architecture
        self._count = plan.sizes[0].num_experts
        self._mapped = plan.router == "map"
        self.model = self._hollow()
        self._scratch: PreTrainedModel | None = None

    def rounded(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors as a loader will see them: rounded to the number format on disk."""
        stream = self._stream
        on_disk = {name: stream.crossing.sources[name][0] for name in memory}
        return {
            name: tensor.to(TORCH_DTYPES[stream.checkpoint.tensors[on_disk[name]].dtype])
            for name, tensor in memory.items()
        }

    def read(self, folder: Path, shard: Shard, layers: Sequence[MoELayer]) -> dict[str, Tensor]:
        """Read the experts and routers of layers, by name in memory, back from a weight file of the result."""
        part = Checkpoint(path=folder, config={}, tensors=read_header(folder / shard.file), digest="")
        self._scratch = self._scratch or self._hollow()
        with part.reader() as reader:
            raw = {name: reader.read(name) for name in part.tensors}
        tensors, _ = Crossing(part, self._scratch).convert(raw, lambda name: torch.float32)
        wanted = tuple(name for layer in layers for name in (f"{layer.experts}.", *dict(layer.router_tensors)))
        return {name: tensor for name, tensor in tensors.items() if name.startswith(wanted)}

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

    def _hollow(self) -> PreTrainedModel:
        unset = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in self._architecture.layers]
        return hollow_result(
            self._architecture, self._count, maps=unset if self._mapped else None, dtype=self._stream.dtype
        )
