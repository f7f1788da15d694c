"""How small: from what the user targets to what every layer gets, and what that weighs.

Legend: E experts, F expert width, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from coterie.amounts import format_bytes, parse_bytes
from coterie.compress.methods.slim import RANKINGS, needs
from coterie.compress.recipes import Recipe
from coterie.compress.state import LayerSize
from coterie.errors import ArchitectureMismatch, Infeasible, InputError
from coterie.model.arch.choice import choice_key
from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.experts import canonical_experts, width_axes
from coterie.model.arch.layers import Architecture, MoELayer, runs_alone
from coterie.model.arch.width import ALIGNMENT, width_rule
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile.profile import Profile

#: A token chooses so many times the parts that would keep as many neurons at work as if all experts were narrower:
#: parts of one expert are chosen together, so that an expert with many parts takes the places of others.
MORE = 1.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """How small the result is to be; exactly one of these.

    Attributes:
        keep: share of the experts of each layer, or of the width of each expert, above 0 and up to 1. A recipe that
            cuts experts into parts keeps as many as take no more bytes than that share of whole experts.
        experts: experts in each layer.
        width: hidden neurons of each expert; for a ragged result, on average.
        budget: bytes of all tensors, as a number or like "12GiB".
    """

    keep: float | None = None
    experts: int | None = None
    width: int | None = None
    budget: str | int | None = None

    def check(self, recipe: Recipe) -> None:
        """Raise InputError unless this is one target, in range, that the recipe can fulfil."""
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise InputError(
                f"say how small with exactly one of --keep, --experts, --width and --budget; got {given or 'none'}"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"--keep {self.keep:g} is not a share: it must be above 0 and at most 1 (0.5 keeps half)")
        if recipe.shrinks == "experts" and self.width is not None:
            raise InputError(
                f"recipe {recipe.name} lowers the number of experts and leaves their width alone; say how small with "
                "--keep, --experts or --budget, or take a recipe that slims experts, such as heapr"
            )
        if recipe.shrinks == "parts" and (self.experts is not None or self.width is not None):
            raise InputError(
                f"recipe {recipe.name} cuts experts into parts and chooses their number itself; say how small with "
                "--keep or --budget, or take a recipe that lowers the number of experts (reap) or their width (heapr)"
            )
        if recipe.shrinks == "width" and self.experts is not None:
            raise InputError(
                f"recipe {recipe.name} slims experts and leaves their number alone; say how small with --keep, --width "
                "or --budget, or take a recipe that lowers the number of experts, such as mergemoe"
            )


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

    def num_bytes(self, sizes: Sequence[LayerSize]) -> int:
        """Return the bytes of all tensors when every layer gets its size."""
        return self._sum("num_bytes", sizes)

    def num_parameters(self, sizes: Sequence[LayerSize]) -> int:
        """Return the elements of all tensors when every layer gets its size."""
        return self._sum("num_elements", sizes)

    def neuron_bytes(self, layer: int) -> int:
        """Return the bytes that one hidden neuron of one expert of a layer takes."""
        facts = self._layers[layer]
        return self._amounts["num_bytes"][layer].neurons // (facts.num_experts * facts.width)

    def _sum(self, measure: str, sizes: Sequence[LayerSize]) -> int:
        total: int = self._total[measure]
        for layer, size, amounts in zip(self._layers, sizes, self._amounts[measure], strict=True):
            whole = layer.num_experts * layer.width
            neurons = sum(size.widths) if size.widths else size.num_experts * (size.width or layer.width)
            total += amounts.neurons * neurons // whole - amounts.neurons
            total += amounts.experts * size.num_experts // layer.num_experts - amounts.experts
        return total


def sizes_for(
    recipe: Recipe, architecture: Architecture, sizing: Sizing, target: Target, profile: Profile | None = None
) -> tuple[LayerSize, ...]:
    """Return what every layer gets.

    Args:
        recipe: what is to be done.
        architecture: of the original.
        sizing: predicts sizes.
        target: how small the result is to be.
        profile: what was measured. A ragged recipe ranks the neurons of all layers by it; without one, every layer gets
            the uniform width of the same size, which only serves to see whether the target can be met.

    Raises:
        InputError: not exactly one target, one out of range, or one that is not for this recipe.
        Infeasible: too small for the router, for the config or for anything; names the nearest target.
    """
    target.check(recipe)
    if recipe.shrinks == "experts":
        count = _count(architecture, sizing, target)
        return tuple(LayerSize(num_experts=count) for _ in architecture.layers)
    if recipe.shrinks == "parts":
        parts = next(int(options["parts"]) for name, options in recipe.passes if name == "segment")
        return _segmented(architecture, sizing, target, parts)
    if recipe.ragged:
        score = next(str(options["score"]) for name, options in recipe.passes if name == "slim")
        return _ragged(architecture, sizing, target, profile, score)
    width = _width(architecture, sizing, target)
    return _uniform(architecture, width)


def _segmented(architecture: Architecture, sizing: Sizing, target: Target, parts: int) -> tuple[LayerSize, ...]:
    """Cut every expert into as many parts as the family allows, and keep as many parts as there is room for."""
    layers = architecture.layers
    total = layers[0].num_experts
    if target.budget is not None:
        limit = parse_bytes(target.budget)
    else:
        assert target.keep is not None
        count = max(1, round(target.keep * total))
        limit = sizing.num_bytes([LayerSize(num_experts=count) for _ in layers])
    whole = tuple(LayerSize(num_experts=layer.num_experts) for layer in layers)
    if sizing.num_bytes(whole) <= limit:
        return whole
    cut = _cut(architecture, parts)
    if cut == 1:
        why = "experts can neither be cut nor made narrower here"
        try:
            options = {width: _uniform(architecture, width) for width in width_rule(architecture).feasible_widths()}
        except Infeasible:
            fewer = {
                count: tuple(LayerSize(num_experts=count) for _ in layers) for count in architecture.feasible_counts()
            }
            return fewer[
                _largest_within(
                    sizing, fewer, limit, f"keeping fewer experts ({why})", "that can be routed, {} a layer"
                )
            ]
        return options[_largest_within(sizing, options, limit, "slimming experts", "that can be written, width {}")]
    width, top_k = layers[0].width // cut, layers[0].top_k
    segmented: dict[int, tuple[LayerSize, ...]] = {}
    for count in range(1, total * cut):
        chosen = min(count, top_k * cut, max(1, round(MORE * top_k * count / total)))
        if architecture.routing_problem(count, chosen) is None:
            size = LayerSize(num_experts=count, width=width, top_k=chosen)
            segmented[count] = (size,) * len(layers)
    return segmented[
        _largest_within(
            sizing, segmented, limit, "keeping fewer parts of experts", f"that can be routed, {{}} of width {width}"
        )
    ]


def _cut(architecture: Architecture, parts: int) -> int:
    """Return into how many parts, `parts` at most, experts can be cut; 1 where they cannot be."""
    layers, full = architecture.layers, _full_width(architecture)
    normed = any(canonical_experts(architecture.model.get_submodule(layer.experts)).finish for layer in layers)
    if normed or not all(runs_alone(architecture.model, layer) for layer in layers):
        return 1
    try:
        choice_key(architecture)
        rule = width_rule(architecture)
    except (Infeasible, ArchitectureMismatch):
        return 1
    narrow = set(rule.feasible_widths())
    return next((cut for cut in range(parts, 1, -1) if full % cut == 0 and full // cut in narrow), 1)


def _uniform(architecture: Architecture, width: int) -> tuple[LayerSize, ...]:
    return tuple(LayerSize(num_experts=layer.num_experts, width=width) for layer in architecture.layers)


def _count(architecture: Architecture, sizing: Sizing, target: Target) -> int:
    total = architecture.layers[0].num_experts
    if target.budget is not None:
        counts = architecture.feasible_counts()
        options = {count: tuple(LayerSize(num_experts=count) for _ in architecture.layers) for count in counts}
        return _largest_within(
            sizing, options, target.budget, "keeping fewer experts", "that can be routed, {} a layer"
        )
    count = target.experts if target.keep is None else max(1, round(target.keep * total))
    assert count is not None
    if not 1 <= count <= total:
        raise Infeasible(f"--experts {count} is out of range: every layer has {total}; choose 1 to {total}")
    architecture.check_feasible(count)
    return count


def _width(architecture: Architecture, sizing: Sizing, target: Target) -> int:
    full = _full_width(architecture)
    if target.budget is not None:
        options = {width: _uniform(architecture, width) for width in width_rule(architecture).feasible_widths()}
        return _largest_within(sizing, options, target.budget, "slimming experts", "that can be written, width {}")
    width = target.width
    if width is None:
        assert target.keep is not None
        step = math.gcd(full, ALIGNMENT)
        width = step * max(1, math.ceil(target.keep * full / step - 0.5))
    if not 1 <= width <= full:
        raise Infeasible(f"--width {width} is out of range: experts are {full} wide; choose 1 to {full}")
    if width != full:
        width_rule(architecture).check_feasible(width)
    return width


def _full_width(architecture: Architecture) -> int:
    widths = sorted({layer.width for layer in architecture.layers})
    if len(widths) > 1:
        raise Infeasible(f"the layers have experts of different widths ({widths}); slimming them is not supported")
    return widths[0]


def _largest_within(
    sizing: Sizing, options: Mapping[int, tuple[LayerSize, ...]], budget: str | int, way: str, least: str
) -> int:
    limit = parse_bytes(budget)
    fitting = [value for value, sizes in options.items() if sizing.num_bytes(sizes) <= limit]
    if not fitting:
        smallest = min(options)
        raise Infeasible(
            f"a budget of {format_bytes(limit)} cannot be met by {way}: the least {least.format(smallest)}, takes "
            f"{format_bytes(sizing.num_bytes(options[smallest]))}"
        )
    return max(fitting)


def _ragged(
    architecture: Architecture, sizing: Sizing, target: Target, profile: Profile | None, score: str
) -> tuple[LayerSize, ...]:
    """Keep the neurons of highest score over all layers, as many as the target gives room for with uniform widths."""
    layers, full = architecture.layers, _full_width(architecture)
    empty = sizing.num_bytes([_sized([0] * layer.num_experts) for layer in layers])
    if target.budget is not None:
        limit = parse_bytes(target.budget)
        if limit < empty:
            raise Infeasible(
                f"a budget of {format_bytes(limit)} cannot be met by slimming experts: without any expert the model "
                f"takes {format_bytes(empty)}"
            )
    else:
        width = target.width if target.keep is None else max(1, round(target.keep * full))
        assert width is not None
        if not 1 <= width <= full:
            raise Infeasible(f"--width {width} is out of range: experts are {full} wide; choose 1 to {full}")
        limit = sizing.num_bytes(_uniform(architecture, width))
    costs = [sizing.neuron_bytes(layer.index) for layer in layers]
    if profile is None:
        width = min(
            full, (limit - empty) // sum(cost * layer.num_experts for cost, layer in zip(costs, layers, strict=True))
        )
        return tuple(_sized([width] * layer.num_experts) for layer in layers)
    scores = []
    for layer in layers:
        held = {name: profile.sum(layer.index, name) for name in needs(score)}
        scores.append(RANKINGS[score](held).flatten())
    order = torch.cat(scores).argsort(descending=True, stable=True)
    cost_of = torch.cat([torch.full((len(each),), cost) for each, cost in zip(scores, costs, strict=True)])
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[cost_of[order].cumsum(0) <= limit - empty]] = True
    parts = torch.split(kept, [len(each) for each in scores])
    return tuple(
        _sized(part.view(layer.num_experts, full).sum(1).tolist()) for layer, part in zip(layers, parts, strict=True)
    )


def _sized(widths: Sequence[int]) -> LayerSize:
    return LayerSize(num_experts=len(widths), widths=tuple(widths))
