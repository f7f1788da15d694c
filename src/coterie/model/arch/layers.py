"""The MoE layers of a model: where they are, which tensors steer them, and their experts in canonical form.

Nothing is listed by family. Two meta models that differ only in their number of experts are compared: the tensors
whose shape differs are the experts' and the router's, the axis that differs is the expert axis, and the config key
that made the difference is the key to change. transformers' own marks say which modules hold experts
(`use_experts_implementation`) and which are routers (`_can_record_outputs["router_logits"]`); how many experts a token
chooses is seen by running the meta model on empty text.

Legend: E experts, F expert width, D model width, T tokens, K chosen experts. All names here are names in memory.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch, Infeasible, NotAMoE
from coterie.model.arch.entries import whole_numbers, with_value
from coterie.model.arch.experts import canonical_experts, is_experts
from coterie.model.arch.head import model_config
from coterie.model.arch.meta import meta_model
from coterie.model.arch.probe import probe_top_k, run_on_nothing
from coterie.model.arch.routing import routing_problem
from coterie.model.arch.structure import check_chosen
from coterie.model.disk.checkpoint import Checkpoint

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Configs whose derivations are remembered.
_REMEMBERED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class MoELayer:
    """One MoE block: facts about it, no tensors.

    Attributes:
        index: position among the MoE layers, from 0.
        block: name of the module that holds router and experts.
        experts: name of the experts module.
        router: name of the router module, or None when the model declares none inside the block.
        router_tensors: every parameter and buffer outside the experts that has an expert axis, with that axis. The axis
            may be longer than E: what follows the first E entries (rows for shared experts or for "no expert") stays.
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
    """What a checkpoint computes: its meta model, its MoE layers, and the config key that counts experts.

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
        check_chosen(checkpoint.config, str(checkpoint.path))
        return cls.from_config(model_config(checkpoint), where=str(checkpoint.path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "the config") -> Architecture:
        """Derive the architecture from the content of a config.json; see `of`."""
        model = meta_model(config, where=where)
        names = [name for name, module in model.named_modules() if is_experts(module)]
        if not names:
            raise NotAMoE(
                f"{where} ({config['model_type']}) has no routed experts that Coterie can reach: "
                "it is a dense model, or transformers does not route its experts through the common interface"
            )
        top_k = probe_top_k(model, names, where, known_as=json.dumps(config, sort_keys=True, default=str))
        counts = {name: int(model.get_submodule(name).num_experts) for name in top_k}  # type: ignore[arg-type]
        key, other = _find_expert_key(config, model, counts, where)
        for name in names:
            if name not in top_k and model.get_submodule(name).num_experts != other.get_submodule(name).num_experts:
                raise ArchitectureMismatch(
                    f"{where}: text never reaches {name}, so nothing can be measured there, but the number of its "
                    f"experts hangs on {'.'.join(key)} too; experts for images or sound that are counted together with "
                    "those for text are not supported"
                )
        _check_nothing_shared(model, names, where)
        routers = _router_tensors(model, other, counts, where)
        groups = _num_groups(model)
        layers = tuple(
            _describe(model, name, index, routers[name], top_k[name], groups) for index, name in enumerate(counts)
        )
        return cls(config=config, model=model, layers=layers, expert_key=key)

    def check_feasible(self, num_experts: int, top_k: int | None = None) -> None:
        """Check that the resized model can route, with another number of chosen experts where one is given.

        Raises:
            Infeasible: the resized model cannot route (fewer experts than top_k, groups that do not divide); the
                message names the nearest counts that can.
        """
        problem = self.routing_problem(num_experts, top_k)
        if problem is None:
            return
        near = sorted(sorted(self.feasible_counts(), key=lambda count: abs(count - num_experts))[:2])
        raise Infeasible(
            f"{num_experts} experts a layer cannot be routed: {problem}; nearest that can: {', '.join(map(str, near))}"
        )

    def feasible_counts(self) -> list[int]:
        """Return the numbers of experts a layer that can be routed, ascending; the present one is the last."""
        largest = max(layer.num_experts for layer in self.layers)
        return [count for count in range(1, largest + 1) if self.routing_problem(count) is None]

    def routing_problem(self, num_experts: int, top_k: int | None = None) -> str | None:
        """Say why a router of this kind cannot choose `top_k` (as many as now) of so many experts; None when it can."""
        return routing_problem(
            num_experts,
            top_k=top_k or max(layer.top_k for layer in self.layers),
            num_groups=max(layer.num_groups for layer in self.layers),
            num_chosen_groups=_num_chosen_groups(self.model),
        )


def once_per_config(derive: Callable[[Architecture], T]) -> Callable[[Architecture], T]:
    """Wrap a derivation so that architectures of equal config share its result; the last few configs are remembered."""
    derived: dict[str, T] = {}

    @functools.wraps(derive)
    def look_up(architecture: Architecture) -> T:
        known_as = json.dumps(architecture.config, sort_keys=True, default=str)
        if known_as not in derived:
            if len(derived) >= _REMEMBERED:
                derived.clear()
            derived[known_as] = derive(architecture)
        return derived[known_as]

    return look_up


def _find_expert_key(
    config: Mapping[str, Any], model: PreTrainedModel, counts: Mapping[str, int], where: str
) -> tuple[tuple[str, ...], PreTrainedModel]:
    """Find the config key that counts experts, and the meta model with twice as many."""
    distinct = sorted(set(counts.values()))
    if len(distinct) > 1:
        raise ArchitectureMismatch(f"{where}: layers with different numbers of experts ({distinct}) are not supported")
    count = distinct[0]
    # Keys that stand in the file come first: a default that the file leaves out may have another name in the class.
    stages = [config, model.config.to_dict()]
    candidates: list[tuple[str, ...]] = []
    works: list[tuple[tuple[str, ...], PreTrainedModel]] = []
    for entries, named in itertools.product(stages, (True, False)):
        for path, value in whole_numbers(entries):
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
    """Build the meta model with `count` at `path`; None unless just that makes all experts modules hold `count`."""
    try:
        other = meta_model(with_value(config, path, count))
    except Exception:  # whatever a family's constructor raises, it means: not this key
        return None
    counts = {name: module.num_experts for name, module in other.named_modules() if is_experts(module)}
    return other if all(counts.get(name) == count for name in names) else None


def _check_nothing_shared(model: PreTrainedModel, names: list[str], where: str) -> None:
    """Refuse a model in which one set of experts stands in two places."""
    first: dict[int, str] = {}
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            holder = first.setdefault(id(parameter), name)
            if holder != name:
                raise ArchitectureMismatch(
                    f"{where}: {name} and {holder} are one set of experts that runs in two places; what it does in one "
                    "place says nothing of the other, so such models are not supported"
                )


def _router_tensors(
    model: PreTrainedModel, other: PreTrainedModel, counts: Mapping[str, int], where: str
) -> dict[str, list[tuple[str, int]]]:
    """Find the tensors outside the experts whose shape depends on the number of experts, by experts module.

    Args:
        model: the meta model.
        other: the same with twice as many experts.
        counts: number of experts by experts module.
        where: what to name in an error.
    """
    mine, theirs = (dict(each.named_parameters()) | dict(each.named_buffers()) for each in (model, other))
    blocks = {name.rpartition(".")[0]: name for name in counts}
    router_tensors: dict[str, list[tuple[str, int]]] = {name: [] for name in counts}
    for tensor_name, tensor in mine.items():
        same_shape = tensor_name in theirs and theirs[tensor_name].shape == tensor.shape
        if same_shape or any(tensor_name.startswith(f"{name}.") for name in counts):
            continue
        owner = _enclosing(tensor_name, blocks)
        if owner is None or tensor_name not in theirs:
            raise ArchitectureMismatch(
                f"{where}: {tensor_name} {list(tensor.shape)} depends on the number of experts, but is in no MoE block "
                f"({', '.join(list(blocks)[:3])}, ...)"
            )
        count, wide = counts[blocks[owner]], theirs[tensor_name]
        axes = [axis for axis, (a, b) in enumerate(zip(tensor.shape, wide.shape, strict=True)) if a != b]
        if len(axes) > 1 or wide.shape[axes[0]] - tensor.shape[axes[0]] != count:
            raise ArchitectureMismatch(
                f"{tensor_name}: more than its expert axis depends on the number of experts: {list(tensor.shape)} "
                f"becomes {list(wide.shape)} with {2 * count} experts"
            )
        router_tensors[blocks[owner]].append((tensor_name, axes[0]))
    for block, name in blocks.items():
        if not router_tensors[name]:
            raise ArchitectureMismatch(f"{block}: no tensor outside {name} has an axis of {counts[name]} experts")
        for tensor_name, tensor in _tensors_of(model, block).items():
            if not tensor.is_floating_point() and not tensor_name.startswith(f"{name}."):
                raise ArchitectureMismatch(
                    f"{tensor_name} {list(tensor.shape)} holds integers: this router looks experts up in a fixed table "
                    "(by token, for example) instead of scoring them, and a table of expert numbers cannot follow when "
                    "experts are dropped or merged"
                )
    return router_tensors


def _enclosing(name: str, blocks: Iterable[str]) -> str | None:
    """Return the innermost block that a tensor lies in."""
    return max((block for block in blocks if name.startswith(f"{block}.")), key=len, default=None)


def _describe(
    model: PreTrainedModel, name: str, index: int, router_tensors: list[tuple[str, int]], top_k: int, groups: int
) -> MoELayer:
    """Describe one layer."""
    experts = canonical_experts(model.get_submodule(name))
    block_name = name.rpartition(".")[0]
    router, _ = find_router(model, block_name) or (None, 0)
    return MoELayer(
        index=index,
        block=block_name,
        experts=name,
        router=router,
        router_tensors=tuple(router_tensors),
        num_experts=experts.num_experts,
        top_k=top_k,
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


def runs_alone(model: PreTrainedModel, layer: MoELayer) -> bool:
    """Tell whether an MoE block computes from hidden states alone, so that its router can be asked by itself."""
    try:
        return layer.experts in run_on_nothing(model, [layer.experts], layer.block)
    except Exception as error:  # whatever a family's block raises: it wants more than hidden states
        log.debug("%s does not run by itself: %s", layer.block, error)
        return False


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _num_groups(model: PreTrainedModel) -> int:
    """Return the number of router groups; group-limited routers need groups of equal size."""
    return int(getattr(_text_config(model), "n_group", None) or 1)


def _num_chosen_groups(model: PreTrainedModel) -> int:
    return int(getattr(_text_config(model), "topk_group", None) or 1)
