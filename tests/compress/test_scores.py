"""Every pruning score against slow loops over tokens, and the experts that `select` then keeps."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from coterie.compress.apply import Inputs, compress
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.methods.scores import SCORES, score_experts
from coterie.compress.methods.select import best_experts, select
from coterie.compress.state import LayerState
from coterie.errors import UnknownName
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile.calibration import tokenize
from some import first

DOMAINS = 3


def measured(state: LayerState) -> LayerState:
    """The state with three domains and what the scores read, by loops over the tokens of the sample."""
    num_experts, sample = state.layer.num_experts, state.sample
    names = ("usage", "gate_mass", "output_norm", "output_square", "reap", "easy_ep", "tcess", "tcess_tokens")
    by_domain = {name: torch.zeros(DOMAINS, num_experts, dtype=torch.float64) for name in names}
    by_domain["tokens"] = torch.zeros(DOMAINS, dtype=torch.float64)
    for token, domain, expert, weight, norm in chosen(state):
        logit = float(sample.logits_TE[token, expert])  # type: ignore[index]
        added = {
            "usage": 1, "gate_mass": weight, "output_norm": norm, "output_square": norm**2, "reap": weight * norm,
            "easy_ep": weight * norm * turn(token), "tcess": logit, "tcess_tokens": 1,
        }  # fmt: skip
        for name, value in added.items():
            by_domain[name][domain, expert] += value
    for token in range(len(sample.inputs_TD)):
        by_domain["tokens"][token % DOMAINS] += 1
    return replace(state, by_domain=by_domain, statistics={name: value_G.sum(0) for name, value_G in by_domain.items()})


def turn(token: int) -> float:
    """What EASY-EP's token contribution could be."""
    return 0.1 + token % 7


def chosen(state: LayerState) -> list[tuple[int, int, int, float, float]]:
    """Token, domain, expert, routing weight and output norm of every choice."""
    found = []
    for token, index_K in enumerate(state.sample.index_TK.tolist()):
        for slot, expert in enumerate(index_K):
            norm = float(state.original.output(expert, state.sample.inputs_TD[token : token + 1]).double().norm())
            found.append((token, token % DOMAINS, expert, float(state.sample.weight_TK[token, slot]), norm))
    return found


def slow_scores(state: LayerState, score: str) -> list[float]:
    """Each score straight from its definition."""
    num_experts, num_tokens = state.layer.num_experts, len(state.sample.inputs_TD)
    choices = chosen(state)
    scores = []
    for expert in range(num_experts):
        mine = [(token, weight, norm) for token, _, each, weight, norm in choices if each == expert]
        count = max(1, len(mine))
        if score == "frequency":
            scores.append(float(len(mine)))
        elif score == "gate-mass":
            scores.append(sum(weight for _, weight, _ in mine))
        elif score == "ean":
            scores.append(sum(norm for _, _, norm in mine))
        elif score == "man":
            scores.append(sum(norm for _, _, norm in mine) / count)
        elif score == "msan":
            scores.append(sum(norm**2 for _, _, norm in mine) / count)
        elif score == "reap":
            scores.append(sum(weight * norm for _, weight, norm in mine) / count)
        elif score == "tcess":
            logits = [float(state.sample.logits_TE[token, expert]) for token, _, _ in mine]  # type: ignore[index]
            scores.append(sum(logits) / num_tokens if mine else -math.inf)
        elif score == "easy-ep":
            total = 0.0
            for domain in range(DOMAINS):
                here = [entry for entry in choices if entry[1] == domain]
                whole = sum(weight * norm * turn(token) for token, _, _, weight, norm in here)
                own = [entry for entry in here if entry[2] == expert]
                total += sum(weight * norm * turn(token) for token, _, _, weight, norm in own) / whole
            scores.append(total)
    return scores


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("seed", [0, 1])
def test_every_score_equals_the_slow_loops_and_decides_what_stays(
    state: Callable[..., LayerState], score: str, seed: int
) -> None:
    before = measured(state(num_experts=10, tokens=50, seed=seed))
    expected = slow_scores(before, score)
    assert score_experts(score, before.statistics, before.by_domain).tolist() == pytest.approx(expected, rel=1e-6)
    after = select(before, LayerPlan(num_experts=4), score=score)
    best = sorted(sorted(range(10), key=lambda expert: -expected[expert])[:4])
    assert after.centres_M is not None
    assert after.centres_M.tolist() == best
    assert after.notes["select"]["score"] == pytest.approx(expected, rel=1e-6)  # type: ignore[index]


