"""Which tensors on disk hold gate, up and down projections of a layer's experts, and rows of theirs as on disk."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.model.arch.conversion import WeightConversion
from coterie.model.arch.experts import Experts, canonical_experts, native_experts
from coterie.model.arch.layers import MoELayer

#: Marks that stand for gate, up and down projection.
GATE, UP, DOWN = 1, 2, 3

#: The field of `coterie.model.arch.experts.Experts` that holds a projection.
FIELDS = {GATE: "gate_EFD", UP: "up_EFD", DOWN: "down_EDF"}

#: What marks of the experts are apart.
_PARTS = 4

#: What numbers of rows of different projections lie apart by.
_APART = 2**48


def projections_of(experts: Experts) -> dict[int, Tensor]:
    """Return the projections that there are, (E, rows, columns) each."""
    return {part: matrix for part, field in FIELDS.items() if (matrix := getattr(experts, field)) is not None}


class Projections:
    """The experts of one layer whose weights are in memory, and where they lie on disk."""

    def __init__(
        self, model: PreTrainedModel, layer: MoELayer, conversion: WeightConversion, conversions: list[object]
    ) -> None:
        """Find out.

        Args:
            model: the model, with the layer's weights.
            layer: which one.
            conversion: between names in memory and on disk.
            conversions: what was used to read the layer, see `WeightConversion.convert`.
        """
        self._model, self._layer, self._conversion, self._conversions = model, layer, conversion, conversions
        self.experts = canonical_experts(model.get_submodule(layer.experts))
        marks = {
            part: (part + _PARTS * torch.arange(len(matrix), dtype=torch.int32))[:, None, None]
            .expand(*matrix.shape[:-1], 1)
            .contiguous()
            for part, matrix in projections_of(self.experts).items()
        }
        marked = {name: set(tensor.flatten().tolist()) for name, tensor in self.on_disk(marks).items()}
        #: By name on disk, which projections the tensor holds; found out by storing marks in their place.
        self.held = {name: frozenset(mark % _PARTS for mark in values) for name, values in marked.items()}
        #: By name on disk, the experts whose projections it holds.
        self.experts_in = {name: frozenset(mark // _PARTS for mark in values) for name, values in marked.items()}

    def from_disk(
        self, disk: Mapping[str, Tensor], axes: Mapping[str, int], together: Mapping[int, int] | None = None
    ) -> dict[int, Tensor]:
        """Return bytes (E, rows, bytes of a row) by projection: the inverse of `on_disk`.

        Args:
            disk: by name on disk; of a projection all of its tensors or none.
            axes: by name on disk, the axis -1 or -2 along which the bytes of a row lie.
            together: by projection, how many of its rows are one row of bytes; 1 where it is not named.
        """
        shapes = {
            part: (matrix.shape[0], matrix.shape[1] // (together or {}).get(part, 1))
            for part, matrix in projections_of(self.experts).items()
        }
        numbers = {  # of all rows, those of different projections apart
            part: (torch.arange(math.prod(shape)) + part * _APART).view(*shape, 1) for part, shape in shapes.items()
        }
        rows: dict[int, Tensor] = {}
        for name, where in self.on_disk(numbers).items():
            if name not in disk:
                continue
            byte_RK = disk[name].transpose(axes[name], -1).flatten(0, -2)
            number_R = where.transpose(axes[name], -1).flatten()
            for part in self.held[name]:
                if part not in rows:
                    rows[part] = byte_RK.new_empty(math.prod(shapes[part]), byte_RK.shape[-1])
                own_R = number_R // _APART == part
                rows[part][number_R[own_R] % _APART] = byte_RK[own_R]
        return {part: rows[part].view(*shapes[part], -1) for part in rows}

    def bytes_on_disk(self, rows: Mapping[int, Tensor], names: Container[str]) -> dict[str, Tensor]:
        """Return bytes of some projections by name on disk; of those names whose projections are all there.

        Args:
            rows: (E, rows, bytes of a row) by projection; those of one tensor have as many bytes.
            names: names on disk that are asked for.
        """
        packed: dict[str, Tensor] = {}
        for parts in set(self.held.values()):
            if parts <= rows.keys():
                on_disk = self.on_disk({part: rows[part] for part in parts})
                packed |= {name: on_disk[name] for name in on_disk if name in names and self.held[name] == parts}
        return packed

    def on_disk(self, rows: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Return rows, of numbers or of bytes, by name on disk.

        Args:
            rows: by projection, (E, rows, anything); where one of gate and up is left out, the other stands in for it.
        """
        rows = {part: tensor.cpu() for part, tensor in rows.items()}
        down, gate_or_up = rows.get(DOWN), rows.get(UP, rows.get(GATE))
        stand_in = down if gate_or_up is None else gate_or_up
        assert stand_in is not None
        instead = replace(
            self.experts,
            gate_EFD=None if self.experts.gate_EFD is None else rows.get(GATE, stand_in),
            up_EFD=rows.get(UP, stand_in),
            down_EDF=stand_in if down is None else down,
            gate_bias_EF=None, up_bias_EF=None, down_bias_ED=None,
        )  # fmt: skip
        native = native_experts(self._model.get_submodule(self._layer.experts), instead)
        wanted = {"down_proj"} if gate_or_up is None else native.keys() - ({"down_proj"} if down is None else set())
        memory = {f"{self._layer.experts}.{name}": native[name].contiguous() for name in wanted}
        return self._conversion.write(self._model, memory, self._conversions, as_they_are=True)
