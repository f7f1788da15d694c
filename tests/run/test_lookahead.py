"""What is guessed of the next layer is what its router would choose, with its biases and groups."""

import pytest
import torch

from coterie.model.arch.seam import intercepted
from coterie.run.engine import Runtime
from coterie.run.lookahead import _choice_of
from coterie.testing import tiny_checkpoint


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", *(
    pytest.param(family, marks=pytest.mark.long) for family in ("glm4_moe", "gpt_oss", "granitemoe", "olmoe")
)])  # fmt: skip
def test_a_guess_is_what_the_router_chooses(family, tmp_path):
    model = tiny_checkpoint(tmp_path / family, family)
    with Runtime(model, memory="64GiB", context=32) as runtime, torch.no_grad():
        for name, tensor in runtime.model.state_dict().items():
            if "correction_bias" in name:  # so large that scores alone would choose others
                tensor.copy_(torch.linspace(3, -3, tensor.numel()))
        seen = {}

        def note(module, hidden_TD, index_TK, weight_TK):
            seen[id(module)] = hidden_TD.clone(), index_TK.clone()
            return torch.zeros_like(hidden_TD)

        with intercepted(runtime.model, note):
            runtime.model(torch.tensor([[5, 9, 3]]))
        compared = 0
        for layer in runtime.layers:
            hidden_TD, index_TK = seen[id(runtime.model.get_submodule(layer.experts))]
            choose = _choice_of(runtime.model, layer, hidden_TD.dtype)
            if choose is not None:
                assert choose(hidden_TD).sort().values.tolist() == index_TK.sort().values.tolist()
                compared += 1
        assert compared or family == "granitemoe"  # whose router chooses and sorts in one


def test_more_guesses_than_a_token_chooses_begin_with_its_choice(tmp_path):
    guesses = []
    model = tiny_checkpoint(tmp_path / "m", "deepseek_v3")
    with Runtime(model, memory="64GiB", context=32, lookahead=3) as runtime, torch.no_grad():
        runtime.lookahead._residency.prefetch = lambda layer, experts: guesses.append((layer, experts))
        assert len(runtime.layers) > 1
        for layer in runtime.layers[:-1]:
            hidden_1D = torch.randn(1, layer.hidden_size, generator=torch.Generator().manual_seed(layer.index))
            runtime.lookahead.look(layer.index, hidden_1D)
            following, _, choose = runtime.lookahead._following[layer.index]
            number, experts = guesses.pop()
            assert number == following.index == layer.index + 1
            assert experts[: following.top_k] == choose(hidden_1D)[0].tolist()
            assert len(experts) == len(set(experts)) == 3
        assert not guesses
