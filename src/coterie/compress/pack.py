"""Store the matrices of one unit in blocks: watch what comes into them, choose codes, and name the bytes as on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from coterie.compress.integers import stored_name
from coterie.compress.lanes import Lane, Lanes
from coterie.compress.moments import Inputs, Moments, Sum, watching
from coterie.compress.narrow import largest, narrowed
from coterie.compress.plan import Plan
from coterie.compress.projections import DOWN, GATE, UP, Projections, projections_of
from coterie.compress.quantisers import get_quantiser, load_quantiser
from coterie.compress.shared_base import pack_shared
from coterie.compress.source import Source
from coterie.compress.weights import Weight, at_widths, typed, weights_among
from coterie.errors import ArchitectureMismatch
from coterie.model.arch.layers import MoELayer
from coterie.model.disk.encodings.bit_planes import BitPlanes
from coterie.model.disk.encodings.block_types import get_layout
from coterie.model.disk.encodings.integer_groups import as_stored
from coterie.model.disk.encodings.integer_types import INTEGERS
from coterie.model.disk.encodings.plane_types import PLANES
from coterie.model.disk.encodings.shared_base import SharedBaseType
from coterie.model.stream.stream import Stage, Stream
from coterie.model.stream.unit import Unit

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Packer:
    """Stores matrices as the plan says, unit by unit.

    Attributes:
        stream: the model, open.
        source: the same by its headers.
        plan: which type each matrix gets.
        counts: for each batch which of its tokens count (T,), bool; None where all do.
        head: sums for the head, which text passes after all units that are watched.
    """

    stream: Stream
    source: Source
    plan: Plan
    counts: Sequence[Tensor | None]
    head: Sum | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        assert self.plan.quantiser is not None
        name, self._options = self.plan.quantiser
        self._quantise, self._compares = load_quantiser(name), get_quantiser(name).corrects

    def with_text(self, lanes: Lanes) -> Lanes:
        """Return lanes in which the text goes through what is packed and, where that is compared, the original."""
        self._lanes = replace(lanes, see_last=self.see_last, compares=self._compares)
        return self._lanes

    @cached_property
    def names(self) -> frozenset[str]:
        """Names on disk of all tensors that are stored in blocks."""
        return packed_names(self.source, self.plan)

    @cached_property
    def _weights(self) -> tuple[Weight, ...]:
        return tuple(typed(self.source.weights, self.plan.types))

    def of_unit(self, unit: Unit) -> list[Weight]:
        """Return the matrices of a unit that are stored in blocks."""
        return weights_among(self._weights, unit.disk_names)

    def see_last(self, number: int, hidden_BSD: Tensor) -> None:
        """Take what a batch's tokens are after the last unit: that is what comes into the head."""
        hidden_TD, counts_T = hidden_BSD.detach().flatten(0, -2), self.counts[number]
        if counts_T is not None:
            hidden_TD = hidden_TD[counts_T.to(hidden_TD.device)]
        if self.head is None:
            self.head = Sum.of(hidden_TD.shape[-1], compares=False, device=hidden_TD.device)
        self.head.add(hidden_TD, None)

    def pack(self, stage: Stage, layers: Sequence[MoELayer]) -> dict[str, Tensor]:
        """Return what is stored of a unit's matrices by name on disk.

        Args:
            stage: the unit, with the weights of the original.
            layers: its MoE layers.
        """
        weights = self.of_unit(stage.unit)
        linear = {
            self.stream.conversion.memory_names[weight.names[0]]: weight
            for weight in weights
            if weight.kind == "linear" and not weight.head
        }
        typed = {weight.layer for weight in weights}
        layers = [layer for layer in layers if layer.index in typed]
        moments = self._measure(stage, layers, list(linear))
        packed: dict[str, Tensor] = {}
        stored: dict[str, Tensor] = {}
        state = self.stream.model.state_dict()
        for weight in weights:
            if weight.kind == "expert":
                continue
            name = self.stream.conversion.memory_names[weight.names[0]]
            matrix_1RC = state[name].detach()[None].float()
            if name in linear and name not in moments.linear:
                log.info("%s: no token passes it; its codes are the nearest", name)
            known = name in moments.linear
            inputs = moments.linear_inputs(name) if known else self._outer_inputs(weight, matrix_1RC)
            byte_1RK, _ = self._rounded(matrix_1RC, inputs, self.plan.types[weight.pattern])
            packed[weight.names[0]] = byte_1RK[0]
        for layer in layers:
            of_layer = [weight for weight in weights if weight.layer == layer.index]
            sharing = [weight for weight in of_layer if SharedBaseType.parse(self.plan.types[weight.pattern])]
            if sharing:
                stored |= self._pack_sharing(layer, sharing, moments, stage.conversions)
            if rest := [weight for weight in of_layer if weight not in sharing]:
                packed |= self._pack_experts(layer, rest, moments, stage.conversions)
        of_name = {name: weight for weight in weights for name in weight.names}
        for name, byte_RK in packed.items():
            stored |= _stored(name, byte_RK.cpu(), of_name[name], self.plan.types[of_name[name].pattern])
        return stored

    def _outer_inputs(self, weight: Weight, matrix_1RC: Tensor) -> Inputs:
        """Return what comes into a head; of an embedding, where nothing is summed over, zeros."""
        if weight.head and weight.kind == "linear" and self.head is not None:
            return Inputs(hessian_NCC=self.head.hessian_CC[None], missed_NCC=None, num_tokens=(self.head.num_tokens,))
        columns = matrix_1RC.shape[-1]
        zeros_1CC = torch.zeros(1, columns, columns, device=matrix_1RC.device)
        return Inputs(hessian_NCC=zeros_1CC, missed_NCC=None, num_tokens=(0,))

    def _rounded(self, weight_NRC: Tensor, inputs: Inputs, name: str) -> tuple[Tensor, Tensor]:
        return self._quantise(weight_NRC, inputs, get_layout(name), **self._options)

    def _measure(self, stage: Stage, layers: Sequence[MoELayer], linear: Sequence[str]) -> Moments:
        """Send the text through a unit in both lanes, and sum up what comes into its matrices."""
        moments = Moments(compares=self._compares)
        if not linear and not layers:
            return moments
        calls, unit, model = self._lanes.calls(stage), stage.unit, self.stream.model
        module = model.get_submodule(unit.name)
        for number, counts_T in enumerate(self.counts):
            with watching(model, unit.name, module, linear, layers) as seen:
                calls[Lane.COMPRESSED, number].compute(seen.stand_in)
            original = None
            if self._compares:
                with watching(model, unit.name, module, linear, layers) as original:
                    calls[Lane.ORIGINAL, number].compute(original.stand_in)
            moments.add(seen, original, counts_T)
        return moments

    def _pack_sharing(
        self, layer: MoELayer, weights: Sequence[Weight], moments: Moments, conversions: list[object]
    ) -> dict[str, Tensor]:
        """Return what is stored of experts that share a base, by stored name (`coterie.compress.shared_base`)."""
        projections = Projections(self.stream.model, layer, self.stream.conversion, conversions)
        inputs = {between: moments.expert_inputs(layer.index, between=between) for between in (False, True)}
        options = {name: value for name, value in self._options.items() if name != "prefix_weight"}  # it has no planes
        stored: dict[str, Tensor] = {}
        for weight in weights:
            shared = SharedBaseType.parse(self.plan.types[weight.pattern])
            assert shared is not None
            stored |= pack_shared(projections, weight, inputs, shared, self._rounded, **options)
        return stored

    def _pack_experts(
        self, layer: MoELayer, weights: Sequence[Weight], moments: Moments, conversions: list[object]
    ) -> dict[str, Tensor]:
        projections = Projections(self.stream.model, layer, self.stream.conversion, conversions)
        matrices = projections_of(projections.experts)
        type_of = {name: self.plan.types[weight.pattern] for weight in weights for name in weight.names}
        inputs = {between: moments.expert_inputs(layer.index, between=between) for between in (False, True)}
        kind_of: dict[tuple[int, int], str] = {}
        for name, kind in type_of.items():
            for key in product(projections.held[name], projections.experts_in[name]):
                if kind_of.setdefault(key, kind) != kind:
                    raise ArchitectureMismatch(f"{name} and others like it are to be stored in {kind_of[key]}, {kind}")
        widths = self.plan.layers[layer.index].widths
        if widths is not None:
            narrow = (each for weight in at_widths(weights, self.plan.layers) for each in weight.by_width())
            empty = [each for each in narrow if 0 in each.shape]
            without = {name: _no_bytes(each, type_of[name]) for each in empty for name in each.names}
            return without | self._pack_by_width(projections, type_of, kind_of, inputs, widths)
        packed: dict[str, Tensor] = {}
        for kind in sorted(set(type_of.values())):
            chosen = _chosen(kind_of, kind, matrices, range(layer.num_experts))
            rows = self._rows_of(kind, chosen, matrices, inputs)
            packed |= projections.bytes_on_disk(rows, {name for name, other in type_of.items() if other == kind})
        return packed

    def _pack_by_width(
        self,
        projections: Projections,
        type_of: Mapping[str, str],
        kind_of: Mapping[tuple[int, int], str],
        inputs: Mapping[bool, Inputs],
        widths: Sequence[int],
    ) -> dict[str, Tensor]:
        """Return the bytes of experts by name on disk, each as wide as it is to be, those of a width at a time.

        Experts without neurons are left out.
        """
        packed: dict[str, Tensor] = {}
        for width in sorted(set(widths) - {0}):
            experts = [expert for expert, each in enumerate(widths) if each == width]
            matrices, into = _narrowed(projections_of(projections.experts), inputs, experts, width)
            for kind in sorted(set(type_of.values())):
                chosen = _chosen(kind_of, kind, matrices, experts)
                rows = self._rows_of(kind, chosen, matrices, into)
                names = {
                    name
                    for name, other in type_of.items()
                    if other == kind and projections.experts_in[name] <= set(experts)
                }
                packed |= projections.bytes_on_disk(rows, names)
        return packed

    def _rows_of(
        self,
        kind: str,
        chosen: Mapping[int, Sequence[int]],
        matrices: Mapping[int, Tensor],
        inputs: Mapping[bool, Inputs],
    ) -> dict[int, Tensor]:
        """Return the bytes of projections of experts that are stored in a type, by projection.

        They are (E, R, K), K bytes of a row, or of rows that are stored together.

        Args:
            kind: the type.
            chosen: by projection, the experts whose is stored so.
            matrices: the projections, (E, R, C).
            inputs: what comes into gate and up (False), and into down (True).
        """
        num_experts = len(matrices[UP])

        def all_experts(experts: Sequence[int], byte_NRK: Tensor) -> Tensor:
            if len(experts) == num_experts:
                return byte_NRK
            byte_ERK = byte_NRK.new_zeros(num_experts, *byte_NRK.shape[1:])
            byte_ERK[list(experts)] = byte_NRK
            return byte_ERK

        rows: dict[int, Tensor] = {}
        if chosen.get(GATE) and chosen[GATE] == chosen[UP]:  # they see the same inputs: one choice of codes for both
            experts = chosen[UP]
            both = torch.cat((matrices[GATE][experts], matrices[UP][experts]), dim=1).float()
            byte_NRK, _ = self._rounded(both, inputs[False].select(experts), kind)
            rows[GATE], rows[UP] = (all_experts(experts, half) for half in byte_NRK.chunk(2, dim=1))
        for part in sorted(part for part, experts in chosen.items() if experts and part not in rows):
            experts = chosen[part]
            byte_NRK, _ = self._rounded(matrices[part][experts].float(), inputs[part == DOWN].select(experts), kind)
            rows[part] = all_experts(experts, byte_NRK)
        return rows


