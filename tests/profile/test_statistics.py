"""Every statistic against slow loops that share no code with the library, and what makes statistics add up.

The oracle reads the weights of the stock module in the layout of its family, decides the routing itself from the
router's weights, and sums in float64, token by token.

Legend: E experts, D model width, F expert width, T tokens, K chosen experts, G domains.
"""

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from coterie import report as report_package
from coterie.compress.methods import needs_of
from coterie.compress.recipes import RECIPES, ROUTERS, get_recipe
from coterie.errors import Infeasible, UnknownName
from coterie.model.arch.layers import Architecture
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.tokenizer import load_tokenizer
from coterie.profile import observation as observation_module
from coterie.profile.calibration import TokenSet, tokenize
from coterie.profile.collect import Collector
from coterie.profile.measure import profile_model
from coterie.profile.observation import observed
from coterie.profile.statistics import (
    GRADIENTS,
    ON_REQUEST,
    STATISTICS,
    fields_of,
    load_statistic,
    mean_output,
    merged,
    needs_gradients,
    wanted_statistics,
)
from coterie.profile.statistics.easy_ep import easy_ep
from coterie.profile.statistics.tcess import tcess, tcess_tokens
from observations import draw, rows, with_squares
from some import first

FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss")
NAMES = {
    "tokens", "usage", "gate_mass", "output_norm", "output_square", "reap", "mean_output", "logit_sum", "logit_product",
    "hidden_square", "gated_hidden_square", "easy_ep", "tcess", "tcess_tokens", "output_peak",
}  # fmt: skip
BACKWARD = {"channel_gradient", "channel_fisher", "gradient_energy"}  # only where there is a gradient


# --- the oracle ---------------------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + torch.exp(-x))


