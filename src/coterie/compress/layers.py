"""Compress layer by layer: every unit of the model comes by once, its MoE layers are compressed, its file is written.

A unit's file is a step of the run, so a run that was killed goes on with the first layer that has none. A finished
layer is not compressed again; it is read back, since the layers after it must receive what it puts out.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from coterie.compress.decide import check_statistics, choose, needs_of_plan
from coterie.compress.lanes import Lane, Lanes
from coterie.compress.layer import LayerSummary, compress_layer
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.pack import Packer
from coterie.compress.plan import Plan
from coterie.compress.result_model import ResultModel
from coterie.compress.shards import Shard, write_shard
from coterie.compress.source import Source
from coterie.compress.state import Measured
from coterie.compress.times import COMPRESSING
from coterie.errors import ArchitectureMismatch
from coterie.journal import Run
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.reroute import Reroute
from coterie.model.stream.stream import Stage, Stream
from coterie.profile.measure import Measure
from coterie.profile.observation import observed, proving, with_residual
from coterie.profile.profile import Profile, Sample, summed
from coterie.progress import total_weight, track, within

#: By index of the layer: its statistics, domains first, and its token sample.
_Measurements = Mapping[int, tuple[Mapping[str, Tensor], Sample]]


@dataclass(kw_only=True)
class LayerWriter:
    """Sends the layers of a model through the passes, and writes them.

    Attributes:
        run: where the files go.
        stream: the model, open.
        source: the same by its headers.
        plan: what each layer becomes.
        result: the meta model of the result.
        shards: the weight files.
        profile: what was measured; None with compressed inputs.
        measure: what is measured on the way, with compressed inputs.
        lanes: who goes through the layers.
        seconds: how long each unit is reckoned to take, by its name.
        packer: what stores matrices in blocks; None where they stay plain numbers.
        summaries: what was done, by index of the layer.
    """

    run: Run
    stream: Stream
    source: Source
    plan: Plan
    result: ResultModel
    shards: Sequence[Shard]
    profile: Profile | None
    measure: Measure | None
    lanes: Lanes
    seconds: Mapping[str, float]
    packer: Packer | None = None
    summaries: dict[int, LayerSummary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reroute = Reroute(self.source.architecture, self.stream.model, self.plan.shape.top_k)

    def write(self) -> Tensor:
        """Compress and write every layer; return the logits (B, S, V) of the result in flight.

        Raises:
            ArchitectureMismatch: text passes a unit twice, or does not pass all MoE layers.
        """
        layers, shard_of = self.source.architecture.layers, {shard.unit: shard for shard in self.shards if shard.unit}
        changed: Container[str] = {name for names in self.source.tensors for name in (*names.experts, *names.router)}
        if self.packer is not None:
            changed = self.packer.names
        passes = self.stream.run(self.lanes.jobs(self.stream), keep=lambda name: name not in changed)
        passed: set[str] = set()
        total, largest = total_weight(self.seconds)
        for stage in track(
            passes, COMPRESSING, total, weight=lambda stage: self.seconds.get(stage.unit.name, 0.0), largest=largest
        ):
            shard = shard_of.get(stage.unit.name)
            unit_layers = [layer for layer in layers if stage.unit.holds(layer.experts)]
            packs = self.packer is not None and (
                bool(unit_layers) or not self.packer.names.isdisjoint(stage.unit.disk_names)
            )
            if (unit_layers or packs) and stage.unit.name in passed:
                raise ArchitectureMismatch(f"{stage.unit.name} runs more than once for one text: not supported")
            if packs:
                self._pack(stage, unit_layers, shard)
            elif unit_layers:
                assert shard is not None, f"{stage.unit.name} has no weight file"
                self._compress(stage, unit_layers, shard)
            elif shard is not None and shard.file not in self.run.finished:
                write_shard(self.run.folder, shard, {name: stage.kept[name] for name in shard.names})
                self.run.finish(shard.file, files=[shard.file])
            passed.add(stage.unit.name)
        missed = [layer.block for layer in layers if layer.index not in self.summaries]
        if missed:
            raise ArchitectureMismatch(f"text ran through the model without passing its MoE layers {missed}")
        return self.lanes.logits(passes.results)

    def _pack(self, stage: Stage, layers: Sequence[MoELayer], shard: Shard | None) -> None:
        """Store the matrices of a unit in blocks, write its file, and let what comes next go on."""
        assert self.packer is not None
        calls = self.lanes.calls(stage)
        if shard is not None and shard.file not in self.run.finished:
            with proving(self.stream.model, tuple(layers)):
                calls[Lane.CHECK, 0].compute()
            summaries = {layer.index: _unchanged(layer, self.plan.layers[layer.index]) for layer in layers}
            disk = {name: tensor for name, tensor in stage.kept.items() if name in shard.names}
            packed = self.packer.pack(stage, layers)
            write_shard(self.run.folder, shard, disk | packed, known={*shard.names, *packed})
            content = {str(index): summary.content() for index, summary in summaries.items()}
            self.run.finish(shard.file, files=[shard.file], content={"layers": content})
        if shard is not None:
            contents = self.run.finished[shard.file].content["layers"]
            self.summaries |= {layer.index: LayerSummary(**contents[str(layer.index)]) for layer in layers}
        memory = self._as_written(stage)
        for (lane, _), call in calls.items():
            if lane is Lane.ORIGINAL:
                call.finish(call.compute())
        with self.result.filled(stage.unit, memory, {}) as module:
            for (lane, _), call in calls.items():
                if lane is not Lane.ORIGINAL:
                    call.finish(call.compute(module))

    def _as_written(self, stage: Stage) -> dict[str, Tensor]:
        """Return the tensors of a unit by name in memory, as a loader will see them; of a tied head its embedding's."""
        names, sources = set(stage.unit.disk_names), self.stream.conversion.all_sources(self.stream.model)
        memory: dict[str, Tensor] = {}
        for shard in self.shards:
            if not names.isdisjoint(shard.names) and shard.file in self.run.finished:
                memory |= self.result.read_all(self.run.folder, shard)
        by_source = {sources[name]: tensor for name, tensor in memory.items()}
        return {name: by_source[sources[name]] for name in stage.unit.names if sources[name] in by_source}

    def _compress(self, stage: Stage, layers: Sequence[MoELayer], shard: Shard) -> None:
        """Compress the MoE layers of a unit (as a rule one), write its file, and let what comes next go on."""
        calls = self.lanes.calls(stage)
        finished = shard.file in self.run.finished
        measurements = self._measurements(stage, layers, measuring=not finished)
        if finished:
            contents = self.run.finished[shard.file].content["layers"]
            summaries = {layer.index: LayerSummary(**contents[str(layer.index)]) for layer in layers}
            memory = self.result.read(self.run.folder, shard, layers)
        else:
            memory, summaries = self._write(stage, layers, shard, dict(measurements))
        del measurements
        self.summaries |= summaries
        maps = {layer.index: summaries[layer.index].expert_map for layer in layers}
        if not finished and self.plan.shape.width is not None:
            self._check_rest(stage, layers, memory, maps)
        with self.result.filled(stage.unit, memory, maps) as module:
            for (lane, _), call in calls.items():
                if lane is not Lane.ORIGINAL:
                    call.finish(call.compute(module))

    def _write(
        self,
        stage: Stage,
        layers: Sequence[MoELayer],
        shard: Shard,
        measurements: dict[int, tuple[Mapping[str, Tensor], Sample]],
    ) -> tuple[dict[str, Tensor], dict[int, LayerSummary]]:
        """Return the new tensors by name in memory, as a loader will see them, and what was done."""
        disk = {name: tensor for name, tensor in stage.kept.items() if name in shard.names}
        memory: dict[str, Tensor] = {}
        summaries: dict[int, LayerSummary] = {}
        for layer in layers:
            by_domain, sample = measurements.pop(layer.index)
            with within(0.9 / len(layers)):
                tensors, summaries[layer.index] = compress_layer(
                    self.stream.model, layer, self._plan_of(layer, by_domain), self.plan.passes, by_domain, sample,
                    self._reroute, self.plan.seed,
                )  # fmt: skip
            disk |= self.result.on_disk(tensors, stage.conversions)
            memory |= self.result.rounded(tensors)
            del by_domain, sample, tensors
        write_shard(self.run.folder, shard, disk)
        content = {str(index): summary.content() for index, summary in summaries.items()}
        self.run.finish(shard.file, files=[shard.file], content={"layers": content})
        return memory, summaries

    def _plan_of(self, layer: MoELayer, by_domain: Mapping[str, Tensor]) -> LayerPlan:
        """Return a layer's plan; where it was measured only now, passes decide only now."""
        plan = self.plan.layers[layer.index]
        if self.profile is not None:
            return plan
        statistics = summed(by_domain)
        return choose(layer, plan, self.plan.passes, Measured(statistics=statistics, by_domain=by_domain))

    def _check_rest(
        self, stage: Stage, layers: Sequence[MoELayer], memory: Mapping[str, Tensor], maps: Mapping[int, Sequence[int]]
    ) -> None:
        """Check that a unit of narrower experts does all that is not theirs as before."""
        routers = {name for layer in layers for name, _ in layer.router_tensors}
        cut = self.plan.shape.top_k is not None
        experts = {name: tensor for name, tensor in memory.items() if cut or name not in routers}
        with self.result.filled(stage.unit, experts, maps) as module:
            self.result.check_rest(self.lanes.calls(stage)[Lane.CHECK, 0], module)

    def _measurements(self, stage: Stage, layers: Sequence[MoELayer], *, measuring: bool) -> _Measurements:
        """Return statistics and sample of each layer: from the profile or, with compressed inputs, measured now.

        Args:
            stage: the unit in memory, with its original weights.
            layers: its MoE layers.
            measuring: False where the unit's file is there already.
        """
        if self.profile is None:
            return self._measured(stage, layers, measuring=measuring)
        if not measuring:
            return {}
        return {
            layer.index: (self.profile.statistics[layer.index], self.profile.samples[layer.index]) for layer in layers
        }

    def _measured(self, stage: Stage, layers: Sequence[MoELayer], *, measuring: bool) -> _Measurements:
        """Measure layers on what compressed ones put out; the output that they should have is the original model's."""
        assert self.measure is not None
        model, calls = self.stream.model, self.lanes.calls(stage)
        collectors = {layer.index: self.measure.collector() for layer in layers}
        if measuring:
            with proving(model, tuple(layers)):
                calls[Lane.COMPRESSED, 0].compute()
        for number, ((domain, _), counts_T) in enumerate(
            zip(self.lanes.batches, self.measure.batch_counts(), strict=True)
        ):
            compressed, original = calls[Lane.COMPRESSED, number], calls[Lane.ORIGINAL, number]
            # A finished layer is observed too: it must hand on the very same numbers as in the first run.
            with observed(model, tuple(layers), fields=()) as targets:
                original.finish(original.compute())
            if not measuring:
                continue
            watched = self.measure.fields
            watching = observed(model, tuple(layers), thin=self.measure.thin, fields=watched, counts_T=counts_T)
            with watching as observations:
                output: Any = compressed.compute()
            for observation, target in zip(observations, targets, strict=True):
                with_output = with_residual(observation, output)
                collectors[observation.layer.index].add(
                    domain, with_output, target_TD=target.output_TD, counts_T=counts_T
                )
        if not measuring:
            return {}
        for each in collectors.values():
            check_statistics(each.statistics, needs_of_plan(self.plan))
        return {index: (each.statistics, each.sample()) for index, each in collectors.items()}


def _unchanged(layer: MoELayer, plan: LayerPlan) -> LayerSummary:
    """Return what is said of a layer whose experts stay."""
    return LayerSummary(
        expert_map=list(range(layer.num_experts)), centres=None, num_experts=layer.num_experts, width=layer.width,
        notes={}, plan=plan.content(),
    )  # fmt: skip