def _chosen(
    kind_of: Mapping[tuple[int, int], str], kind: str, parts: Iterable[int], experts: Sequence[int]
) -> dict[int, list[int]]:
    """Return by projection the experts, of some, whose is stored in a type."""
    return {part: [expert for expert in experts if kind_of.get((part, expert)) == kind] for part in parts}


def _narrowed(
    matrices: Mapping[int, Tensor], inputs: Mapping[bool, Inputs], experts: Sequence[int], width: int
) -> tuple[dict[int, Tensor], dict[bool, Inputs]]:
    """Return the projections (E, rows, columns) of some experts at a width, and what comes into them; zeros of others.

    Which neurons stay, and what they make good, is said in `coterie.compress.narrow`.
    """
    down_EDF, up_EFD = matrices[DOWN], matrices[UP]
    if width == down_EDF.shape[-1]:
        return dict(matrices), dict(inputs)
    between, missed = inputs[True], inputs[True].missed_NCC
    narrow = {
        part: torch.zeros_like(each[..., :width] if part == DOWN else each[:, :width], dtype=torch.float32)
        for part, each in matrices.items()
    }
    hessian_ESS = torch.zeros_like(between.hessian_NCC[:, :width, :width])
    missed_ESS = None if missed is None else torch.zeros_like(hessian_ESS)
    for expert in experts:
        hessian_FF = between.hessian_NCC[expert]
        if between.num_tokens[expert] and bool(hessian_FF.diagonal().sum() > 0):
            stay_S, narrow[DOWN][expert] = narrowed(down_EDF[expert], hessian_FF, width)
        else:
            stay_S = largest(down_EDF[expert], up_EFD[expert], width)
            narrow[DOWN][expert] = down_EDF[expert][:, stay_S]
        for part in matrices.keys() - {DOWN}:
            narrow[part][expert] = matrices[part][expert, stay_S]
        hessian_ESS[expert] = hessian_FF[stay_S][:, stay_S]
        if missed is not None and missed_ESS is not None:
            missed_ESS[expert] = missed[expert][stay_S][:, stay_S]
    into = Inputs(hessian_NCC=hessian_ESS, missed_NCC=missed_ESS, num_tokens=between.num_tokens)
    return narrow, {False: inputs[False], True: into}


def _no_bytes(weight: Weight, kind: str) -> Tensor:
    """Return what is stored of a matrix of an expert without neurons."""
    [(_, shape)] = weight.encoding(kind).stored(weight.shape).values()
    return torch.empty(shape, dtype=torch.uint8)


def _stored(name: str, byte_RK: Tensor, weight: Weight, kind: str) -> dict[str, Tensor]:
    """Return what is stored of a matrix by name on disk: blocks as they are, planes, or integers and their scales."""
    if kind in PLANES:
        bits, group = PLANES[kind]
        return {name: BitPlanes(bits=bits, group=group, axis=weight.axis).in_planes(byte_RK)}
    if kind not in INTEGERS:
        return {name: byte_RK}
    return {stored_name(name, suffix): tensor for suffix, tensor in as_stored(byte_RK, kind).items()}


def packed_names(source: Source, plan: Plan) -> frozenset[str]:
    """Return the names on disk of all tensors that are stored in blocks."""
    return frozenset(name for weight in typed(source.weights, plan.types) for name in weight.names)