def expert_output(model_type, module, expert, x_D):
    """Return h_e(x) and f_e(x) from the weights as the family stores them."""
    if model_type == "gpt_oss":  # (E, D, 2F), gate and up interleaved, biases, clamped
        both = module.gate_up_proj[expert].T @ x_D + module.gate_up_proj_bias[expert]
        gate = torch.stack([both[2 * f] for f in range(len(both) // 2)]).clamp(max=7.0)
        up = torch.stack([both[2 * f + 1] for f in range(len(both) // 2)]).clamp(-7.0, 7.0)
        hidden_F = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        return hidden_F, module.down_proj[expert].T @ hidden_F + module.down_proj_bias[expert]
    width = module.down_proj.shape[2]  # (E, 2F, D), first all gates, then all ups
    both = module.gate_up_proj[expert] @ x_D
    hidden_F = silu(both[:width]) * both[width:]
    return hidden_F, module.down_proj[expert] @ hidden_F


def routing(model_type, block, config, x_D):
    """Return the router scores of all experts and {chosen expert: weight} for one token."""
    if model_type == "gpt_oss":
        logits = (block.router.weight @ x_D + block.router.bias).tolist()
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: config.num_experts_per_tok]
        total = sum(math.exp(logits[e]) for e in chosen)
        return logits, {e: math.exp(logits[e]) / total for e in chosen}
    logits = (block.gate.weight @ x_D).tolist()
    if model_type == "olmoe":
        assert not config.norm_topk_prob
        total = sum(math.exp(score) for score in logits)
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: config.num_experts_per_tok]
        return logits, {e: math.exp(logits[e]) / total for e in chosen}
    scores = [1 / (1 + math.exp(-score)) for score in logits]
    biased = [score + bias for score, bias in zip(scores, block.gate.e_score_correction_bias.tolist(), strict=True)]
    size = len(scores) // config.n_group
    groups = [range(group * size, (group + 1) * size) for group in range(config.n_group)]
    groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: config.topk_group] for e in group]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]
    assert config.norm_topk_prob
    total = sum(scores[e] for e in chosen)
    return logits, {e: config.routed_scaling_factor * scores[e] / total for e in chosen}


def cosine(one, two):
    dot = sum(a * b for a, b in zip(one.tolist(), two.tolist(), strict=True))
    return dot / math.sqrt(sum(a * a for a in one.tolist()) * sum(b * b for b in two.tolist()))


def oracle(model_type, block, config, x_TD, residual_TD):
    """Return every statistic of one layer for some tokens of one domain, before whose block the stream is residual."""
    num_experts = 8
    vector = lambda: [0.0] * num_experts  # noqa: E731
    found = {name: vector() for name in ("usage", "gate_mass", "output_norm", "output_square", "reap")}
    found |= {name: vector() for name in ("easy_ep", "tcess", "output_peak")}
    logit_sum = vector()
    logit_product = [vector() for _ in range(num_experts)]
    mean_output = torch.zeros(num_experts, x_TD.shape[1], dtype=torch.float64)
    squares = [torch.zeros(num_experts, block.experts.down_proj.shape[2], dtype=torch.float64) for _ in range(2)]
    if model_type == "gpt_oss":
        squares = [torch.zeros(num_experts, block.experts.down_proj.shape[1], dtype=torch.float64) for _ in range(2)]
    for x_D, residual_D in zip(x_TD, residual_TD, strict=True):
        logits, chosen = routing(model_type, block, config, x_D)
        added_D = sum(weight * expert_output(model_type, block.experts, e, x_D)[1] for e, weight in chosen.items())
        turn = max(1 - cosine(residual_D, residual_D + added_D), 0)
        for e in range(num_experts):
            hidden_F, output_D = expert_output(model_type, block.experts, e, x_D)
            mean_output[e] += output_D
            logit_sum[e] += logits[e]
            for other in range(num_experts):
                logit_product[e][other] += logits[e] * logits[other]
            if e in chosen:
                norm = math.sqrt(sum(value * value for value in output_D.tolist()))
                found["usage"][e] += 1
                squares[0][e] += hidden_F**2
                squares[1][e] += (chosen[e] * hidden_F) ** 2
                found["gate_mass"][e] += chosen[e]
                found["output_norm"][e] += norm
                found["output_square"][e] += norm * norm
                found["reap"][e] += chosen[e] * norm
                found["easy_ep"][e] += chosen[e] * norm * turn
                found["tcess"][e] += logits[e]
                found["output_peak"][e] = max(found["output_peak"][e], *(abs(value) for value in output_D.tolist()))
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    return tensors | {
        "tokens": torch.tensor(float(len(x_TD)), dtype=torch.float64),
        "tcess_tokens": tensors["usage"],
        "mean_output": mean_output,
        "hidden_square": squares[0],
        "gated_hidden_square": squares[1],
        "logit_sum": torch.tensor(logit_sum, dtype=torch.float64),
        "logit_product": torch.tensor(logit_product, dtype=torch.float64),
    }


# --- measured on models -------------------------------------------------------------------------------------------


class Measured:
    """One family in float64 with its tokens and profile, and what its experts modules received."""

    def __init__(self, model_type, path, text):
        self.model_type = model_type
        self.layers = Architecture.of(Checkpoint.open(path)).layers
        self.model = load_model(path, dtype=torch.float64)
        self.token_set = tokenize(load_tokenizer(path), text, seq_len=12, tokens=72)
        assert self.token_set.num_tokens == {"code": 36, "prose": 36}
        self.profile = self.run(self.token_set)

    def run(self, token_set, **options):
        return profile_model(self.model, self.layers, token_set, model_digest="m", **options)

    def block(self, layer):
        return self.model.get_submodule(layer.block)

    def received(self, domain):
        """Return what each layer's experts and the norm before their block receive in a plain forward pass, (T, D)."""
        seen, streams, hooks = [], [], []
        for layer in self.layers:
            module = self.model.get_submodule(layer.experts)
            norm = self.model.get_submodule(layer.block.rpartition(".")[0]).post_attention_layernorm
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
            hooks.append(norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].flatten(0, -2))))
        self.model.set_experts_implementation("eager")
        with torch.no_grad():
            self.model(input_ids=self.token_set.sequences[domain], use_cache=False)
        for hook in hooks:
            hook.remove()
        return zip(seen, streams, strict=True)


