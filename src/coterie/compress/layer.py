"""One MoE layer on its way through the passes of a recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.compress.layer_plan import ExpertPlan, LayerPlan
from coterie.compress.methods import load_pass
from coterie.compress.recipes import Step
from coterie.compress.state import LayerState
from coterie.compress.times import passes_share
from coterie.errors import ArchitectureMismatch
from coterie.model.arch.experts import canonical_experts, native_experts
from coterie.model.arch.layers import MoELayer
from coterie.model.arch.reroute import Reroute
from coterie.profile.profile import Sample, summed
from coterie.progress import within


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """What was done to one layer, for the manifest.

    Attributes:
        expert_map: for each expert of the original the expert that stands for it, -1 where none does.
        centres: for each expert the one of the original that it is, or that its cluster is centred on.
        num_experts: experts of the layer now.
        width: hidden neurons of each.
        notes: what the passes had to say, by pass.
        plan: the layer's plan as it was executed, as JSON content.
    """

    expert_map: list[int]
    centres: list[int] | None
    num_experts: int
    width: int
    notes: Mapping[str, object]
    plan: Mapping[str, Any]

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return asdict(self)


def compress_layer(
    model: PreTrainedModel,
    layer: MoELayer,
    plan: LayerPlan,
    passes: Sequence[Step],
    by_domain: Mapping[str, Tensor],
    sample: Sample,
    reroute: Reroute,
    seed: int,
) -> tuple[dict[str, Tensor], LayerSummary]:
    """Send a layer whose weights are in memory through the passes.

    Args:
        model: the model that holds the layer's weights.
        layer: which one.
        plan: what it becomes.
        passes: names of passes and their options.
        by_domain: the layer's statistics, domains first.
        sample: its token sample.
        reroute: the model's own routers, for other router tensors.
        seed: seed of everything random in the passes.

    Returns:
        The tensors of its experts and router by name in memory, float32, on the CPU; and what was done.

    Raises:
        ArchitectureMismatch: a pass made another number of experts, or another width, than the plan says.
    """
    module = model.get_submodule(layer.experts)
    experts = canonical_experts(module).map(lambda tensor: tensor.to("cpu", torch.float32))
    state_dict = {name: model.state_dict()[name] for name, _ in layer.router_tensors}
    router = {name: tensor.to("cpu", torch.float32) for name, tensor in state_dict.items()}
    state = LayerState(
        layer=layer,
        experts=experts,
        router=router,
        original_router=router,
        expert_map_E=torch.arange(layer.num_experts),
        statistics=summed(by_domain),
        by_domain=by_domain,
        sample=_copied(sample),
        original=experts,
        route=functools.partial(reroute, layer),
        seed=seed,
    )
    del experts, state_dict
    for (name, options), share in zip(passes, passes_share(passes), strict=True):
        with within(share):
            state = load_pass(name)(state, plan, **options)
    _check_size(state, plan)
    summary = LayerSummary(
        expert_map=state.expert_map_E.tolist(),
        centres=None if state.centres_M is None else state.centres_M.tolist(),
        num_experts=state.experts.num_experts,
        width=state.experts.width,
        notes=dict(state.notes),
        plan=_executed(state, plan).content(),
    )
    native = native_experts(module, state.experts)
    return {f"{layer.experts}.{name}": tensor for name, tensor in native.items()} | dict(state.router), summary


def _check_size(state: LayerState, plan: LayerPlan) -> None:
    size = (state.experts.num_experts, state.experts.width)
    planned = (plan.num_experts, plan.width or state.layer.width)
    if size != planned:
        raise ArchitectureMismatch(
            f"{state.layer.block}: the passes made {size[0]} experts of width {size[1]}, the plan says {planned[0]} of "
            f"width {planned[1]}: one of the passes does not do what it is told"
        )
    wrong = [stand_in for stand_in in state.expert_map_E.tolist() if not -1 <= stand_in < state.experts.num_experts]
    if wrong:
        raise ArchitectureMismatch(
            f"{state.layer.block}: expert_map {state.expert_map_E.tolist()} names expert {wrong[0]} of "
            f"{state.experts.num_experts}: one of the passes does not say what it does"
        )


def _executed(state: LayerState, plan: LayerPlan) -> LayerPlan:
    """Return a plan that names what every expert was made from, also where the passes have decided."""
    if plan.experts is not None:
        return plan
    sources: list[list[int]] = [[] for _ in range(state.experts.num_experts)]
    for expert, stand_in in enumerate(state.expert_map_E.tolist()):
        if stand_in >= 0:
            sources[stand_in].append(expert)
    if not all(sources):  # parts of experts: the map names the first part of each only
        return plan
    return replace(plan, experts=tuple(ExpertPlan(sources=tuple(each)) for each in sources))


def _copied(sample: Sample) -> Sample:
    """Return a copy: matrix products may differ in the last bit where a file's tensors lie at odd places in memory."""
    return replace(sample, **{name: tensor.clone() for name, tensor in sample.tensors().items()})
