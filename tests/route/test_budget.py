"""A number of experts a token, kept: rules from a profile, the command, and what evaluation makes of them."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.errors import InputError, StaleArtifact, UnknownName
from coterie.evaluate.run import evaluate
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.profile.profile import Profile
from coterie.profile.run import profile
from coterie.profile.text import CalibrationText, TextSettings
from coterie.route.apply import routed
from coterie.route.budget import RULES, budget_policy, experts_of, worth_of
from coterie.route.layers import divergences_of, share
from coterie.route.policy import LayerRule, RoutePolicy, uniform_policy
from coterie.route.run import route


@pytest.fixture(scope="module")
def measured(tiny, text, tmp_path_factory) -> Profile:
    return profile(tiny(), tmp_path_factory.mktemp("profile"), text=text, tokens=2048, seq_len=64)


@pytest.mark.parametrize("rule", ["output", "threshold", "share"])
def test_the_mean_is_what_was_asked_for(measured, rule):
    top_k, means = measured.layers[0].top_k, []
    for wanted in torch.linspace(1, top_k, 7).tolist():
        policy = budget_policy(measured, experts_per_token=wanted, rule=rule)
        means.append(experts_of(policy, measured))
        assert means[-1] == pytest.approx(wanted, abs=2 / len(measured.samples[0].index_TK))
        assert policy.experts_per_token == pytest.approx(wanted, abs=0.01)
    assert all((more >= less).all() for less, more in itertools.pairwise(means))


def test_what_is_left_out_is_worth_least(measured):
    """The squares of what is left out add up to no more than with any other rule of the same number."""
    wanted = 1.5
    lost = {}
    for rule in ("output", "threshold", "share"):
        policy, total = budget_policy(measured, experts_per_token=wanted, rule=rule), 0.0
        for number, layer in enumerate(measured.layers):
            sample = measured.samples[number]
            size_E = measured.sum(number, "output_norm") / measured.sum(number, "usage").clamp_min(1)
            chosen_TK, _ = policy.choose(number, sample.index_TK.long(), sample.weight_TK, layer.num_experts)
            is_left_out_TK = chosen_TK == layer.num_experts
            worth_TK = sample.weight_TK.double() * size_E[sample.index_TK.long()]
            total += float((worth_TK.square() * is_left_out_TK).sum())
        lost[rule] = total
    assert lost["output"] <= min(lost.values()) * (1 + 1e-9)


def test_layers_may_have_numbers_of_their_own(measured):
    means = [1.0] * (len(measured.layers) - 1) + [2.0]
    policy = budget_policy(measured, experts_per_token=1.5, means=means)
    assert experts_of(policy, measured).tolist() == pytest.approx(means, abs=0.01)
    with pytest.raises(InputError, match="give one for each"):
        budget_policy(measured, experts_per_token=1.5, means=[1.0])


def test_layers_are_shared_out_as_brute_force_does(measured):
    """Among all numbers of slots of two layers, none costs less."""
    divergences = [0.3, 0.02] + [0.1] * (len(measured.layers) - 2)
    wanted = 1.5
    means = share(measured, divergences, wanted)
    assert sum(means) / len(means) == pytest.approx(wanted, abs=0.01)
    tables, kept = [], []
    for number, divergence in enumerate(divergences):
        square = worth_of(measured, number, "threshold").sort(-1, descending=True).values[:, 1:].square().flatten()
        ordered, tokens = square.sort().values, len(measured.samples[number].index_TK)
        alone = float(ordered[: len(ordered) - round((wanted - 1) * tokens)].sum()) / tokens
        tables.append([divergence / alone * float(ordered[: len(ordered) - n].sum()) / tokens
                       for n in range(len(ordered) + 1)])  # fmt: skip
        kept.append(round((means[number] - 1) * tokens))
    first, second = tables[:2]
    budget = kept[0] + kept[1]
    best = min(
        first[n] + second[budget - n] for n in range(max(0, budget - len(second) + 1), min(budget, len(first) - 1) + 1)
    )
    assert first[kept[0]] + second[kept[1]] == pytest.approx(best, rel=1e-9)


def test_what_layers_need_is_measured_in_the_model(tiny, text, measured, tmp_path):
    """One layer at a time, against whole models that obey the same rule."""
    checkpoint = Checkpoint.open(tiny())
    settings = TextSettings(source=text, tokens=512, seq_len=64)
    policy = budget_policy(measured, experts_per_token=1.0)
    batches = [ids for _, ids in CalibrationText(checkpoint, settings).draw().batches(8)]
    model = load_model(tiny(), dtype=torch.float32)
    first, second = (replace(policy, rules=(*policy.rules[:1], *[LayerRule()] * (len(policy.rules) - 1))), policy)
    expected = []
    for each in (first, second):
        total = 0.0
        for ids in batches:
            with torch.no_grad():
                before = model(ids).logits.double().log_softmax(-1)
                with routed(model, measured.layers, each):
                    after = model(ids).logits.double().log_softmax(-1)
            total += float((before.exp() * (before - after)).sum(-1)[:, :-1].sum())
        expected.append(total / sum(ids[:, 1:].numel() for ids in batches))
    found = divergences_of(checkpoint, measured.layers, [first, second], batches)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    path = tmp_path / "policy.json"
    made = route(tiny(), path, experts_per_token=1.5, profile=measured, text=text, tokens=512, seq_len=64)
    assert made.experts_per_token == pytest.approx(1.5, abs=0.01)
    assert len({rule.threshold for rule in made.rules}) > 1
    assert RoutePolicy.load(path).divergence == made.divergence > 0
    with pytest.raises(InputError, match="leave --text out"):
        route(tiny(), path, experts_per_token=1, profile=measured, rule="fewer", text=text)


def test_what_cannot_be_is_refused(measured):
    with pytest.raises(InputError, match="ask for 1 to"):
        budget_policy(measured, experts_per_token=0.5)
    with pytest.raises(InputError, match=r"whole number of experts, and 1\.5 is none"):
        budget_policy(measured, experts_per_token=1.5, rule="fewer")
    with pytest.raises(UnknownName, match="fewr"):
        budget_policy(measured, experts_per_token=1, rule="fewr")  # type: ignore[arg-type]


def test_evaluation_computes_what_the_policy_leaves(tiny, text, measured, tmp_path):
    """The base stays whole, also where it is the model itself."""
    settings = {"against": tiny(), "text": text, "tokens": 1024, "seq_len": 64}
    top_k = [layer.top_k for layer in measured.layers]
    [plain] = evaluate(tiny(), **settings)
    [same] = evaluate(tiny(), route=uniform_policy(LayerRule(), top_k, experts_per_token=2, origin="all"), **settings)
    assert same.overall["perplexity"] == plain.overall["perplexity"]
    assert same.overall["kl"] == pytest.approx(0, abs=1e-7)
    assert (same.experts_per_token, plain.experts_per_token) == (top_k[0], None)
    path = tmp_path / "policy.json"
    route(tiny(), path, experts_per_token=1.5, profile=measured)
    [card] = evaluate(tiny(), route=path, **settings)
    assert card.overall["kl"] > 1e-6
    assert card.experts_per_token == pytest.approx(1.5, rel=0.1)  # of other text than the profile's
    assert card.base_overall is not None
    assert card.base_overall["perplexity"] == pytest.approx(plain.overall["perplexity"])
    assert card.base_overall["accuracy"] == plain.overall["accuracy"]
    card.save(tmp_path / "card.json")
    assert type(card).load(tmp_path / "card.json") == card
    with pytest.raises(InputError, match="leave one of them out"):
        evaluate(tiny(), route=path, speed_seconds=1.0, **settings)


def test_the_command_writes_a_policy(tiny, measured, tmp_path):
    folder, out = tmp_path / "profile", tmp_path / "policy.json"
    measured.save(folder)

    def run(*words):
        return CliRunner().invoke(app, ["route", str(tiny()), str(out), *map(str, words)])

    done = run("--experts-per-token", 1.5, "--profile", folder)
    assert done.exit_code == 0, done.output
    assert "1.50 experts a token" in done.stdout
    assert RoutePolicy.load(out) == budget_policy(measured, experts_per_token=1.5)
    told = json.loads(run("--experts-per-token", 1, "--profile", folder, "--rule", "fewer", "--json").stdout)
    assert told["experts_per_token"] == 1
    assert RoutePolicy.load(out).rules[0] == LayerRule(most=1)
    assert RULES[0] == "threshold"


def test_a_profile_of_another_model_and_a_name_that_is_no_json_are_refused(tiny, measured, tmp_path):
    measured.save(tmp_path / "profile")
    with pytest.raises(StaleArtifact, match="another model"):
        route(tiny("mixtral"), tmp_path / "p.json", experts_per_token=1, profile=tmp_path / "profile")
    with pytest.raises(InputError, match=r"ends in \.json"):
        route(tiny(), tmp_path / "policy", experts_per_token=1, profile=measured)
    (tmp_path / "p.json").write_text("something else")
    with pytest.raises(Exception, match=r"p\.json"):
        route(tiny(), tmp_path / "p.json", experts_per_token=1, profile=measured)
    assert (tmp_path / "p.json").read_text() == "something else"
