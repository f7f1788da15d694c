"""A small random layer in flight, its statistics computed by slow loops."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coterie.compress.state import LayerState
from coterie.model.layers import Experts, MoELayer
from coterie.profile.profile import Profile, Sample
from coterie.profile.run import profile
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
        router={"block.gate.weight": router},
        expert_map_E=torch.arange(num_experts),
        statistics={
            "usage": usage,
            "reap": reap,
            "tokens": torch.tensor(float(tokens)).double(),
            "mean_output": mean_output,
            "logit_product": logits.double().T @ logits.double(),
            "logit_sum": logits.double().sum(0),
        },
        sample=Sample(
            inputs_TD=inputs,
            index_TK=index,
            weight_TK=weight,
            logits_TE=logits,
            output_TD=output,
            domain_T=torch.zeros(tokens, dtype=torch.int64),
        ),
        original=experts,
    )


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
