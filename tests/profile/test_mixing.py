"""Mixing sources: weights become tokens, equal weights change nothing, and a mix is chosen by what sources are."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from coterie.errors import InputError, StaleArtifact, TextError, UnknownName
from coterie.journal import Run
from coterie.profile.calibration import TokenSet, tokenize
from coterie.profile.information import Information
from coterie.profile.mixing import (
    MAX_PERPLEXITY_RATIO,
    MAX_TILT,
    MIN_NOVELTY_RATIO,
    choose_mix,
)
from coterie.profile.profile import Profile
from coterie.profile.run import profile
from coterie.profile.shares import checked_weights, parse_domains, shares
from coterie.testing import tiny_text, tiny_tokenizer

positive = st.floats(1e-6, 1e6)


# --- weights as they are written ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("math", {"math": 1}),
        ("math,python", {"math": 1, "python": 1}),
        ("math=2,python=1", {"math": 2, "python": 1}),
        (" math = 2 , python ", {"math": 2, "python": 1}),
        ("math=0.5,python=1e1,c=0", {"math": 0.5, "python": 10, "c": 0}),
        ("math,,math,", {"math": 1}),
        ("a=b=3", {"a=b": 3}),
        ("", {}),
        (" , ", {}),
        ("math=-1", {"math": -1}),  # refused where it is used
    ],
)
def test_domains_are_read_with_their_weights(text, weights):
    assert parse_domains(text) == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("math=two", r"'two', the weight in 'math=two', is not a number; write math=2"),
        ("math=", r"'', the weight in 'math=', is not a number"),
        ("math=2,=1", r"'=1' names no domain"),
        ("math=1,python,math=2", r"domain 'math' has two weights, 1 and 2"),
    ],
)
def test_domains_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_domains(text)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"math": -1.0}, "the weight of domain 'math' is -1; a weight is 0 or more"),
        ({"math": math.nan}, "is nan; give a finite number"),
        ({"math": math.inf}, "is inf; give a finite number"),
        ({"math": "2"}, "is '2'; give a finite number"),
        ({"math": True}, "is True; give a finite number"),
        ({"math": 0, "python": 0.0}, r"all weights are 0 \(math, python\)"),
    ],
)
def test_weights_that_share_nothing_out_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        checked_weights(weights)


def test_a_weight_of_zero_is_no_share():
    assert checked_weights({"a": 2, "b": 0, "c": 0.5}) == {"a": 2, "c": 0.5}
    assert checked_weights({}) == {}


# --- from weights to tokens ---------------------------------------------------------------------------------------


@given(
    total=st.integers(0, 10**9),
    weights=st.lists(positive, min_size=1, max_size=6),
    step=st.integers(1, 4096),
    scale=st.sampled_from([0.25, 1.0, 64.0]),
)
def test_shares_are_proportional(total, weights, step, scale):
    found = shares(total, weights, step=step)
    for count, weight in zip(found, weights, strict=True):
        exact = Fraction(total) * Fraction(weight) / sum(map(Fraction, weights)) / step
        assert count == max(1, count)
        assert abs(count - exact) <= Fraction(1, 2) or (count == 1 and exact < 1)
    assert shares(total, [weight * scale for weight in weights], step=step) == found, "in any unit"


@given(tokens=st.integers(1, 10**7), count=st.integers(1, 30), seq_len=st.integers(2, 4096), weight=positive)
@example(tokens=3 * 512 * 7, count=14, seq_len=512, weight=0.1)  # a tie
def test_equal_weights_are_equal_shares(tokens, count, seq_len, weight):
    expected = max(1, round(tokens / count / seq_len))
    assert shares(tokens, [weight] * count, step=seq_len) == [expected] * count
    token_set = TokenSet(sequences={str(index): torch.zeros(1, 2) for index in range(count)}, seq_len=2, digest="")
    assert token_set.share_out(tokens) == [max(1, tokens // count)] * count


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("mixed"), domains=("a", "b", "code"), documents=3)


def cut(folder, **options):
    return tokenize(tiny_tokenizer(), folder, **{"seq_len": 16, "tokens": 960} | options)


@given(
    weights=st.dictionaries(st.sampled_from("ab"), st.integers(0, 5), min_size=1),
    small=st.integers(1, 2000),
    large=st.integers(1, 2000),
    seed=st.integers(0, 9),
)
@settings(max_examples=20)
def test_tokens_are_shared_by_weight_and_more_contain_fewer(mixed, weights, small, large, seed):
    assume(any(weights.values()))
    small, large = sorted((small, large))
    few, many = (cut(mixed, tokens=tokens, weights=weights, seed=seed) for tokens in (small, large))
    named = sorted(domain for domain, weight in weights.items() if weight)
    assert list(few.domains) == named == list(many.domains)
    for wanted, found in ((small, few), (large, many)):
        for domain in named:
            exact = Fraction(wanted * weights[domain], sum(weights.values()) * 16)
            assert len(found.sequences[domain]) == max(1, round(exact))
    for domain in named:
        assert torch.equal(many.sequences[domain][: len(few.sequences[domain])], few.sequences[domain])


def test_equal_weights_draw_the_very_same(mixed):
    plain, two = cut(mixed), cut(mixed, domains=("a", "code"))
    same = [
        (plain, cut(mixed, weights={"a": 0.1, "b": 0.1, "code": 0.1})),
        (two, cut(mixed, weights={"code": 7, "a": 7})),
        (two, cut(mixed, weights={"code": 2, "b": 0, "a": 2.0})),
    ]
    for one, other in same:
        assert one.digest == other.digest
        assert one.domains == other.domains
        assert all(torch.equal(one.sequences[domain], other.sequences[domain]) for domain in one.domains)
        assert other.weights is None
    uneven = cut(mixed, weights={"a": 1, "b": 1, "code": 2})
    assert uneven.weights == {"a": 1, "b": 1, "code": 2}
    assert uneven.digest != plain.digest


def test_a_domain_that_has_too_little_gives_all_it_has(mixed, caplog):
    everything = cut(mixed, tokens=None).num_tokens
    found = cut(mixed, tokens=3 * everything["a"], weights={"a": 9, "b": 1})
    assert found.num_tokens["a"] == everything["a"]
    assert found.num_tokens["b"] == round(0.3 * everything["a"] / 16) * 16
    [record] = caplog.records
    assert record.getMessage().startswith(f"domain a has {everything['a']} of the ")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": {"a": 1, "aa": 0}}, UnknownName, "unknown domain 'aa'"),
        ({"weights": {}}, TextError, "none of the domains a, b, code was asked for"),
        ({"weights": {"a": 0}}, InputError, "all weights are 0"),
        ({"weights": {"a": -2, "b": 1}}, InputError, "is -2; a weight is 0 or more"),
        ({"weights": {"a": 1}, "domains": ("a",)}, InputError, "give tokens, and no domains"),
        ({"weights": {"a": 1}, "tokens": None}, InputError, "give tokens, and no domains"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(mixed, options, error, message):
    with pytest.raises(error, match=message):
        cut(mixed, **options)


# --- what weights do to a profile ---------------------------------------------------------------------------------


SMALL = {"tokens": 512, "seq_len": 16, "sample_tokens": 64}


def test_weights_act_on_statistics_and_sample(tiny, text):
    plain = profile(tiny(), text=text, **SMALL)
    mix = profile(tiny(), text=text, weights={"prose": 3, "code": 1}, **SMALL)
    assert dict(zip(mix.domains, mix.num_tokens, strict=True)) == {"code": 128, "prose": 384}
    assert mix.statistics[0]["usage"].sum(1).tolist() == [2 * 128, 2 * 384], "top 2"
    domains = mix.samples[0].domain_T
    assert [(domains == domain).sum().item() for domain in (0, 1)] == [16, 48]
    domains = plain.samples[0].domain_T
    assert [(domains == domain).sum().item() for domain in (0, 1)] == [32, 32]


def test_a_run_goes_on_only_with_the_same_weights(tiny, text, tmp_path, monkeypatch):
    # Both domains are used up by either mix, so the tokens are the same; the samples would not be.
    short = tiny_text(tmp_path / "text", documents=1)
    options = {"text": short, "tokens": 10**5, "seq_len": 64, "sample_tokens": 64}
    finish = Run.finish

    def stop(self, name, **content):
        finish(self, name, **content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            profile(tiny(), tmp_path / "out", weights={"prose": 2, "code": 1}, **options)
    with pytest.raises(StaleArtifact, match="weights"):
        profile(tiny(), tmp_path / "out", weights={"prose": 3, "code": 1}, **options)
    whole = profile(tiny(), tmp_path / "out", weights={"prose": 2, "code": 1}, **options)
    assert Profile.load(tmp_path / "out").digest() == whole.digest()


# --- the choice of a mix ------------------------------------------------------------------------------------------


def source(domain, perplexity=10.0, aggregation=0.2):
    return Information(
        domain=domain, tokens=512, loss=math.log(perplexity), aggregation=aggregation, diversity=0.5, entropy=4.0
    )


def mean_loss(sources, weights):
    by_name = {each.domain: each.loss for each in sources}
    return sum(by_name[name] * weight for name, weight in weights.items()) / sum(weights.values())


def test_equal_sources_share_equally():
    weights, dropped = choose_mix([source(name) for name in "abcd"])
    assert weights == dict.fromkeys("abcd", 0.25)
    assert dropped == {}
    assert choose_mix([source("only", 3.0, 0.9)]) == ({"only": 1.0}, {})


def test_new_4_grams_are_what_a_source_adds():
    weights, _ = choose_mix([source("a", aggregation=0.0), source("b", aggregation=0.5), source("c", aggregation=0.5)])
    assert weights == {"a": 0.5, "b": 0.25, "c": 0.25}


def test_perplexity_is_balanced_between_the_easiest_and_the_hardest():
    sources = [source("math", 2.0), source("b", 16.0), source("c", 20.0), source("d", 25.0)]
    weights, _ = choose_mix(sources)
    assert weights["math"] > 0.25 > weights["d"]
    even = dict.fromkeys(weights, 1.0)
    middle = (math.log(2.0) + math.log(25.0)) / 2
    assert abs(mean_loss(sources, weights) - middle) < abs(mean_loss(sources, even) - middle)
    balanced, _ = choose_mix([source("a", 2.0), source("b", 6.0), source("c", 8.0)])
    assert mean_loss([source("a", 2.0), source("b", 6.0), source("c", 8.0)], balanced) == pytest.approx(
        math.log(4.0), abs=2e-3
    )


perplexities = st.floats(1.1, 50.0)


@given(
    facts=st.lists(st.tuples(perplexities, st.floats(0.0, 0.6)), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
)
def test_a_mix_is_balanced_or_tilted_as_far_as_is_allowed(facts, order):
    sources = [source(f"d{index}", *fact) for index, fact in enumerate(facts)]
    weights, dropped = choose_mix(sources)
    assert weights.keys() | dropped.keys() == {each.domain for each in sources}
    assert not weights.keys() & dropped.keys()
    assert sum(weights.values()) == pytest.approx(1, abs=0.001 * len(weights))
    kept = [each for each in sources if each.domain in weights]
    low, high = min(each.loss for each in kept), max(each.loss for each in kept)
    tilts = {each.domain: weights[each.domain] / (1 - each.aggregation) for each in kept}
    assert max(tilts.values()) / min(tilts.values()) <= MAX_TILT**2 * 1.1
    balanced = mean_loss(kept, weights) == pytest.approx((low + high) / 2, abs=0.01 * (high - low) + 1e-9)
    at_bound = max(tilts.values()) / min(tilts.values()) >= MAX_TILT**2 * 0.9
    assert balanced or at_bound
    shuffled = order.sample(sources, len(sources))
    assert choose_mix(shuffled)[0] == pytest.approx(weights, abs=0.0015)


def test_noise_and_loops_are_left_out_with_a_reason():
    usual = [source("a", 5.0, 0.2), source("b", 8.0, 0.2), source("c", 2.0, 0.3)]
    limit = MAX_PERPLEXITY_RATIO * 6.5
    weights, dropped = choose_mix([*usual, source("noise", 300.0, 0.0), source("loop", 1.1, 0.95)])
    assert weights.keys() == {"a", "b", "c"}
    assert dropped["noise"] == "its perplexity is 60 times the median: noise to this model"
    assert dropped["loop"] == "95.0% of its 4-grams are repeats, where the median is 20.0%"
    assert choose_mix([*usual, source("hard", limit * 0.9)])[1] == {}, "hard, but not noise"
    usual.append(source("d"))  # the median of what is new is then 0.8
    near = 1 - MIN_NOVELTY_RATIO * 0.8
    assert choose_mix([*usual, source("x", 5.0, near - 0.01)])[1] == {}
    assert choose_mix([*usual, source("x", 5.0, near + 0.01)])[1].keys() == {"x"}


def test_when_no_source_is_left_all_reasons_are_told():
    with pytest.raises(TextError, match=r"fit for calibration: a: .* repeats.*; b: its perplexity is 14\.1 times"):
        choose_mix([source("a", 1.0, 0.99), source("b", 200.0, 0.0)])
    with pytest.raises(TextError, match=r"100\.0% of its 4-grams are repeats"):
        choose_mix([source("a", 1.0, 1.0)])


def test_losses_beyond_all_floats_are_noise_too():
    hopeless = Information(domain="x", tokens=9, loss=5000.0, aggregation=0.0, diversity=1.0, entropy=1.0)
    assert "inf times the median" in choose_mix([source("a"), source("b"), hopeless])[1]["x"]
