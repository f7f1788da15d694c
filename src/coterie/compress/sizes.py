"""What a result weighs, from headers.

Legend: E experts, F expert width, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.compress.layer_plan import LayerPlan
from coterie.errors import ArchitectureMismatch
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.experts import width_axes
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.disk.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Names on disk of one layer's tensors that have an expert axis."""

    experts: tuple[str, ...]
    router: tuple[str, ...]


def layer_tensors(
    checkpoint: Checkpoint, layers: tuple[MoELayer, ...], conversion: WeightConversion
) -> tuple[LayerTensors, ...]:
    """Return for each layer the names on disk of its experts' and its router's tensors.

    Raises:
        ArchitectureMismatch: a layer has no expert or no router tensor in the checkpoint.
    """
    owner: dict[str, tuple[int, str]] = {}
    for layer in layers:
        owner.update({name: (layer.index, "router") for name, _ in layer.router_tensors})
    prefixes = {layer.experts: layer.index for layer in layers}
    found: list[dict[str, list[str]]] = [{"experts": [], "router": []} for _ in layers]
    for disk_name in sorted(checkpoint.tensors):
        memory_name = conversion.memory_names[disk_name]
        if memory_name in owner:
            index, kind = owner[memory_name]
            found[index][kind].append(disk_name)
        elif (prefix := memory_name.rpartition(".")[0]) in prefixes:
            found[prefixes[prefix]]["experts"].append(disk_name)
    for layer, entry in zip(layers, found, strict=True):
        for kind, names in entry.items():
            if not names:
                raise ArchitectureMismatch(f"{checkpoint.path}: no tensor of the {kind} of {layer.block} was found")
    return tuple(LayerTensors(experts=tuple(entry["experts"]), router=tuple(entry["router"])) for entry in found)


@dataclass(frozen=True, slots=True)
class _Amounts:
    """Bytes, or elements, of one layer: of its neurons, and of what else goes with an expert."""

    neurons: int
    experts: int


class Sizing:
    """Predicts the size of a result: tensors with an expert axis, or a width axis, become smaller."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        conversion: WeightConversion,
        parts: tuple[LayerTensors, ...],
        *,
        keeps_rows: bool,
    ) -> None:
        """Measure the parts of each layer.

        Args:
            checkpoint: the original.
            architecture: its architecture.
            conversion: between its names on disk and in memory.
            parts: names of its experts' and routers' tensors.
            keeps_rows: whether the router keeps its rows, however many experts go.
        """
        self._layers = architecture.layers
        self._total = {
            measure: sum(getattr(info, measure) for info in checkpoint.tensors.values())
            for measure in ("num_bytes", "num_elements")
        }
        state = architecture.model.state_dict()
        self._amounts: dict[str, list[_Amounts]] = {}
        for measure in self._total:
            self._amounts[measure] = []
            for layer, part in zip(self._layers, parts, strict=True):
                axes = width_axes(architecture.model.get_submodule(layer.experts))
                router_axes = dict(layer.router_tensors)
                neurons = others = 0
                for name in part.experts:
                    amount = getattr(checkpoint.tensors[name], measure)
                    wide = conversion.memory_names[name].rpartition(".")[2] in axes
                    neurons, others = neurons + amount * wide, others + amount * (not wide)
                for name in () if keeps_rows else part.router:
                    # Rows behind the experts' (for shared experts, or for "no expert") stay.
                    memory = conversion.memory_names[name]
                    rows = state[memory].shape[router_axes[memory]]
                    others += getattr(checkpoint.tensors[name], measure) * layer.num_experts // rows
                self._amounts[measure].append(_Amounts(neurons, others))

    def num_bytes(self, layers: Sequence[LayerPlan]) -> int:
        """Return the bytes of all tensors when every layer becomes what its plan says."""
        return self._sum("num_bytes", layers)

    def num_parameters(self, layers: Sequence[LayerPlan]) -> int:
        """Return the elements of all tensors when every layer becomes what its plan says."""
        return self._sum("num_elements", layers)

    def neuron_bytes(self, layer: int) -> int:
        """Return the bytes that one hidden neuron of one expert of a layer takes."""
        facts = self._layers[layer]
        return self._amounts["num_bytes"][layer].neurons // (facts.num_experts * facts.width)

    def _sum(self, measure: str, layers: Sequence[LayerPlan]) -> int:
        total: int = self._total[measure]
        for layer, plan, amounts in zip(self._layers, layers, self._amounts[measure], strict=True):
            whole = layer.num_experts * layer.width
            neurons = sum(plan.widths) if plan.widths is not None else plan.num_experts * (plan.width or layer.width)
            total += amounts.neurons * neurons // whole - amounts.neurons
            total += amounts.experts * plan.num_experts // layer.num_experts - amounts.experts
        return total
