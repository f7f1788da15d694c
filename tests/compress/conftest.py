"""A small random layer in flight, its statistics computed by slow loops."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coterie.compress.state import LayerState, Route
from coterie.model.arch.experts import Experts
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.arch.load import load_model
from coterie.model.arch.reroute import Reroute
from coterie.model.disk.open import open_checkpoint
from coterie.profile.observation import observed
from coterie.profile.profile import Profile, Sample
from coterie.profile.run import profile
from coterie.profile.statistics import load_statistic
from coterie.testing import tiny_checkpoint, tiny_text


def combine(gate: Tensor | None, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up if gate is not None else torch.relu(up).square()


def make_state(
    *,
    num_experts: int = 8,
    width: int = 6,
    hidden: int = 5,
    tokens: int = 64,
    top_k: int = 2,
    groups: int = 1,
    biases: bool = False,
    gate: bool = True,
    seed: int = 0,
    experts: Experts | None = None,
) -> LayerState:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if experts is None:
        experts = Experts(
            gate_EFD=draw(num_experts, width, hidden) if gate else None,
            up_EFD=draw(num_experts, width, hidden),
            down_EDF=draw(num_experts, hidden, width),
            gate_bias_EF=draw(num_experts, width) if biases and gate else None,
            up_bias_EF=draw(num_experts, width) if biases else None,
            down_bias_ED=draw(num_experts, hidden) if biases else None,
            combine=combine,
        )
    router, inputs = draw(num_experts, hidden), draw(tokens, hidden)
    logits = inputs @ router.T + 0.5 * draw(num_experts)
    weight, index = logits.softmax(-1).topk(top_k)
    usage, reap = torch.zeros(num_experts).double(), torch.zeros(num_experts).double()
    mean_output = torch.zeros(num_experts, hidden).double()
    output = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for expert in range(num_experts):
            mean_output[expert] += experts.output(expert, inputs[token : token + 1])[0].double()
        for slot in range(top_k):
            expert = int(index[token, slot])
            value = experts.output(expert, inputs[token : token + 1])[0]
            usage[expert] += 1
            reap[expert] += float(weight[token, slot]) * float(value.double().norm())
            output[token] += weight[token, slot] * value
    statistics = {
        "usage": usage,
        "reap": reap,
        "tokens": torch.tensor(float(tokens)).double(),
        "mean_output": mean_output,
        "logit_product": logits.double().T @ logits.double(),
        "logit_sum": logits.double().sum(0),
    }
    rows = {"block.gate.weight": router}
    return LayerState(
        layer=MoELayer(
            index=0,
            block="block",
            experts="block.experts",
            router="block.gate",
            router_tensors=(("block.gate.weight", 0),),
            num_experts=num_experts,
            top_k=top_k,
            width=width,
            hidden_size=hidden,
            num_groups=groups,
        ),
        experts=experts,
        router=rows,
        expert_map_E=torch.arange(num_experts),
        statistics=statistics,
        by_domain={name: value[None] for name, value in statistics.items()},
        sample=Sample(
            inputs_TD=inputs,
            index_TK=index,
            weight_TK=weight,
            logits_TE=logits,
            output_TD=output,
            domain_T=torch.zeros(tokens, dtype=torch.int64),
        ),
        original=experts,
        original_router=rows,
        route=softmax_route(top_k),
    )


def softmax_route(top_k: int) -> Route:
    """A router without noise: softmax over all rows, the K best, not renormalised."""

    def route(router: Mapping[str, Tensor], inputs_TD: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = (inputs_TD @ router["block.gate.weight"].T).softmax(-1).topk(top_k)
        return index, weight

    return route


@pytest.fixture(scope="session")
def state() -> Callable[..., LayerState]:
    """The factory of random layers."""
    return make_state


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text") / "text", documents=4)


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("olmoe") / "tiny-olmoe", "olmoe", dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("deepseek") / "tiny-deepseek", "deepseek_v3")


@pytest.fixture(scope="session")
def olmoe_profile(olmoe: Path, text_folder: Path) -> Profile:
    return profile(olmoe, text=text_folder, tokens=2048, seq_len=64, sample_tokens=512)


@pytest.fixture(scope="session")
def family_state(tiny: Callable[..., Path]) -> Callable[..., LayerState]:
    """A factory: the last layer of a tiny checkpoint of a family, on its way, with the family's own router."""

    def make(model_type: str, tokens: int = 60) -> LayerState:
        folder = tiny(model_type)
        architecture, model = Architecture.of(open_checkpoint(folder)), load_model(folder, dtype=torch.float32)
        ids_BS = torch.randint(5, 60, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
        with observed(model, architecture.layers) as observations, torch.no_grad():
            model(input_ids=ids_BS, use_cache=False)
        layer, seen = architecture.layers[-1], observations[-1]
        statistics = {name: load_statistic(name)(seen) for name in ("usage", "reap")}
        tensors = model.state_dict()
        return LayerState(
            layer=layer,
            experts=seen.experts,
            router={name: tensors[name] for name, _ in layer.router_tensors},
            expert_map_E=torch.arange(layer.num_experts),
            statistics=statistics,
            by_domain={name: value[None] for name, value in statistics.items()},
            sample=Sample(
                inputs_TD=seen.hidden_TD,
                index_TK=seen.index_TK,
                weight_TK=seen.weight_TK,
                logits_TE=seen.logits_TE,
                output_TD=seen.output_TD,
                domain_T=torch.zeros(tokens, dtype=torch.int64),
                block_TD=seen.block_TD,
            ),
            original=seen.experts,
            route=functools.partial(Reroute(architecture, model), layer),
            original_router={name: tensors[name] for name, _ in layer.router_tensors},
        )

    return make
