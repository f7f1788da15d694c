"""Slimming by activations against a slow loop; and bits after it, by the two commands that the method takes."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.slim_activations import activation_norms, slim_activations
from coterie.compress.recipes import RECIPES
from coterie.errors import InputError
from coterie.evaluate.run import evaluate
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import ResultForm
from coterie.testing import tiny_checkpoint

from .conftest import make_state

TEXT = {"tokens": 256, "seq_len": 32}


def slow(state, expert, neuron):
    """Return the score of a channel, token by token."""
    experts, sample = state.original, state.sample
    seen = {"hidden": [], "up": [], "gate": []}
    for token in range(len(sample.inputs_TD)):
        if expert in sample.index_TK[token].tolist():
            x = sample.inputs_TD[token].double()
            seen["hidden"].append(float(experts.hidden(expert, sample.inputs_TD[token][None])[0, neuron]))
            for name, weight, bias in (
                ("up", experts.up_EFD, experts.up_bias_EF),
                ("gate", experts.gate_EFD, experts.gate_bias_EF),
            ):
                if weight is not None:
                    shift = 0.0 if bias is None else float(bias[expert, neuron])
                    seen[name].append(float(weight[expert, neuron].double() @ x) + shift)
    norms = [sum(value**2 for value in values) ** 0.5 for values in seen.values() if values]
    return sum(norms) / len(norms) if norms else 0.0


@pytest.mark.parametrize(("biases", "gate"), [(False, True), (True, True), (True, False)])
def test_the_channels_with_the_largest_activations_stay_in_their_order(biases, gate):
    before = make_state(biases=biases, gate=gate, tokens=20)
    count, width = before.experts.num_experts, before.experts.width
    expected = torch.tensor([[slow(before, e, k) for k in range(width)] for e in range(count)]).double()
    torch.testing.assert_close(activation_norms(before.original, before.sample), expected, rtol=1e-5, atol=1e-7)
    after = slim_activations(before, LayerPlan(num_experts=count, width=4))
    for expert in range(count):
        best = sorted(sorted(range(width), key=lambda k, e=expert: -float(expected[e, k]))[:4])
        if expected[expert].sum() > 0:
            assert torch.equal(after.experts.up_EFD[expert], before.experts.up_EFD[expert][best])
            assert torch.equal(after.experts.down_EDF[expert], before.experts.down_EDF[expert][:, best])
    share = sum(float(expected[e].sort(descending=True).values[:4].sum()) for e in range(count)) / float(expected.sum())
    assert after.notes["slim"]["share_of_score"] == pytest.approx(share, rel=1e-5)


def test_an_expert_that_no_token_chose_keeps_its_largest_weights():
    before = make_state(tokens=1)
    [chosen] = before.sample.index_TK.tolist()
    never = next(expert for expert in range(before.experts.num_experts) if expert not in chosen)
    assert not activation_norms(before.original, before.sample)[never].any()
    after = slim_activations(before, LayerPlan(num_experts=before.experts.num_experts, width=3))
    norms = before.experts.up_EFD[never].norm(dim=1) * before.experts.gate_EFD[never].norm(dim=1)
    best = sorted((norms * before.experts.down_EDF[never].norm(dim=0)).argsort(descending=True)[:3].tolist())
    assert torch.equal(after.experts.up_EFD[never], before.experts.up_EFD[never][best])


def test_a_channel_that_nothing_comes_out_of_goes_first():
    state = make_state(tokens=40)
    down = state.original.down_EDF.clone()
    down[:, :, [1, 4]] = 0
    experts = replace(state.original, down_EDF=down)
    after = slim_activations(
        replace(state, experts=experts, original=experts), LayerPlan(num_experts=len(down), width=4)
    )
    assert torch.equal(after.experts.down_EDF, down[:, :, [0, 2, 3, 5]])


@pytest.mark.parametrize("bits", ["Q4_K", pytest.param("INT4", marks=pytest.mark.long)])
def test_channels_go_first_and_bits_in_a_second_run(bits, tmp_path, text_folder):
    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", hidden_size=256, moe_intermediate_size=512)
    narrow = compress(model, tmp_path / "narrow", recipe="moe-slimming", keep=0.5, text=text_folder, **TEXT)
    assert narrow.manifest.form is ResultForm.PLAIN
    assert narrow.plan.shape.width == 256
    assert narrow.manifest.provenance.recipe_paper == "2606.18304"
    small = compress(narrow.out, tmp_path / "small", type=bits, text=text_folder, **TEXT)
    assert small.logits_error <= 1e-6
    assert json.loads((small.out / "config.json").read_text())["moe_intermediate_size"] == 256
    assert set(small.plan.types.values()) <= {"Q4_K", "Q6_K", "INT4_G128"}  # 256 columns, nothing stands in
    assert small.plan.predicted_bytes == Checkpoint.open(small.out).num_bytes < 0.4 * narrow.plan.predicted_bytes
    first, second = (result.manifest.provenance.commands for result in (narrow, small))
    assert len(first) == 1
    assert second[0] == first[0].replace("model OUT", "model narrow")
    assert second[1].startswith(f"coterie compress narrow OUT --type {bits} --recipe gptaq")
    assert "\n".join(second) in (small.out / "README.md").read_text(encoding="utf-8")
    scores = {
        card.model: card.overall["kl"]
        for card in evaluate(
            [narrow.out, small.out], against=model, text=text_folder, tokens=64, seq_len=32, questions=0
        )
    }
    assert 0 < scores["narrow"] < scores["small"] + 0.2  # what is lost is lost with the channels
    if bits == "INT4":
        transformers.AutoModelForCausalLM.from_pretrained(small.out)
    else:
        assert load_model(small.out).config.moe_intermediate_size == 256


def test_it_is_for_widths_and_no_gradients_are_needed():
    recipe = RECIPES["moe-slimming"]
    assert recipe.needs == ()
    with pytest.raises(InputError, match="recipe moe-slimming slims experts"):
        plan(".", type="Q4_K", recipe="moe-slimming")