@pytest.fixture(scope="module", params=FAMILIES)
def measured(request, tiny, text):
    # The published OLMoE does not renormalise: its weights are a softmax over all experts.
    changes = {"norm_topk_prob": False} if request.param == "olmoe" else {}
    return Measured(request.param, tiny(request.param, **changes), text)


def test_the_table_holds_what_the_oracle_knows(measured):
    for held in measured.profile.statistics:
        assert set(held) == NAMES
        for name, value in held.items():
            assert value.dtype == torch.float64, name
            assert value.shape[0] == 2, name


def test_every_statistic_equals_the_slow_loops(measured):
    for domain_index, domain in enumerate(measured.token_set.domains):
        for layer, (x_TD, residual_TD) in zip(measured.layers, measured.received(domain), strict=True):
            with torch.no_grad():
                block = measured.block(layer)
                expected = oracle(measured.model_type, block, measured.model.config, x_TD, residual_TD)
            assert expected.keys() == NAMES
            assert (expected["usage"] > 0).sum() >= 4, "the test shows little when few experts are chosen"
            for name, value in expected.items():
                found = measured.profile.by_domain(layer.index, name)[domain_index]
                exact = name in ("tokens", "usage", "tcess_tokens")
                # Norms are kept in float32, and one family's router computes in float32.
                tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
                torch.testing.assert_close(found, value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_the_sum_over_domains(measured):
    for name in NAMES:
        both = measured.profile.by_domain(1, name)
        expected = torch.maximum(*both) if name == "output_peak" else both[0] + both[1]
        torch.testing.assert_close(measured.profile.sum(1, name), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_does_not_matter(measured, batch_size):
    other = measured.run(measured.token_set, batch_size=batch_size)
    for one, two in zip(measured.profile.statistics, other.statistics, strict=True):
        for name in NAMES:
            torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-6)
    for one, two in zip(measured.profile.samples, other.samples, strict=True):
        assert torch.equal(one.index_TK, two.index_TK)
        torch.testing.assert_close(one.inputs_TD, two.inputs_TD)


@pytest.mark.parametrize("cut", first(1, [1, 2]))
def test_two_halves_of_a_text_add_up_to_the_whole_to_the_last_bit(measured, cut):
    options = {"batch_size": 1, "sample_tokens": 20, "thin": 5}

    def part(start, stop):
        rows = {domain: ids[start:stop] for domain, ids in measured.token_set.sequences.items()}
        return measured.run(
            TokenSet(sequences=rows, seq_len=12, digest=f"{start}"), batch_size=1, sample_tokens=20, thin=5
        )

    whole = measured.run(measured.token_set, **options)
    merged, swapped = part(0, cut).merge(part(cut, 3)), part(cut, 3).merge(part(0, cut))
    assert merged.num_tokens == whole.num_tokens == (36, 36)
    for one, two, three in zip(merged.statistics, swapped.statistics, whole.statistics, strict=True):
        assert one.keys() == two.keys() == three.keys() == NAMES
        for name in NAMES:
            assert torch.equal(one[name], three[name]), name
            assert torch.equal(two[name], three[name]), name
    for one, two, three in zip(merged.samples, swapped.samples, whole.samples, strict=True):
        assert one.tensors().keys() == two.tensors().keys() == three.tensors().keys()
        assert len(three.domain_T) == 20
        for name, value in three.tensors().items():
            assert torch.equal(one.tensors()[name], value), name
            assert torch.equal(two.tensors()[name], value), name


def test_only_the_statistics_that_are_asked_for(measured):
    found = measured.run(measured.token_set, statistics=["reap", "usage"])
    assert found.asked == ("usage", "reap")
    assert [set(each) for each in found.statistics] == [{"usage", "reap"}] * 2
    for one, two in zip(found.statistics, measured.profile.statistics, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one), "a value alone is what it is with others"
    assert measured.run(measured.token_set, statistics=()).statistics == [{}, {}]
    with pytest.raises(UnknownName, match="unknown statistic 'useage'; did you mean usage"):
        measured.run(measured.token_set, statistics=("useage",))


# --- measured on drawn observations -------------------------------------------------------------------------------


def measure_all(observation):
    found = {name: load_statistic(name)(observation) for name in STATISTICS}
    return {name: value for name, value in found.items() if value is not None}


def all_close(one, two):
    assert one.keys() == two.keys() == NAMES | BACKWARD
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text
        )


