"""The MoE layers of a model: where they are, which tensors steer them, and their experts in canonical form.

Nothing is listed by family. Two empty models that differ only in their number of experts are compared: the tensors
whose shape differs are the experts' and the router's, the axis that differs is the expert axis, and the config key
that made the difference is the key to change. transformers' own marks say which modules hold experts
(`use_experts_implementation`) and which are routers (`_can_record_outputs["router_logits"]`).

Legend: E experts, F expert width, D model width, T tokens, K chosen experts. All names here are names in memory.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import _default_apply_gate
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from coterie.errors import ArchitectureMismatch, CorruptCheckpoint, Infeasible, NotACheckpoint, NotAMoE
from coterie.model.checkpoint import Checkpoint
from coterie.model.routing import routing_problem

Combine = Callable[[Tensor | None, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The experts of one layer in canonical form.

    For expert e and token x, ``h_e(x) = combine(gate_e x + gate_bias_e, up_e x + up_bias_e)`` and
    ``f_e(x) = finish(down_e h_e(x) + down_bias_e)``. Experts without a gate have ``gate_EFD`` None and
    ``h_e(x) = combine(None, up_e x)``.
    """

    gate_EFD: Tensor | None
    up_EFD: Tensor
    down_EDF: Tensor
    combine: Combine
    gate_bias_EF: Tensor | None = None
    up_bias_EF: Tensor | None = None
    down_bias_ED: Tensor | None = None
    finish: Callable[[Tensor], Tensor] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up_EFD.shape[0]

    @property
    def width(self) -> int:
        """F."""
        return self.up_EFD.shape[1]

    def hidden(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return h_e(x), the activations between up and down projection, as (T, F)."""
        up_TF = nn.functional.linear(x_TD, self.up_EFD[expert], _row(self.up_bias_EF, expert))
        gate_TF = None
        if self.gate_EFD is not None:
            gate_TF = nn.functional.linear(x_TD, self.gate_EFD[expert], _row(self.gate_bias_EF, expert))
        return self.combine(gate_TF, up_TF)

    def project(self, expert: int, hidden_TF: Tensor) -> Tensor:
        """Return f_e(x) from h_e(x), as (T, D)."""
        out_TD = nn.functional.linear(hidden_TF, self.down_EDF[expert], _row(self.down_bias_ED, expert))
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

    def select(self, index_M: Tensor) -> Experts:
        """Return the experts that `index_M` names, in that order."""
        return self.map(lambda tensor: tensor[index_M])


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoELayer:
    """One MoE block: facts about it, no tensors.

    Attributes:
        index: position among the MoE layers, from 0.
        block: name of the module that holds router and experts.
        experts: name of the experts module.
        router: name of the router module, or None when the model declares none inside the block.
        router_tensors: every parameter and buffer outside the experts that has an expert axis, with that axis.
        num_experts: E.
        top_k: K.
        width: F.
        hidden_size: D.
        num_groups: router groups; each has E / num_groups experts, and a plan keeps them equal.
    """

    index: int
    block: str
    experts: str
    router: str | None
    router_tensors: tuple[tuple[str, int], ...]
    num_experts: int
    top_k: int
    width: int
    hidden_size: int
    num_groups: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a checkpoint computes: its empty model, its MoE layers, and the config key that counts experts.

    `expert_key` is the path into config.json, for example ``("text_config", "num_experts")``.
    """

    config: Mapping[str, Any]
    model: PreTrainedModel
    layers: tuple[MoELayer, ...]
    expert_key: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Architecture:
        """Derive the architecture of a checkpoint from its config, without reading weights.

        Raises:
            NotACheckpoint: transformers does not know the model type.
            CorruptCheckpoint: no model can be built from the config.
            NotAMoE: the model has no experts that go through the common interface.
            ArchitectureMismatch: router tensors or the expert count's config key are ambiguous.
        """
        return cls.from_config(checkpoint.config, where=str(checkpoint.path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "the config") -> Architecture:
        """Derive the architecture from the content of a config.json; see `of`."""
        model = empty_model(config, where=where)
        names = [name for name, module in model.named_modules() if is_experts(module)]
        if not names:
            raise NotAMoE(
                f"{where} ({config['model_type']}) has no routed experts that Coterie can reach: "
                "it is a dense model, or transformers does not route its experts through the common interface"
            )
        counts = {name: int(model.get_submodule(name).num_experts) for name in names}  # type: ignore[arg-type]
        key, other = _find_expert_key(config, model, counts, where)
        groups = _num_groups(model)
        layers = tuple(_describe(model, other, name, index, groups.get(name, 1)) for index, name in enumerate(names))
        return cls(config=config, model=model, layers=layers, expert_key=key)

    def resized_config(self, num_experts: int) -> dict[str, Any]:
        """Return the content of config.json with another number of experts."""
        return _with_value(self.config, self.expert_key, num_experts)

    def check_feasible(self, num_experts: int) -> None:
        """Check that the resized model can route.

        Raises:
            Infeasible: the resized model cannot route (fewer experts than top_k, groups that do not divide); the
                message names the nearest counts that can.
        """
        problem = self._routing_problem(num_experts)
        if problem is None:
            return
        near = sorted(sorted(self.feasible_counts(), key=lambda count: abs(count - num_experts))[:2])
        raise Infeasible(
            f"{num_experts} experts a layer cannot be routed: {problem}; nearest that can: {', '.join(map(str, near))}"
        )

    def feasible_counts(self) -> list[int]:
        """Return the numbers of experts a layer that can be routed, ascending; the present one is the last."""
        largest = max(layer.num_experts for layer in self.layers)
        return [count for count in range(1, largest + 1) if self._routing_problem(count) is None]

    def _routing_problem(self, num_experts: int) -> str | None:
        return routing_problem(
            num_experts,
            top_k=max(layer.top_k for layer in self.layers),
            num_groups=max(layer.num_groups for layer in self.layers),
            num_chosen_groups=_num_chosen_groups(self.model),
        )


def is_experts(module: nn.Module) -> bool:
    """Tell whether transformers routes this module's experts through the common interface."""
    marks = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "num_experts")
    return all(hasattr(module, mark) for mark in marks)


def empty_model(
    config: Mapping[str, Any], *, where: str = "the config", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the model of a config.json on the meta device: all modules and names, no memory.

    Args:
        config: the content of config.json.
        where: what to name in an error.
        dtype: number format of the parameters; float32 when None.

    Raises:
        NotACheckpoint: transformers does not know the model type.
        CorruptCheckpoint: transformers knows it, but cannot build a model from the config.
    """
    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise NotACheckpoint(
            f"{where} has model_type {model_type!r}, which transformers {transformers.__version__} does not know; "
            "a newer transformers may (code that comes with a checkpoint is not run)"
        )
    name = (config.get("architectures") or [None])[0]
    model_class = getattr(transformers, name, None) if name else None
    with torch.device("meta"), quiet():
        try:
            parsed = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(config)))
            if model_class is not None:
                model = model_class._from_config(parsed, dtype=dtype or torch.float32)
            else:
                model = AutoModelForCausalLM.from_config(parsed, dtype=dtype or torch.float32)  # type: ignore[no-untyped-call]
        except Exception as error:  # every family checks its config in its own way
            first_line = str(error).strip().split("\n")[0]
            raise CorruptCheckpoint(
                f"{where}: no {model_type} model can be built from its config.json "
                f"({type(error).__name__}: {first_line})"
            ) from error
    return model.eval()  # type: ignore[no-any-return]


class quiet:  # noqa: N801  # used like the functions of contextlib
    """Context in which transformers says only errors and draws no progress bar; its settings come back after."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self._level = hf_logging.get_verbosity()
        self._bar = hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity(logging.ERROR)
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity(self._level)
        if self._bar:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def canonical_experts(module: nn.Module) -> Experts:
    """Read the experts of a module into canonical form; the tensors are views of the module's parameters.

    Interleaved (gate0, up0, gate1, ...) and transposed (E, D, F) layouts are undone.
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
        finish=getattr(module, "post_expert_norm", None) if getattr(module, "has_post_expert_norm", False) else None,
    )
    return experts.map(lambda tensor: tensor.detach())


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


def _integer_entries(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _integer_entries(value, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, key), value


def _with_value(config: Mapping[str, Any], path: tuple[str, ...], value: int) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    inner = changed
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    return changed


def _find_expert_key(
    config: Mapping[str, Any], model: PreTrainedModel, counts: Mapping[str, int], where: str
) -> tuple[tuple[str, ...], PreTrainedModel]:
    """Find the config key that counts experts, and the empty model with twice as many."""
    distinct = sorted(set(counts.values()))
    if len(distinct) > 1:
        raise ArchitectureMismatch(f"{where}: layers with different numbers of experts ({distinct}) are not supported")
    count = distinct[0]
    # Keys that stand in the file come first: a default that the file leaves out may have another name in the class.
    stages = [config, _json_like(model.config.to_dict())]
    candidates: list[tuple[str, ...]] = []
    works: list[tuple[tuple[str, ...], PreTrainedModel]] = []
    for entries, named in itertools.product(stages, (True, False)):
        for path, value in _integer_entries(entries):
            if value != count or ("expert" in path[-1]) != named or path in candidates:
                continue
            candidates.append(path)
            other = _try_resize(config, path, 2 * count, counts)
            if other is not None:
                works.append((path, other))
        if works:
            break
    if len(works) != 1:
        names = [".".join(path) for path, _ in works] or [".".join(path) for path in candidates]
        raise ArchitectureMismatch(f"{where}: the config key that counts the {count} experts is not clear: {names}")
    return works[0]


def _try_resize(
    config: Mapping[str, Any], path: tuple[str, ...], count: int, names: Iterable[str]
) -> PreTrainedModel | None:
    """Build the empty model with `count` at `path`; None unless just that makes all experts modules hold `count`."""
    try:
        other = empty_model(_with_value(config, path, count))
    except Exception:  # whatever a family's constructor raises, it means: not this key
        return None
    modules = {name for name, module in other.named_modules() if is_experts(module)}
    if modules != set(names) or any(other.get_submodule(name).num_experts != count for name in names):
        return None
    return other


def _json_like(value: Any) -> Any:
    return {str(key): _json_like(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _describe(model: PreTrainedModel, other: PreTrainedModel, name: str, index: int, groups: int) -> MoELayer:
    """Describe one layer from two empty models that differ in the number of experts."""
    experts = canonical_experts(model.get_submodule(name))
    block_name = name.rpartition(".")[0]
    mine, theirs = (_tensors_of(each, block_name) for each in (model, other))
    router_tensors = []
    for tensor_name, tensor in mine.items():
        if tensor_name.startswith(name + "."):
            continue
        axes = [axis for axis, (a, b) in enumerate(zip(tensor.shape, theirs[tensor_name].shape, strict=True)) if a != b]
        if len(axes) > 1 or (axes and 2 * tensor.shape[axes[0]] != theirs[tensor_name].shape[axes[0]]):
            raise ArchitectureMismatch(f"{tensor_name}: more than its expert axis depends on the number of experts")
        if axes:
            router_tensors.append((tensor_name, axes[0]))
    if not router_tensors:
        raise ArchitectureMismatch(
            f"{block_name}: no tensor outside {name} has an axis of {experts.num_experts} experts"
        )
    router, _ = find_router(model, block_name) or (None, 0)
    return MoELayer(
        index=index,
        block=block_name,
        experts=name,
        router=router,
        router_tensors=tuple(router_tensors),
        num_experts=experts.num_experts,
        top_k=_probe_top_k(model, block_name, name, router),
        width=experts.width,
        hidden_size=experts.up_EFD.shape[2],
        num_groups=groups,
    )


def _tensors_of(model: PreTrainedModel, block: str) -> dict[str, Tensor]:
    module = model.get_submodule(block)
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {f"{block}.{name}" if block else name: tensor for name, tensor in named.items()}


def find_router(model: PreTrainedModel, block: str) -> tuple[str, int] | None:
    """Return the router module's name and which of its outputs are the scores of all experts.

    The model declares both in `_can_record_outputs["router_logits"]`. None when it declares nothing inside `block`.
    """
    specs: list[Any] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            declared = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
            specs.extend(declared if isinstance(declared, list) else [declared])
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        for spec in specs:
            target = getattr(spec, "target_class", spec)
            if isinstance(target, type) and isinstance(module, target) and name != block:
                return name, int(getattr(spec, "index", 1))
    return None


def _probe_top_k(model: PreTrainedModel, block: str, experts: str, router: str | None) -> int:
    """Read K from the shape of the routing decision that the empty block hands to its experts."""
    from coterie.model.seam import intercepted

    seen: list[int] = []

    def probe(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        seen.append(index_TK.shape[-1])
        return torch.zeros_like(hidden_TD)

    module = model.get_submodule(block)
    width = canonical_experts(model.get_submodule(experts)).up_EFD.shape[2]
    with torch.no_grad(), intercepted(model, probe):
        try:
            module(torch.zeros(1, 2, width, device="meta"))
        except Exception as error:  # whatever a family's block raises, the way out is the same
            raise ArchitectureMismatch(
                f"{block}: the block cannot be run by itself to see how many experts a token chooses "
                f"({type(error).__name__}: {error}); router {router}"
            ) from error
    if len(seen) != 1:
        raise ArchitectureMismatch(f"{block}: the block called its experts {len(seen)} times for one input")
    return seen[0]


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _num_groups(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of router groups by experts module; group-limited routers need groups of equal size."""
    groups = int(getattr(_text_config(model), "n_group", None) or 1)
    return {name: groups for name, module in model.named_modules() if is_experts(module)}


def _num_chosen_groups(model: PreTrainedModel) -> int:
    return int(getattr(_text_config(model), "topk_group", None) or 1)
