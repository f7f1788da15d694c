"""The meta model of the result: lends its units, filled with compressed weights, to a stream; writes, reads files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.compress.integers import compressed_config
from coterie.compress.plan import Plan
from coterie.compress.shards import Shard
from coterie.compress.source import Source
from coterie.compress.weights import encodings_of
from coterie.errors import ArchitectureMismatch
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion, put
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.load import result_meta_model
from coterie.model.arch.ragged import Place, cut, places_of
from coterie.model.arch.seam import intercepted
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings import quantization_config
from coterie.model.disk.encodings.shared_base import whole_name
from coterie.model.disk.filled import filled_up
from coterie.model.disk.header import read_header
from coterie.model.disk.manifest import RaggedWidths
from coterie.model.disk.patterns import matching
from coterie.model.disk.quantized import dequantized
from coterie.model.nested import mapped
from coterie.model.stream.stream import Call, Stream
from coterie.model.stream.unit import Unit


class ResultModel:
    """The meta model of the result; lends its units, filled with compressed weights, to a stream.

    Attributes:
        model: the meta model of the result.
        shape: what all its layers have in common.
        encodings: how matrices that are stored in blocks are, by pattern; empty where none are.
    """

    def __init__(self, stream: Stream, source: Source, plan: Plan) -> None:
        self._stream = stream
        self._architecture = source.architecture
        self.shape = plan.shape
        self._mapped = plan.mapped
        self._places: dict[str, Place] = {}
        if plan.ragged:
            expert_names = [names.experts for names in source.tensors]
            self._places = places_of(stream.conversion, source.architecture, expert_names)
        self._widths = {index: layer.widths for index, layer in enumerate(plan.layers) if layer.widths is not None}
        self.encodings = encodings_of(source.weights, plan) if plan.packed else {}
        self._integers = compressed_config(source, plan.types) if plan.integers else None
        self.model = self.empty_model(stream.dtype)
        self._scratch: PreTrainedModel | None = None

    @property
    def ragged(self) -> RaggedWidths | None:
        """What the manifest of a ragged result says, for `coterie.model.disk.filled.filled_up`; else None."""
        if not self._places:
            return None
        axes = {place.pattern: place.axis for place in self._places.values()}
        return RaggedWidths(width=self._architecture.layers[0].width, axes=axes)

    def on_disk(self, memory: Mapping[str, Tensor], conversions: list[Any]) -> dict[str, Tensor]:
        """Return the tensors of layers as a weight file holds them, by name on disk; not those in blocks."""
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
        prefixes = tuple(name for layer in layers for name in (f"{layer.experts}.", *dict(layer.router_tensors)))
        return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}

    def read_all(self, folder: Path, shard: Shard) -> dict[str, Tensor]:
        """Read all tensors of a weight file of the result, by name in memory, as a loader will see them."""
        return self._open(folder, shard)[1]

    def opened(self, folder: Path, shard: Shard) -> tuple[dict[str, Tensor], list[Any]]:
        """Return `read_all`, and the conversions that were used, for `WeightConversion.write`."""
        _, memory, conversions = self._open(folder, shard)
        return memory, conversions

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
        tensors = read_header(folder / shard.file)
        shard_alone = dequantized(Checkpoint(path=folder, config=self._config_of(tensors), tensors=tensors, digest=""))
        shard_alone = filled_up(shard_alone, self.ragged)
        self._scratch = self._scratch or self.empty_model(self._stream.dtype)
        with shard_alone.reader() as reader:
            raw = {name: reader.read(name) for name in shard_alone.tensors}
        return raw, *WeightConversion(shard_alone, self._scratch).convert(dict(raw), lambda name: torch.float32)

    def _config_of(self, names: Collection[str]) -> dict[str, Any]:
        """Return what a config.json would say of a weight file alone, by the names of its tensors."""
        if self._integers is not None:
            return {"quantization_config": self._integers}
        patterns = {matching(whole_name(name), self.encodings) for name in names}
        inside = {pattern: each for pattern, each in self.encodings.items() if pattern in patterns}
        return {"quantization_config": quantization_config(inside)} if inside else {}

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
        stream, meta_state = self._stream, self.model.state_dict()
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
                put(self.model, name, meta_state[name])
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
        before = _without_experts(self._stream.model, call.compute, routing=self.shape.top_k is None)
        after = _without_experts(self.model, lambda: call.compute(module), routing=self.shape.top_k is None)
        for tensor, new_tensor in zip(before, after, strict=True):
            same = torch.equal(tensor, new_tensor)
            if not same and tensor.shape == new_tensor.shape and tensor.is_floating_point():
                same = float((tensor - new_tensor).abs().max()) <= 1e-5 * float(tensor.abs().max())
            if not same:
                raise ArchitectureMismatch(
                    "with config.json changed to narrower experts, this family computes something else beside them; "
                    "use a recipe that lowers the number of experts, and please report it"
                )

    def empty_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Return a meta model of the result that is nobody else's, with parameters of a number format."""
        unset = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in self._architecture.layers]
        return result_meta_model(
            self._architecture,
            self.shape.num_experts,
            maps=unset if self._mapped else None,
            dtype=dtype,
            width=self.shape.width,
            top_k=self.shape.top_k,
        )


def _without_experts(model: PreTrainedModel, compute: Callable[[], Any], *, routing: bool) -> list[Tensor]:
    """Return what experts of a model received while something was computed, and its output had they returned zeros."""
    tensors: list[Tensor] = []

    def skip(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        tensors.extend((hidden_TD, index_TK, weight_TK) if routing else (hidden_TD,))
        return torch.zeros_like(hidden_TD)

    with intercepted(model, skip):
        mapped(compute(), tensors.append)
    return tensors