@given(
    seed=st.integers(0, 10**6), num_tokens=st.integers(0, 9), cut=st.integers(0, 9), nobody=st.sampled_from([0, 0.4, 1])
)
@example(seed=0, num_tokens=6, cut=0, nobody=0.4)
def test_any_split_of_a_batch_adds_up(seed, num_tokens, cut, nobody):
    whole = draw(seed, num_tokens=num_tokens, nobody=nobody)
    first, second = measure_all(rows(whole, slice(0, cut))), measure_all(rows(whole, slice(cut, None)))
    all_close({name: merged(name, first[name], second[name]) for name in first}, measure_all(whole))


@given(seed=st.integers(0, 10**6))
def test_the_order_of_tokens_and_of_choices_does_not_matter(seed):
    observation = draw(seed)
    flipped = replace(
        rows(observation, torch.arange(8, -1, -1)),
        **{name: getattr(observation, name).flip(0, 1) for name in ("index_TK", "weight_TK", "norm_TK", "peak_TK")},
    )
    all_close(measure_all(flipped), measure_all(observation))


@given(seed=st.integers(0, 10**6))
def test_renaming_experts_renames_the_statistics(seed):
    observation = draw(seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    place = torch.cat([order.argsort(), torch.tensor([5])])  # where each expert went; "no expert" stays
    renamed = with_squares(
        replace(
            observation,
            experts=observation.experts.select(order),
            index_TK=place[observation.index_TK],
            logits_TE=observation.logits_TE[:, order],
        )
    )
    before, after = measure_all(observation), measure_all(renamed)
    for name, value in before.items():
        expected = value if name == "tokens" else value[order]
        if name == "logit_product":
            expected = expected[:, order]
        torch.testing.assert_close(after[name], expected, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 10**6), beyond=st.integers(0, 3), weight=st.floats(-9, 9))
def test_no_expert_contributes_nothing(seed, beyond, weight):
    observation = draw(seed, nobody=0.5)
    nobody_TK = observation.index_TK == 5
    other = replace(
        observation,
        index_TK=observation.index_TK.masked_fill(nobody_TK, 5 + beyond),
        weight_TK=observation.weight_TK.masked_fill(nobody_TK, weight),
    )
    found = measure_all(other)
    all_close(found, measure_all(observation))
    assert found["usage"].sum() == (~nobody_TK).sum()
    assert found["tokens"] == 9, "a token that nobody takes is a token"


def test_nobody_at_all():
    found = measure_all(draw(0, nobody=1.0))
    for name in ("usage", "gate_mass", "output_norm", "output_square", "reap"):
        assert not found[name].any()
    assert found["mean_output"].any(), "outputs on all tokens, chosen or not"


