"""What a policy leaves of a routing decision: against loops in plain Python, in its file, and in models."""

import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import CorruptArtifact, InputError
from coterie.model.arch.layers import Architecture
from coterie.model.disk.checkpoint import Checkpoint
from coterie.route.apply import routed
from coterie.route.policy import LayerRule, RoutePolicy, uniform_policy

EXPERTS = 8


def slow_choice(rule: LayerRule, index: list[int], weight: list[float]) -> tuple[list[int], list[float]]:
    """One token, slot by slot."""
    real = [slot for slot in range(len(index)) if index[slot] < EXPERTS]
    worth = {slot: weight[slot] * (rule.worth[index[slot]] if rule.worth else 1.0) for slot in real}
    order = sorted(real, key=lambda slot: (-worth[slot], slot))
    whole, before, computed = sum(weight[slot] for slot in real), 0.0, []
    for rank, slot in enumerate(order):
        enough = rule.most is not None and rank >= rule.most
        reached = rule.share < 1 and before >= rule.share * whole
        if rank == 0 or not (enough or reached or worth[slot] < rule.threshold):
            computed.append(slot)
        before += weight[slot]
    left = sum(weight[slot] for slot in computed)
    scale = whole / left if rule.renormalise and left > 0 else 1.0
    return (
        [index[slot] if slot in computed else EXPERTS for slot in range(len(index))],
        [weight[slot] * scale if slot in computed else 0.0 for slot in range(len(index))],
    )


@st.composite
def decisions(draw):
    """Draw a rule and what a router decided for some tokens, "no expert" and equal weights among it."""
    top_k = draw(st.integers(1, 5))
    tokens = [
        draw(st.lists(st.integers(0, EXPERTS), min_size=top_k, max_size=top_k, unique=draw(st.booleans())))
        for _ in range(draw(st.integers(1, 6)))
    ]
    eighths = st.integers(0, 8).map(lambda number: number / 8)  # sums of them are exact
    weights = [draw(st.lists(eighths, min_size=top_k, max_size=top_k)) for _ in tokens]
    rule = LayerRule(
        most=draw(st.none() | st.integers(1, 5)), share=draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])),
        threshold=draw(st.sampled_from([0.0, 0.25, 0.5])), renormalise=draw(st.booleans()),
        worth=tuple(draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=EXPERTS, max_size=EXPERTS)))
        if draw(st.booleans()) else (),
    )  # fmt: skip
    return rule, tokens, weights


@given(decisions())
def test_a_choice_is_what_loops_say(drawn):
    rule, tokens, weights = drawn
    index_TK, weight_TK = rule.choose(torch.tensor(tokens), torch.tensor(weights), EXPERTS)
    for token in range(len(tokens)):
        index, weight = slow_choice(rule, tokens[token], weights[token])
        assert index_TK[token].tolist() == index
        assert weight_TK[token].tolist() == pytest.approx(weight, abs=1e-6)


def test_the_rule_of_all_changes_nothing():
    index_TK, weight_TK = torch.tensor([[3, 1, EXPERTS]]), torch.tensor([[0.5, 0.25, 0.0]])
    chosen_TK, left_TK = LayerRule().choose(index_TK, weight_TK, EXPERTS)
    assert torch.equal(chosen_TK, index_TK)
    assert torch.equal(left_TK, weight_TK)


def test_experts_of_another_number_are_refused():
    with pytest.raises(InputError, match="what 3 experts of a layer are worth, and the layer has 8"):
        LayerRule(worth=(1.0, 1.0, 1.0)).choose(torch.tensor([[1]]), torch.tensor([[1.0]]), EXPERTS)


def test_a_file_holds_all_of_it_and_may_be_edited(tmp_path):
    policy = RoutePolicy(
        model="ab", top_k=(4, 2), experts_per_token=1.75, origin="by hand",
        rules=(LayerRule(most=2, share=0.7, renormalise=True), LayerRule(threshold=0.125, worth=(1.0, 0.5, 2.0))),
    )  # fmt: skip
    path = tmp_path / "policy.json"
    policy.save(path)
    assert RoutePolicy.load(path) == policy
    content = json.loads(path.read_text())
    content["body"]["layers"][0]["most"] = 3
    path.write_text(json.dumps(content))
    assert RoutePolicy.load(path).rules[0].most == 3
    content["body"]["layers"][0]["most"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match=r"layers\[0\].most is 0"):
        RoutePolicy.load(path)
    content["body"]["layers"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match="holds no layers"):
        RoutePolicy.load(path)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "granitemoe"])
def test_fewer_experts_are_what_the_config_would_have_chosen(tiny, family):
    """These families normalise what they chose, so that a smaller number in the config is the oracle."""
    path = tiny(family, num_experts_per_tok=4) if family != "qwen3_moe" else tiny(family, norm_topk_prob=True)
    layers = Architecture.of(Checkpoint.open(path)).layers
    ids_1S = torch.arange(1, 17)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    policy = uniform_policy(
        LayerRule(most=1, renormalise=True), [layer.top_k for layer in layers], experts_per_token=1, origin="test"
    )
    with torch.no_grad():
        before = model(ids_1S).logits
        with routed(model, layers, policy) as spent:
            fewer = model(ids_1S).logits
        after = model(ids_1S).logits
        for module in model.modules():  # the family's own router, told to choose fewer
            for name in ("top_k", "num_experts_per_tok"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, 1)
        expected = model(ids_1S).logits
    assert spent.experts_per_token == 1
    assert torch.equal(before, after)
    assert not torch.equal(before, fewer)
    torch.testing.assert_close(fewer, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_leaves_out_the_same(tiny, implementation):
    """Memory that a kernel did not write is no number, sooner or later: it is filled with such before."""
    path = tiny()
    layers = Architecture.of(Checkpoint.open(path)).layers
    model = transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation=implementation)
    policy = uniform_policy(LayerRule(most=1), [layer.top_k for layer in layers], experts_per_token=1, origin="test")
    ids_1S = torch.arange(1, 33)[None]
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.no_grad(), routed(model, layers, policy):
        torch.use_deterministic_algorithms(True)
        try:
            scores = model(ids_1S).logits
        finally:
            torch.use_deterministic_algorithms(False)
    eager = transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    with torch.no_grad(), routed(eager, layers, policy):
        torch.testing.assert_close(scores, eager(ids_1S).logits, rtol=1e-5, atol=1e-5)


def test_a_policy_for_another_model_is_refused(tiny):
    path = tiny()
    layers = Architecture.of(Checkpoint.open(path)).layers
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    policy = uniform_policy(LayerRule(), [7], experts_per_token=7, origin="test")
    with pytest.raises(InputError, match="1 layers in which a token chooses 7 experts"), routed(model, layers, policy):
        pass
