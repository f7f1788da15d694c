"""The experts of one layer in canonical form: read out of a module of any layout, and put back into it.

Legend: E experts, F expert width, D model width, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.integrations.moe import _default_apply_gate

Combine = Callable[[Tensor | None, Tensor], Tensor]

#: Multiplies rows with a matrix and adds a bias, as `torch.nn.functional.linear` does.
Linear = Callable[[Tensor, Any, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The experts of one layer in canonical form.

    For expert e and token x, ``h_e(x) = combine(gate_e x + gate_bias_e, up_e x + up_bias_e)`` and
    ``f_e(x) = finish(down_e h_e(x) + down_bias_e)``. Experts without a gate have ``gate_EFD`` None and
    ``h_e(x) = combine(None, up_e x)``. What stands for a matrix may be of another kind where `linear` multiplies with
    it.
    """

    gate_EFD: Tensor | None
    up_EFD: Tensor
    down_EDF: Tensor
    combine: Combine
    gate_bias_EF: Tensor | None = None
    up_bias_EF: Tensor | None = None
    down_bias_ED: Tensor | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    linear: Linear = nn.functional.linear

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.up_EFD)

    @property
    def width(self) -> int:
        """F."""
        return self.up_EFD.shape[1]

    def hidden(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return h_e(x), the activations between up and down projection, as (T, F)."""
        up_TF = self.linear(x_TD, self.up_EFD[expert], _row(self.up_bias_EF, expert))
        gate_TF = None
        if self.gate_EFD is not None:
            gate_TF = self.linear(x_TD, self.gate_EFD[expert], _row(self.gate_bias_EF, expert))
        return self.combine(gate_TF, up_TF)

    def project(self, expert: int, hidden_TF: Tensor) -> Tensor:
        """Return f_e(x) from h_e(x), as (T, D)."""
        out_TD = self.linear(hidden_TF, self.down_EDF[expert], _row(self.down_bias_ED, expert))
        return out_TD if self.finish is None else self.finish(out_TD)

    def output(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return f_e(x), as (T, D), without the routing weight."""
        return self.project(expert, self.hidden(expert, x_TD))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by field name; the first axis of each is the expert axis."""
        names = ("gate_EFD", "up_EFD", "down_EDF", "gate_bias_EF", "up_bias_EF", "down_bias_ED")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Experts:
        """Apply `function` to every tensor."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def apart(self) -> Experts:
        """Return the same experts, every tensor taken apart into a tuple of one tensor an expert.

        For gradients: that of a slice of a tensor for all experts would fill a tensor for all of them, once an expert.
        """
        changed: dict[str, Any] = {name: tensor.unbind(0) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def select(self, index_M: Tensor) -> Experts:
        """Return the experts that `index_M` names, in that order."""
        return self.map(lambda tensor: tensor[index_M])


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def is_experts(module: nn.Module) -> bool:
    """Tell whether transformers routes this module's experts through the common interface."""
    marks = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "num_experts")
    return all(hasattr(module, mark) for mark in marks)


def canonical_experts(module: nn.Module, *, attached: bool = False) -> Experts:
    """Read the experts of a module into canonical form; the tensors are views of the module's parameters.

    Interleaved (gate0, up0, gate1, ...) and transposed (E, D, F) layouts are undone.

    Args:
        module: the experts module.
        attached: whether gradients flow back to the module's parameters.
    """
    has_gate, transposed, concatenated = module.has_gate, module.is_transposed, module.is_concatenated
    fused = module.gate_up_proj if has_gate else module.up_proj
    assert isinstance(fused, Tensor)
    assert isinstance(module.down_proj, Tensor)
    fused_EFD = fused.transpose(1, 2) if transposed else fused
    down_EDF = module.down_proj.transpose(1, 2) if transposed else module.down_proj
    gate_EFD: Tensor | None = None
    up_EFD = fused_EFD
    gate_bias_EF: Tensor | None = None
    up_bias_EF: Tensor | None = None
    down_bias_ED: Tensor | None = None
    if has_gate:
        gate_EFD, up_EFD = _halves(fused_EFD, bool(concatenated))
    if module.has_bias:
        up_bias_EF = module.gate_up_proj_bias if has_gate else module.up_proj_bias  # type: ignore[assignment]
        down_bias_ED = module.down_proj_bias  # type: ignore[assignment]
        if has_gate:
            assert up_bias_EF is not None
            gate_bias_EF, up_bias_EF = _halves(up_bias_EF, bool(concatenated))
    experts = Experts(
        gate_EFD=gate_EFD,
        up_EFD=up_EFD,
        down_EDF=down_EDF,
        gate_bias_EF=gate_bias_EF,
        up_bias_EF=up_bias_EF,
        down_bias_ED=down_bias_ED,
        combine=_combine_of(module),
        finish=_finish_of(module),
    )
    return experts if attached else experts.map(lambda tensor: tensor.detach())


def native_experts(module: nn.Module, experts: Experts) -> dict[str, Tensor]:
    """Return canonical experts in the layout of `module`, by parameter name: the inverse of `canonical_experts`."""
    fuse = _fuse_concatenated if module.is_concatenated else _fuse_interleaved
    tensors: dict[str, Tensor] = {}
    name = "gate_up_proj" if module.has_gate else "up_proj"
    tensors[name] = experts.up_EFD if experts.gate_EFD is None else fuse(experts.gate_EFD, experts.up_EFD)
    tensors["down_proj"] = experts.down_EDF
    if module.is_transposed:
        tensors = {key: tensor.transpose(1, 2) for key, tensor in tensors.items()}
    if experts.up_bias_EF is not None:
        bias = experts.up_bias_EF
        tensors[f"{name}_bias"] = bias if experts.gate_bias_EF is None else fuse(experts.gate_bias_EF, bias)
    if experts.down_bias_ED is not None:
        tensors["down_proj_bias"] = experts.down_bias_ED
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def width_axes(module: nn.Module) -> dict[str, int]:
    """Return the axis of each parameter of an experts module along which the expert width runs, by parameter name.

    Fused gate and up projections hold each hidden neuron twice along it. What has no such axis is left out.
    """
    first, second = (2, 1) if module.is_transposed else (1, 2)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    return {name: first, "down_proj": second} | ({f"{name}_bias": 1} if module.has_bias else {})


def _halves(fused: Tensor, concatenated: bool) -> tuple[Tensor, Tensor]:
    """Split the width axis (axis 1) of gate and up."""
    if concatenated:
        first, second = fused.chunk(2, dim=1)
        return first, second
    return fused[:, 0::2], fused[:, 1::2]


def _fuse_concatenated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat((gate, up), dim=1)


def _fuse_interleaved(gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def _finish_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the norm that a module applies to each expert's output, if it has one; detached like the tensors."""
    if not getattr(module, "has_post_expert_norm", False):
        return None
    norm: Any = module.post_expert_norm

    def finish(out_TD: Tensor) -> Tensor:
        weights = {name: weight.detach() for name, weight in norm.named_parameters()}
        return functional_call(norm, weights, (out_TD,))  # type: ignore[no-any-return]

    return finish


def _combine_of(module: nn.Module) -> Combine:
    """Return how a module joins gate and up: its own `_apply_gate`, fed in the layout that it expects."""
    concatenated = bool(module.is_concatenated)
    # Most families keep transformers' default, which joins halves: no need to fuse them only to have them cut again.
    family: Any = type(module)
    plain = concatenated and bool(module.has_gate) and family._apply_gate is _default_apply_gate

    def combine(gate_TF: Tensor | None, up_TF: Tensor) -> Tensor:
        if gate_TF is None:
            return module.act_fn(up_TF)  # type: ignore[operator,no-any-return]
        if plain:
            return module.act_fn(gate_TF) * up_TF  # type: ignore[operator,no-any-return]
        fused = torch.cat((gate_TF, up_TF), -1) if concatenated else torch.stack((gate_TF, up_TF), -1).flatten(-2)
        return module._apply_gate(fused)  # type: ignore[operator,no-any-return]

    return combine