@given(seed=st.integers(0, 10**6), bias=st.booleans(), normed=st.booleans(), chunk=st.integers(1, 10))
def test_mean_output_is_the_sum_of_outputs_on_all_tokens(seed, bias, normed, chunk):
    finish = (lambda out_TD: out_TD / out_TD.norm(dim=-1, keepdim=True)) if normed else None
    observation = draw(seed, bias=bias, finish=finish)
    experts = observation.experts
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for e in range(5):
        for x_D in observation.hidden_TD:
            hidden_F = torch.tanh(experts.gate_EFD[e] @ x_D) * (experts.up_EFD[e] @ x_D)
            output_D = experts.down_EDF[e] @ hidden_F + (experts.down_bias_ED[e] if bias else 0)
            expected[e] += output_D / output_D.norm() if normed else output_D
    with patch.object(mean_output, "_CHUNK", chunk):
        found = mean_output.mean_output(observation)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("thin", [2, 3, 4])
def test_the_mean_output_of_a_long_text_is_estimated_from_every_so_many_th_token(thin):
    whole = draw(0)
    few = replace(whole, hidden_TD=whole.hidden_TD[::thin])
    mean_ED = mean_output.mean_output(few) / len(few.hidden_TD)
    found = mean_output.mean_output(replace(whole, thin=thin))
    torch.testing.assert_close(found / len(whole.hidden_TD), mean_ED, rtol=1e-12, atol=1e-12)