def test_a_large_domain_does_not_outvote_a_small_one_in_easy_ep() -> None:
    """Two experts serve a domain each; one domain has a thousand times the text."""
    score_GE = torch.tensor([[1000.0, 0.0, 400.0], [0.0, 1.0, 0.4]], dtype=torch.float64)
    found = score_experts("easy-ep", {"easy_ep": score_GE.sum(0)}, {"easy_ep": score_GE})
    assert found.tolist() == pytest.approx([1000 / 1400, 1 / 1.4, 0.4 / 1.4 * 2])
    silent = torch.cat((score_GE, torch.zeros(1, 3, dtype=torch.float64)))
    assert torch.equal(score_experts("easy-ep", {}, {"easy_ep": silent}), found), "a domain without any adds nothing"


@given(sums=st.lists(st.floats(-9, 9), min_size=6, max_size=6), unused=st.lists(st.booleans(), min_size=6, max_size=6))
def test_tcess_ranks_an_expert_that_was_never_chosen_last_whatever_the_sign(
    sums: list[float], unused: list[bool]
) -> None:
    tokens_E = torch.tensor([0.0 if never else 2.0 for never in unused], dtype=torch.float64)
    sum_E = torch.tensor(sums, dtype=torch.float64).masked_fill(tokens_E == 0, 0)
    found = score_experts(
        "tcess", {"tcess": sum_E, "tcess_tokens": tokens_E, "tokens": torch.tensor(7.0, dtype=torch.float64)}, {}
    )
    assert found.isfinite().all()
    for expert, never in enumerate(unused):
        if not never:
            assert found[expert] == sum_E[expert] / 7
            assert all(found[expert] > found[other] for other in range(6) if unused[other])


def test_select_notes_what_each_domain_by_itself_would_keep(state: Callable[..., LayerState]) -> None:
    before = measured(state(num_experts=8, tokens=60, seed=3))
    after = select(before, LayerPlan(num_experts=3), score="tcess", patterns=True)
    kept = after.notes["select"]["kept_by_domain"]  # type: ignore[index]
    assert len(kept) == DOMAINS
    assert len({tuple(each) for each in kept}) > 1, "the test shows little when all domains agree"
    for domain in range(DOMAINS):
        rows = torch.arange(60) % DOMAINS == domain
        alone = replace(before.sample, **{name: value[rows] for name, value in before.sample.tensors().items()})
        scores = slow_scores(replace(before, sample=alone), "tcess")
        assert kept[domain] == sorted(sorted(range(8), key=lambda expert: -scores[expert])[:3])
    assert "kept_by_domain" not in select(before, LayerPlan(num_experts=3), score="reap").notes["select"]  # type: ignore[operator]


def test_protected_experts_stay_whatever_their_score(state: Callable[..., LayerState]) -> None:
    before = state(num_experts=8, groups=2)
    worst = before.statistics["usage"].argsort()[:2].tolist()
    protected_E = torch.zeros(8, dtype=torch.bool)
    protected_E[worst] = True
    after = select(replace(before, protected_E=protected_E), LayerPlan(num_experts=4), score="frequency")
    assert after.centres_M is not None
    kept = after.centres_M.tolist()
    assert set(worst) <= set(kept)
    assert sum(expert < 4 for expert in kept) == 2, "each group keeps its share"
    assert after.notes["select"]["score"] == before.statistics["usage"].tolist()  # type: ignore[index]
    rest = [expert for expert in kept if expert not in worst]
    plain = best_experts(before, before.statistics["usage"], 4).tolist()
    assert set(rest) <= set(plain) | set(worst)


def test_an_unknown_score_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="score 'gatemass'; did you mean gate-mass"):
        score_experts("gatemass", {}, {})


def keep_experts(block: torch.nn.Module, kept: Sequence[int]) -> None:
    """Leave only these experts and router rows in a block of the stock OLMoE class."""
    for module in (block.gate, block.experts):
        module.num_experts = len(kept)
        for name, tensor in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(tensor[list(kept)].clone()))


