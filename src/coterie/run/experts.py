"""Compute routed experts whose weights come and go: what stands in their place in a model that is larger than memory.

The sum over a token's experts is in the order of their numbers, whatever arrives first and however many are there at
once, so that the same model computes the same bits with any memory.

Legend: T tokens, K chosen experts, D model width, F expert width, N tokens of one expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.model.arch.experts import Experts, canonical_experts
from coterie.run.places import LayerPlaces


class Lease(Protocol):
    """Experts of a layer that stay where they are until they are released."""

    def stored(self, expert: int) -> Sequence[Tensor]:
        """Return the bytes of an expert, each tensor of `ExpertTensor.stored` in turn; waits until they are there."""

    def release(self) -> None:
        """Let go of all of them."""


class ExpertSource(Protocol):
    """Where experts come from."""

    @property
    def most(self) -> int:
        """How many can be held at once."""

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        """Ask for experts of a layer, no more than `most`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """What is computed in the place of one experts module."""

    places: LayerPlaces
    template: Experts


class StreamedExperts:
    """The experts of a model, which are read when a token needs them."""

    def __init__(
        self,
        model: PreTrainedModel,
        places: Sequence[LayerPlaces],
        source: ExpertSource,
        *,
        dtype: torch.dtype,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Look at the modules.

        Args:
            model: with its resident part; biases of experts are in it.
            places: where the matrices are.
            source: what has them in memory.
            dtype: number format that is computed with.
            check: called before every layer; raises to end a generation.
        """
        self._source, self._dtype, self._check = source, dtype, check
        self._layers = {
            id(module): _Layer(places=each, template=canonical_experts(module))
            for each in places
            for module in (model.get_submodule(each.layer.experts),)
        }

    @torch.no_grad()
    def compute(self, module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the routed output (T, D), summed in float32 or wider; see `coterie.model.arch.seam.install`."""
        if self._check is not None:
            self._check()
        layer = self._layers[id(module)]
        total_TD = torch.zeros(hidden_TD.shape, dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        rows = _rows_by_expert(index_TK, len(layer.places.experts))
        wanted, top_k = list(rows), index_TK.shape[-1]
        for start in range(0, len(wanted), self._source.most):
            some = wanted[start : start + self._source.most]
            lease = self._source.acquire(layer.places.layer.index, some)
            try:
                for expert in some:
                    token_N, slot_N = rows[expert] // top_k, rows[expert] % top_k
                    output_ND = self._output(layer, expert, lease.stored(expert), hidden_TD[token_N])
                    weighted_ND = output_ND * weight_TK[token_N, slot_N, None]
                    total_TD.index_add_(0, token_N, weighted_ND.to(total_TD.dtype))
            finally:
                lease.release()
        return total_TD.to(hidden_TD.dtype)

    def _output(self, layer: _Layer, expert: int, stored: Sequence[Tensor], input_ND: Tensor) -> Tensor:
        """Return f_e(x), (N, D), without the routing weight."""
        matrices = self._matrices(layer.places, expert, stored)
        template = layer.template
        up_NF = nn.functional.linear(input_ND, matrices["up_EFD"], _row(template.up_bias_EF, expert))
        gate_NF = None
        if "gate_EFD" in matrices:
            gate_NF = nn.functional.linear(input_ND, matrices["gate_EFD"], _row(template.gate_bias_EF, expert))
        hidden_NF = template.combine(gate_NF, up_NF)
        output_ND = nn.functional.linear(hidden_NF, matrices["down_EDF"], _row(template.down_bias_ED, expert))
        return output_ND if template.finish is None else template.finish(output_ND)

    def _matrices(self, places: LayerPlaces, expert: int, stored: Sequence[Tensor]) -> Mapping[str, Tensor]:
        matrices: dict[str, Tensor] = {}
        rest = list(stored)
        for tensor in places.experts[expert]:
            count = len(tensor.stored())
            matrices |= {field: matrix.to(self._dtype) for field, matrix in tensor.read(rest[:count]).items()}
            del rest[:count]
        return matrices


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _rows_by_expert(index_TK: Tensor, num_experts: int) -> dict[int, Tensor]:
    """Return for each chosen expert, ascending, the places in the flattened index that name it."""
    flat, order = index_TK.reshape(-1).sort(stable=True)
    bounds = torch.searchsorted(flat, torch.arange(num_experts + 1, device=flat.device)).tolist()
    return {
        expert: order[bounds[expert] : bounds[expert + 1]]
        for expert in range(num_experts)
        if bounds[expert] < bounds[expert + 1]
    }