def test_a_model_without_recorded_scores_has_no_score_statistics():
    found = measure_all(replace(draw(0), logits_TE=None, gradient_TD=None))
    assert found.keys() == NAMES - {"logit_sum", "logit_product", "tcess", "tcess_tokens"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_numbers_are_summed_wide(dtype):
    # 5000 tokens of one expert: in half precision a running sum of ones stops at 2048, in bfloat16 at 256.
    count = 5000
    observation = draw(0, num_experts=1, top_k=1, num_tokens=2, nobody=0)
    many = replace(
        observation,
        experts=replace(
            observation.experts.map(lambda tensor: torch.ones_like(tensor, dtype=dtype)),
            combine=lambda gate, up: torch.ones_like(up),
        ),
        hidden_TD=torch.ones(count, 4, dtype=dtype),
        index_TK=torch.zeros(count, 1, dtype=torch.int64),
        weight_TK=torch.ones(count, 1, dtype=dtype),
        logits_TE=torch.ones(count, 1, dtype=dtype),
        norm_TK=torch.ones(count, 1, dtype=dtype),
        peak_TK=torch.ones(count, 1, dtype=dtype),
        output_TD=torch.tensor([[1, -1, 1, -1]], dtype=dtype).expand(count, 4),
        residual_TD=torch.ones(count, 4, dtype=dtype),
        block_output_TD=torch.tensor([[1, -1, 1, -1]], dtype=dtype).expand(count, 4),
        after_TD=torch.tensor([[2, 0, 2, 0]], dtype=dtype).expand(count, 4),
        gradient_TD=torch.ones(count, 4, dtype=dtype),
    )
    found = measure_all(many)
    for name in ("usage", "gate_mass", "output_norm", "output_square", "reap", "logit_sum"):
        assert found[name].tolist() == [count], name
    assert found["tcess"].tolist() == found["tcess_tokens"].tolist() == [count]
    assert found["output_peak"].tolist() == [1]
    assert found["easy_ep"].tolist() == pytest.approx([count * (1 - math.sqrt(0.5))]), "the stream turns by 45 degrees"
    assert found["logit_product"].tolist() == [[count]]
    assert found["mean_output"].tolist() == [[4 * count] * 4], "three activations of 1 and a bias of 1"
    for name in BACKWARD:
        assert found[name].tolist() == [[16 * count] * 3], name


@given(seed=st.integers(0, 10**6), nobody=st.sampled_from([0, 0.4, 1]))
def test_gradients_of_channels_equal_slow_loops(seed, nobody):
    observation = draw(seed, nobody=nobody)
    experts, width = observation.experts, observation.experts.width
    expected = {name: torch.zeros(5, width, dtype=torch.float64) for name in BACKWARD}
    for token, x_D in enumerate(observation.hidden_TD):
        for expert in range(5):
            hidden = experts.hidden(expert, x_D[None])[0].tolist()
            for channel in range(width):
                slope = sum(
                    float(observation.gradient_TD[token, d]) * float(experts.down_EDF[expert, d, channel])
                    for d in range(len(x_D))
                )
                expected["gradient_energy"][expert, channel] += slope**2
                for slot in range(2):
                    if observation.index_TK[token, slot] == expert:
                        weight = float(observation.weight_TK[token, slot])
                        expected["channel_gradient"][expert, channel] += (weight * slope) ** 2
                        expected["channel_fisher"][expert, channel] += (weight * slope * hidden[channel]) ** 2
    for name, value in expected.items():
        torch.testing.assert_close(load_statistic(name)(observation), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("thin", [2, 4])
def test_the_gradient_energy_of_a_long_text_is_estimated_from_every_so_many_th_token(thin):
    whole = draw(0)
    few = load_statistic("gradient_energy")(rows(whole, slice(None, None, thin)))
    found = load_statistic("gradient_energy")(replace(whole, thin=thin))
    scale = len(whole.hidden_TD) / len(whole.hidden_TD[::thin])
    torch.testing.assert_close(found, few * scale)


@given(
    seed=st.integers(0, 10**6), nobody=st.sampled_from([0, 0.4, 1]), candidates=st.sampled_from([1, 2, 3, None]),
    threshold=st.sampled_from([0.0, 0.2, 0.5]),
)  # fmt: skip
def test_tcess_counts_the_best_of_the_chosen(seed, nobody, candidates, threshold):
    observation = draw(seed, nobody=nobody, top_k=3)
    expected, tokens = [0.0] * 5, [0] * 5
    for index_K, logits_E in zip(observation.index_TK.tolist(), observation.logits_TE.double().tolist(), strict=True):
        best = sorted((e for e in index_K if e < 5), key=lambda e: -logits_E[e])[:candidates]
        for expert in best:
            if math.exp(logits_E[expert]) / sum(math.exp(logits_E[e]) for e in best) >= threshold:
                expected[expert] += logits_E[expert]
                tokens[expert] += 1
    options = {"candidates": candidates, "threshold": threshold}
    assert tcess(observation, **options).tolist() == pytest.approx(expected)
    assert tcess_tokens(observation, **options).tolist() == tokens


@given(seed=st.integers(0, 10**6), factor=st.sampled_from([1.0, 0.22, -2.0]))
def test_easy_ep_weighs_tokens_by_how_far_the_routed_experts_turn_the_stream(seed, factor):
    whole = draw(seed, num_tokens=4)
    observation = replace(whole, after_TD=whole.residual_TD + factor * whole.block_output_TD)
    expected = [0.0] * 5
    for token in range(4):
        before_D = observation.residual_TD[token]
        turn = max(1 - cosine(before_D, before_D + factor * observation.output_TD[token]), 0)
        for slot in range(2):
            if (expert := int(observation.index_TK[token, slot])) < 5:
                added = float(observation.weight_TK[token, slot]) * float(observation.norm_TK[token, slot])
                expected[expert] += added * turn
    assert easy_ep(observation).tolist() == pytest.approx(expected)


def test_easy_ep_is_not_measured_where_the_stream_is_not_known():
    observation = draw(0)
    for name in ("residual_TD", "block_output_TD", "after_TD"):
        assert easy_ep(replace(observation, **{name: None})) is None
    normed_TD = observation.residual_TD + torch.nn.functional.layer_norm(observation.block_output_TD, (4,))
    assert easy_ep(replace(observation, after_TD=normed_TD)) is None, "a norm between block and stream"
    attention_TD = 0.1 * torch.ones_like(observation.after_TD)
    assert easy_ep(replace(observation, after_TD=observation.after_TD + attention_TD)) is None, "attention beside it"


def test_every_statistic_loads_and_unknown_ones_get_the_nearest():
    assert all(callable(load_statistic(name)) for name in STATISTICS)
    with pytest.raises(UnknownName, match="unknown statistic 'raep'; did you mean reap"):
        load_statistic("raep")


# --- what is measured ---------------------------------------------------------------------------------------------


def test_what_a_forward_pass_shows_is_measured_when_nothing_is_named():
    assert set(wanted_statistics()) == NAMES
    assert set(wanted_statistics(gradients=True)) == NAMES | {"channel_gradient", "gradient_energy"}
    assert set(STATISTICS) == NAMES | BACKWARD
    assert BACKWARD == GRADIENTS


def test_names_are_put_in_order_once_and_checked():
    assert wanted_statistics(["reap", "usage", "reap"]) == ("usage", "reap")
    assert wanted_statistics(["reap"], gradients=True) == ("reap", "channel_gradient", "gradient_energy")
    assert wanted_statistics([]) == ()
    assert not needs_gradients(wanted_statistics())
    assert all(needs_gradients(["usage", name]) for name in BACKWARD)
    with pytest.raises(UnknownName, match="unknown statistic 'raep'; did you mean reap"):
        wanted_statistics(["usage", "raep"])


@pytest.mark.parametrize("name", sorted(NAMES | BACKWARD))
def test_a_value_is_made_from_the_fields_that_it_names_and_no_others(name):
    whole = draw(0)
    fields = fields_of([name])
    lean = replace(whole, **dict.fromkeys(observation_module.FIELDS - fields))
    torch.testing.assert_close(load_statistic(name)(lean), load_statistic(name)(whole), rtol=0, atol=0)
    for field in fields:
        with pytest.raises(AssertionError):
            load_statistic(name)(replace(whole, **{field: None}))


@pytest.mark.parametrize("field", sorted(observation_module.FIELDS))
def test_a_field_is_filled_only_where_it_is_asked_for(measured, field):
    def seen(**options):
        with torch.no_grad(), observed(measured.model, measured.layers, **options) as observations:
            measured.model(input_ids=measured.token_set.sequences["code"], use_cache=False)
        return observations

    for every, one, none in zip(seen(), seen(fields=[field]), seen(fields=[]), strict=True):
        assert torch.equal(getattr(one, field), getattr(every, field))
        assert [getattr(one, other) for other in observation_module.FIELDS - {field}] == [None] * 3
        assert [getattr(none, other) for other in observation_module.FIELDS] == [None] * 4
        assert torch.equal(none.output_TD, every.output_TD)


def test_a_value_that_one_batch_does_not_show_is_left_out():
    seen, hidden_TD = draw(0), torch.zeros(1, 9, dtype=torch.int64)
    collector = Collector(
        TokenSet(sequences={"a": hidden_TD}, seq_len=9, digest="d"), ("usage", "logit_sum"), seed=0, sample_tokens=4
    )
    collector.add(0, replace(seen, logits_TE=None))
    collector.add(0, seen)
    assert collector.statistics.keys() == {"usage"}
    assert torch.equal(collector.statistics["usage"][0], 2 * load_statistic("usage")(seen))


def test_what_is_measured_by_default_is_what_recipes_and_the_report_read():
    read = {need for name in RECIPES for need in get_recipe(name).needs} | set(needs_of("protect"))
    for recipe in RECIPES.values():
        for router in ROUTERS:
            with suppress(Infeasible):
                read |= {need for name, options in recipe.with_router(router) for need in needs_of(name, **options)}
    sources = "".join(file.read_text(encoding="utf-8") for file in Path(report_package.__file__).parent.glob("*.py"))
    read |= {name for name in STATISTICS if f'"{name}"' in sources}
    assert set(wanted_statistics(gradients=True)) == read
    assert read.isdisjoint(ON_REQUEST)