def second_layer(model: torch.nn.Module, ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream before the second block, and what the block is given, (T, D) each."""
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1]
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
        for module in (layer.post_attention_layernorm, layer.mlp)
    ]
    with torch.no_grad():
        model(input_ids=ids_BS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen[0].double(), seen[1].double()


def routed(block: torch.nn.Module, x_D: torch.Tensor) -> dict[int, torch.Tensor]:
    """What the two chosen experts of a block add for one token, by the definition of this family, float64."""
    logit_E = block.gate.weight.double() @ x_D
    chosen = logit_E.topk(2).indices
    share_K = logit_E[chosen].softmax(0)
    added = {}
    for expert, share in zip(chosen.tolist(), share_K, strict=True):
        gate_F, up_F = (block.experts.gate_up_proj[expert].double() @ x_D).chunk(2)
        added[expert] = share * (block.experts.down_proj[expert].double() @ (gate_F * gate_F.sigmoid() * up_F))
    return added


def slow_easy_ep(model: torch.nn.Module, sequences: Mapping[str, torch.Tensor]) -> list[float]:
    """The score of each expert of the second layer, from its definition."""
    scores_E = torch.zeros(8, dtype=torch.float64)
    for ids_BS in sequences.values():
        domain_E = torch.zeros(8, dtype=torch.float64)
        for before_D, x_D in zip(*second_layer(model, ids_BS), strict=True):
            added = routed(model.model.layers[1].mlp, x_D)
            after_D = before_D + sum(added.values())
            turned = 1 - float(before_D @ after_D / before_D.norm() / after_D.norm())
            for expert, added_D in added.items():
                domain_E[expert] += added_D.norm() * turned
        scores_E += domain_E / domain_E.sum()
    return scores_E.tolist()


def slow_subset_error(
    model: torch.nn.Module, original: torch.nn.Module, sequences: Mapping[str, torch.Tensor], kept: Sequence[int]
) -> float:
    """How far some experts of the second layer are, on what they are given, from what all gave before; relative."""
    whole = original.model.layers[1].mlp
    few = copy.deepcopy(whole)
    keep_experts(few, kept)
    moved = size = 0.0
    for ids_BS in sequences.values():
        for x_D, before_D in zip(second_layer(model, ids_BS)[1], second_layer(original, ids_BS)[1], strict=True):
            expected_D = sum(routed(whole, before_D).values())
            moved += float((sum(routed(few, x_D).values()) - expected_D).square().sum())
            size += float(expected_D.square().sum())
    return moved / size


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("recipe", first(1, ["naee", "easy-ep"]))
def test_compressed_inputs_are_scored_with_what_the_layer_then_does(
    olmoe: Path, text_folder: Path, tmp_path: Path, recipe: str
) -> None:
    """The second layer's scores are those behind a first layer that has its kept experts only, or all of them."""
    sequences = tokenize(load_tokenizer(olmoe), text_folder, tokens=256, seq_len=32).sequences

    def second(inputs: Inputs, behind: Inputs) -> tuple[list[float], list[float]]:
        """What a run noted of the second layer, and the same by slow loops behind a first layer as in `behind`."""
        layers = results[inputs].manifest.layers
        model, original = (
            transformers.AutoModelForCausalLM.from_pretrained(olmoe, dtype=torch.float32) for _ in range(2)
        )
        if behind == "compressed":
            keep_experts(model.model.layers[0].mlp, layers[0].centres)
        if recipe == "easy-ep":
            return layers[1].notes["select"]["score"], slow_easy_ep(model, sequences)
        expected = slow_subset_error(model, original, sequences, layers[1].centres)
        return [layers[1].notes["subset-search"]["error"]], [expected]

    ways: tuple[Inputs, Inputs] = ("original", "compressed")
    results = {
        inputs: compress(
            olmoe, tmp_path / inputs, experts=4, recipe=recipe, text=text_folder, tokens=256, seq_len=32, inputs=inputs
        )
        for inputs in ways
    }
    first = [results[inputs].manifest.layers[0] for inputs in ways]
    assert first[0] == first[1], "nothing comes before the first layer"
    for inputs, other in zip(ways, reversed(ways), strict=True):
        noted, expected = second(inputs, inputs)
        assert noted == pytest.approx(expected, rel=1e-3)
        assert noted != pytest.approx(second(inputs, other)[1], rel=1e-2), "the two can be told apart"
