"""Check that a model can have what a plan says: every message names the layer, the number, and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coterie.compress.layer_plan import ExpertPlan, LayerPlan
from coterie.compress.plan import Plan, common_shape
from coterie.compress.source import Source
from coterie.compress.weights import planned
from coterie.errors import Infeasible, InputError
from coterie.model.arch.choice import choice_key
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.ragged import Place, places_of
from coterie.model.arch.width import width_rule
from coterie.model.disk.encodings.ggml import GRAIN
from coterie.model.disk.encodings.integer_types import INTEGERS


def check_layers(source: Source, plan: Plan) -> None:
    """Check the layers of a plan against the model.

    Raises:
        Infeasible: a number of layers, experts, neurons or chosen experts that this model cannot have.
        InputError: experts that are named twice, or that there are not.
    """
    layers = source.architecture.layers
    if len(plan.layers) != len(layers):
        raise Infeasible(f"the plan has {len(plan.layers)} layers, the model {len(layers)} with experts: give each one")
    ragged = [layer.index for layer, each in zip(layers, plan.layers, strict=True) if each.widths is not None]
    if ragged:
        _check_ragged(source, plan, ragged)
    merges = any(name == "cluster" for name, _ in plan.passes)
    for layer, each in zip(layers, plan.layers, strict=True):
        _Check(source=source, layer=layer, plan=each, merges=merges).run()
    common_shape(plan.layers)


def check_prediction(source: Source, plan: Plan) -> None:
    """Check that prediction layers, which config.json sizes too, can follow what becomes of the others.

    Raises:
        Infeasible: they cannot; names one, and the way out.
    """
    prediction, shape = source.prediction, plan.shape
    if plan.mapped or plan.ragged or prediction.unclear is None:
        return
    last = source.architecture.layers[-1]
    same = shape.width in (None, last.width) and shape.top_k in (None, last.top_k)
    if same and shape.num_experts == last.num_experts:
        return
    raise Infeasible(
        f"{source.checkpoint.path}: {prediction.unclear} is in a prediction layer, which config.json sizes like the "
        f"others, but it does not lie like a tensor of {prediction.base}, so it cannot be compressed: leave prediction "
        "layers out with --mtp drop"
    )


def _check_ragged(source: Source, plan: Plan, ragged: list[int]) -> Mapping[str, Place]:
    """Return where tensors are cut to a width, by name on disk."""
    if len(ragged) < len(plan.layers):
        other = next(index for index in range(len(plan.layers)) if index not in ragged)
        raise Infeasible(
            f"layer {ragged[0]} gives every expert a width of its own, layer {other} does not: name the experts of all "
            "layers with their widths, or of none"
        )
    if plan.mapped:
        raise Infeasible("experts with widths of their own cannot stand behind a map; use --router plain")
    return places_of(source.conversion, source.architecture, [names.experts for names in source.tensors])


def check_widths(source: Source, plan: Plan) -> None:
    """Check the widths of experts in a plan that stores weights in fewer bits.

    Raises:
        Infeasible: experts that have no tensors of their own or are not those of the original, a width that blocks do
            not have, or a tensor that is cut to a width and has no type; says what can be.
    """
    if any(kind in INTEGERS for kind in plan.types.values()):
        raise Infeasible(
            "the plan gives experts widths of their own, and compressed-tensors has one for all: take types of GGML, "
            "or leave the widths out"
        )
    ragged = [index for index, each in enumerate(plan.layers) if each.widths is not None]
    places = _check_ragged(source, plan, ragged)
    for layer, each in zip(source.architecture.layers, plan.layers, strict=True):
        experts, where = each.experts or (), f"layer {layer.index} ({layer.block})"
        for number, expert in enumerate(experts):
            if expert != ExpertPlan(sources=(number,), width=expert.width):
                raise Infeasible(
                    f"{where}: experts[{number}] is {expert.content()}; in fewer bits every expert stays what it is: "
                    f"say no more than its width, and {[number]} as its sources"
                )
            if expert.width is None or not 0 <= expert.width <= layer.width or expert.width % GRAIN:
                raise Infeasible(
                    f"{where}: experts[{number}] has width {expert.width}; in fewer bits widths are multiples of "
                    f"{GRAIN} from 0 to {layer.width}"
                )
        if experts and not any(expert.width for expert in experts):
            raise Infeasible(f"{where}: no expert has any neurons left; keep {GRAIN} of one of them, or more")
    stored = {name for weight in planned(source.weights, plan) if weight.widths is not None for name in weight.names}
    if plain := sorted(places.keys() - stored):
        raise Infeasible(
            f"the plan gives experts widths of their own, and {plain[0]} no type: where there are types, all that is "
            "cut to a width has one; give it a type too, or leave the widths out"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Check:
    """The check of one layer."""

    source: Source
    layer: MoELayer
    plan: LayerPlan
    merges: bool

    def run(self) -> None:
        """Check counts, widths, chosen experts, and the experts that are named."""
        layer, plan = self.layer, self.plan
        if plan.top_k is None and not 1 <= plan.num_experts <= layer.num_experts:
            raise self._infeasible(
                f"{plan.num_experts} experts of {layer.num_experts}; choose 1 to {layer.num_experts}"
            )
        try:
            self.source.architecture.check_feasible(plan.num_experts, plan.top_k)
            if plan.width is not None and plan.width != layer.width:
                width_rule(self.source.architecture).check_feasible(plan.width)
            if plan.top_k is not None and plan.top_k != layer.top_k:
                choice_key(self.source.architecture)
        except Infeasible as error:
            raise self._infeasible(str(error)) from None
        for expert in plan.protected:
            if expert >= layer.num_experts:
                raise self._wrong(f"expert {expert} is protected, the experts are 0 to {layer.num_experts - 1}")
        if plan.experts is not None:
            self._check_experts(plan.experts)

    def _check_experts(self, experts: tuple[ExpertPlan, ...]) -> None:
        layer, plan = self.layer, self.plan
        if len(experts) != plan.num_experts:
            raise self._wrong(
                f"num_experts is {plan.num_experts}, {len(experts)} are named; set it to {len(experts)} or name as many"
            )
        for number, expert in enumerate(experts):
            self._check_expert(number, expert)
        if self.merges:
            left_out = set(range(layer.num_experts)) - {source for expert in experts for source in expert.sources}
            if left_out:
                raise self._wrong(f"expert {min(left_out)} goes into none of the merged experts; add it to one")
        places = [(min(expert.sources), expert.part or 0) for expert in experts]
        for number in range(1, len(places)):
            if not self.merges and places[number] <= places[number - 1]:
                first, second = (f"expert {source} (part {part})" for source, part in places[number - 1 : number + 1])
                raise self._wrong(f"{second} comes after {first}; list each once, in rising order")
        if layer.num_groups > 1 and not self.merges:
            self._check_groups([source for source, _ in places])

    def _check_groups(self, sources: list[int]) -> None:
        size = self.layer.num_experts // self.layer.num_groups
        counts = [sum(source // size == group for source in sources) for group in range(self.layer.num_groups)]
        if len(set(counts)) > 1:
            raise self._wrong(
                f"router groups of {size} experts keep {counts}; each must keep {len(sources) // self.layer.num_groups}"
            )

    def _check_expert(self, number: int, expert: ExpertPlan) -> None:
        layer, plan = self.layer, self.plan
        if not expert.sources or (len(expert.sources) > 1 and not self.merges):
            raise self._wrong(f"experts[{number}] is made from {list(expert.sources)}; this recipe makes it from one")
        for source in expert.sources:
            if source >= layer.num_experts:
                raise self._wrong(
                    f"experts[{number}] is made from {source}, the experts are 0 to {layer.num_experts - 1}"
                )
        if expert.width is not None and expert.width > layer.width:
            raise self._infeasible(f"experts[{number}] has width {expert.width}; at most {layer.width}")
        if plan.widths is not None and (expert.width is None or len(plan.widths) != layer.num_experts):
            raise self._infeasible(
                "where experts have widths of their own, all of them stay and each has one; 0 leaves nothing of it"
            )
        parts = layer.width // (plan.width or layer.width)
        if expert.part is not None and expert.part >= parts:
            raise self._wrong(f"experts[{number}] is part {expert.part}; parts of width {plan.width}: 0 to {parts - 1}")
        if expert.rank is not None:
            raise self._infeasible(
                f"experts[{number}] has rank {expert.rank}; only full rank can be written: leave it out"
            )
        if expert.encodings is not None:
            self._check_encodings(number, expert.encodings)

    def _check_encodings(self, number: int, encodings: tuple[str, str, str]) -> None:
        tensors = self.source.checkpoint.tensors
        stored = sorted({tensors[name].dtype for name in self.source.tensors[self.layer.index].experts})
        other = next((each for each in encodings if [each] != stored), None)
        if other is not None:
            raise self._infeasible(
                f"experts[{number}] is to be stored as {other}; experts of this model are stored as "
                f"{', '.join(stored)} and can be written in that format only"
            )

    def _infeasible(self, what: str) -> Infeasible:
        return Infeasible(f"layer {self.layer.index} ({self.layer.block}): {what}")

    def _wrong(self, what: str) -> InputError:
        return InputError(f"layer {self.layer.index} ({self.layer.block}): {what}")
