"""Policies against references that keep all of the past and look at everything anew, and replays."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import InputError, UnknownName
from coterie.run.policies import HALF_LIFE, POLICIES, Decay, EdgeMoe, Follow, Lcu, policy_named, shape_of
from coterie.run.replay import replay, replay_each, waves

LAYERS, EXPERTS = 3, 5


@st.composite
def traces(draw, max_steps=12, max_chosen=3):
    """Tokens that go through all layers, each of which asks for some experts."""
    steps = draw(st.integers(1, max_steps))
    chosen = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=max_chosen, unique=True)
    return [(step, layer, tuple(draw(chosen))) for step in range(steps) for layer in range(LAYERS)]


#: Reference: what came before (a list of (step, layer, expert)), and a key -> what the key is worth.


def uses(past, key):
    return [(step, place) for place, (step, *other) in enumerate(past) if tuple(other) == key]


def lru(past, key):
    return max((place for _, place in uses(past, key)), default=-1)


def lfu(past, key):
    return len(uses(past, key)), lru(past, key)


def decay(past, key):
    now = past[-1][0]
    return round(sum(0.5 ** ((now - step) / HALF_LIFE) for step, _ in uses(past, key)), 9)


def follow(past, key):
    layer, expert = key
    tokens = {}  # what the tokens that the layer has seen chose, one after the other
    for step, place, chosen in past:
        if place == layer:
            tokens.setdefault(step, set()).add(chosen)
    chosen = list(tokens.values())
    if not any(expert in each for each in chosen):
        return -1e300
    now = max(tokens)
    rate = sum(0.5 ** ((now - step) / HALF_LIFE) for step, _ in uses(past, key)) * math.log(2) / HALF_LIFE
    share = (sum(expert in each for each in chosen) + 0.5) / (len(chosen) + 2)
    guess = rate
    for other in chosen[-1]:
        behind = [after for before, after in itertools.pairwise(chosen) if other in before]
        after = (sum(expert in each for each in behind) + 2 * share) / (len(behind) + 2)
        guess *= (after / share) ** 0.5
    part = ((layer - past[-1][1] - 1) % LAYERS) / LAYERS
    return -round(1 / (rate + min(1, guess)) + part, 4)


def distance(past, key):
    return (key[0] - past[-1][1] + LAYERS) % LAYERS + 0.1


def lcu(past, key):
    now = past[-1][0]
    used_last = any(step == now - 1 for step, _ in uses(past, key))
    return round(len(uses(past, key)) / (now + 1) + (1 / distance(past, key) if used_last else 0), 9)


def edgemoe(past, key):
    return round(len(uses(past, key)) / distance(past, key), 9)


REFERENCES = {"follow": follow, "lru": lru, "lfu": lfu, "decay": decay, "lcu": lcu, "edgemoe": edgemoe}


def slow_replay(trace, slots, worth):
    """Return the hits, and who went for whom."""
    past, resident, hits, evicted = [], set(), 0, []
    for step, layer, experts in trace:
        past += [(step, layer, expert) for expert in experts]
        asked = [(layer, expert) for expert in experts]
        hits += len(resident.intersection(asked))
        for key in [key for key in asked if key not in resident]:
            if len(resident) == slots:
                victim = min(sorted(resident - set(asked)), key=lambda other: worth(past, other))
                resident.remove(victim)
                evicted.append(victim)
            resident.add(key)
    return hits, evicted


@pytest.mark.parametrize("name", REFERENCES)
@given(trace=traces(), slots=st.integers(3, 10))
def test_a_policy_does_what_its_definition_says(name, trace, slots):
    assert replay(trace, slots, name) == slow_replay(trace, slots, REFERENCES[name])[0]


@pytest.mark.parametrize("name", REFERENCES)
@given(trace=traces())
def test_a_policy_ranks_all_experts_as_its_definition_does(name, trace):
    policy = policy_named(name, (LAYERS, EXPERTS))
    past = []
    for step, layer, experts in trace:
        policy.touch(layer, experts, step)
        past += [(step, layer, expert) for expert in experts]
    keys = list(itertools.product(range(LAYERS), range(EXPERTS)))
    worth = policy.worth()
    expected = [REFERENCES[name](past, key) for key in keys]
    # Floating point may tell apart what is equal: equals may come in any order.
    ranked = [expected[number] for number in np.argsort(worth.ravel(), kind="stable")]
    assert ranked == sorted(expected)


def most_hits(trace, slots):
    """Try everything that could go."""

    @functools.cache
    def best(position, resident):
        if position == len(trace):
            return 0
        _, layer, experts = trace[position]
        asked = frozenset((layer, expert) for expert in experts)
        num_out = max(0, len(resident | asked) - slots)
        others = itertools.combinations(sorted(resident - asked), num_out)
        return len(resident & asked) + max(best(position + 1, (resident | asked) - set(out)) for out in others)

    return best(0, frozenset())


@given(trace=traces(max_steps=5, max_chosen=2), slots=st.integers(2, 5))
def test_belady_has_as_many_hits_as_there_can_be(trace, slots):
    assert replay(trace, slots, "belady") == most_hits(trace, slots)


@given(trace=traces(max_steps=30), slots=st.integers(3, 14))
def test_nobody_has_more_hits_than_belady(trace, slots):
    hits = {name: replay(trace, slots, name) for name in POLICIES}
    assert max(hits.values()) == hits["belady"]


@given(trace=traces(), name=st.sampled_from(sorted(POLICIES)))
def test_with_a_slot_for_everybody_each_misses_once(trace, name):
    asked = [(layer, expert) for _, layer, experts in trace for expert in experts]
    assert replay(trace, LAYERS * EXPERTS, name) == len(asked) - len(set(asked))


def test_who_knows_when_to_let_go_has_more_hits():
    # A loop one longer than memory: least recently used has no hit at all, the bound is known.
    trace = [(step, 0, (step % 4,)) for step in range(40)]
    assert replay(trace, 3, "lru") == 0
    assert replay(trace, 3, "belady") == most_hits(tuple(trace), 3) >= 24


def test_decay_forgets_with_its_half_life():
    policy = Decay((1, 4))
    policy.touch(0, [0, 3], 0)
    policy.touch(0, [3], 0)
    policy.touch(0, [1], 19)
    assert policy.worth()[0, 3] > policy.worth()[0, 1], "two uses, 19 tokens ago, are still more than one now"
    policy.touch(0, [2], 21)
    assert policy.worth()[0, 3] < policy.worth()[0, 2], "and less after 21 tokens"
    assert policy.victims(np.array([[True, True, True, False]]), 2) == [(0, 0), (0, 1)]


def test_decay_counts_after_a_million_steps():
    policy = Decay((1, 3))
    for step in (0, 10**6, 10**6 + 1):
        policy.touch(0, [0], step)
    policy.touch(0, [1], 10**6 + 1)
    worth = policy.worth()[0]
    assert worth[0] - worth[1] == pytest.approx(np.log2(1 + 0.5 ** (1 / HALF_LIFE)))
    assert worth[2] == -np.inf


def test_lcu_by_hand():
    # Three layers; two tokens have passed, the third is at layer 1.
    policy = Lcu((3, 4))
    for layer, experts in [(0, [0]), (1, [0]), (2, [0])]:
        policy.touch(layer, experts, 7)
    for layer, experts in [(0, [1]), (1, [0]), (2, [2])]:
        policy.touch(layer, experts, 8)
    policy.touch(0, [3], 9)
    policy.touch(1, [3], 9)
    expected = [
        [1 / 3, 1 / 3 + 1 / 2.1, 0, 1 / 3],  # its layer comes last, expert 1 was used by the last token
        [2 / 3 + 1 / 0.1, 0, 0, 1 / 3],  # the layer that asks
        [1 / 3, 0, 1 / 3 + 1 / 1.1, 0],  # its layer comes next
    ]
    np.testing.assert_allclose(policy.worth(), expected)


def test_edgemoe_lets_go_what_is_farther_away():
    # What the text of the paper says; the formula as printed would let go layer 2, which comes next.
    policy = EdgeMoe((4, 2))
    for layer in range(4):
        policy.touch(layer, [0], 0)
    policy.touch(0, [0], 1)
    policy.touch(1, [0], 1)
    policy.touch(0, [1], 1)
    policy.touch(1, [1], 1)
    np.testing.assert_allclose(policy.worth()[:, 0], [2 / 3.1, 2 / 0.1, 1 / 1.1, 1 / 2.1])
    may_go = np.zeros((4, 2), dtype=bool)
    may_go[[2, 3], 0] = True
    assert policy.victims(may_go, 2) == [(3, 0), (2, 0)]


@st.composite
def chunks(draw, max_tokens=9, max_chosen=3):
    """What tokens choose in each layer, and where chunks of them end."""
    chosen = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=max_chosen)
    tokens = draw(st.lists(st.tuples(*[chosen] * LAYERS), min_size=1, max_size=max_tokens))
    ends = draw(st.sets(st.integers(1, len(tokens)))) | {len(tokens)}
    return tokens, [0, *sorted(ends)]


@pytest.mark.parametrize("name", ["follow", "decay", "lfu", "edgemoe"])
@given(given=chunks())
def test_a_chunk_counts_as_its_tokens_one_by_one(name, given):
    tokens, bounds = given
    whole, single = (policy_named(name, (LAYERS, EXPERTS)) for _ in range(2))
    for start, stop in itertools.pairwise(bounds):
        for layer in range(LAYERS):
            places = {}
            for place, chosen in enumerate(tokens[start:stop]):
                single.touch(layer, sorted(chosen[layer]), start + place)
                for expert in chosen[layer]:
                    places.setdefault(expert, []).append(place)
            whole.touch(layer, list(places), start, list(places.values()))
    if name == "lfu":  # of equals the one that was used last is worth more, within a layer
        np.testing.assert_array_equal(np.floor(whole.worth()), np.floor(single.worth()))
    else:
        np.testing.assert_allclose(whole.worth(), single.worth(), rtol=1e-5)


def test_the_least_recent_of_a_chunk_is_the_one_that_no_late_token_chose():
    policy = policy_named("lru", (1, 4))
    policy.touch(0, [0, 1, 2], 0, [[0, 3], [2], [1]])
    assert policy.worth()[0].argsort().tolist() == [3, 2, 1, 0]


def test_follow_keeps_what_follows_what_is_chosen_now():
    # Expert 2 follows 0 and expert 3 follows 1, each as often and as lately as the other: decay cannot tell them apart.
    policy = Follow((1, 4))
    for step in range(0, 80, 2):
        first = step // 2 % 2
        policy.touch(0, [first], step)
        policy.touch(0, [2 + first], step + 1)
    for first, after in ((0, 2), (1, 3)):
        policy.touch(0, [first], 80 + first)
        worth = policy.worth()[0]
        assert worth[after] == max(worth[2:]), first


def test_follow_says_what_it_takes_of_memory():
    assert Follow.num_bytes((3, 5)) == Follow((3, 5))._follows_LEE.nbytes
    assert Decay.num_bytes((3, 5)) == 0


def test_the_default_is_follow():
    trace = [(step, 0, (step * step % 7, 7)) for step in range(50)]
    assert replay(trace, 4) == replay(trace, 4, "follow")
    assert next(iter(POLICIES)) == "follow"


def test_an_unknown_policy_is_refused():
    with pytest.raises(UnknownName, match="did you mean"):
        policy_named("lruu", (1, 1))
    with pytest.raises(UnknownName, match="policy 'random'"):
        replay([(0, 0, (0,))], 1, "random")


def test_belady_needs_the_trace_and_holds_to_it():
    with pytest.raises(InputError, match="needs a trace"):
        policy_named("belady", (1, 1))
    policy = policy_named("belady", (1, 2), [(0, 0, (1,))])
    with pytest.raises(InputError, match="entry 0 of the trace"):
        policy.touch(0, [0], 0)
    policy.touch(0, [1], 0)
    with pytest.raises(InputError, match="entry 1 of the trace is None"):
        policy.touch(0, [1], 1)


def test_more_at_once_than_there_are_slots_comes_in_waves_of_which_the_first_is_in_memory():
    assert waves([0, 1, 2, 3], [False, True, False, True], 4) == [[0, 1, 2, 3]]
    assert waves([0, 1, 2, 3, 4], [False, True, False, False, True], 4) == [[1, 4], [0, 2], [3]]
    assert waves([0, 1], [False, True], 1) == [[1], [0]]
    # Of five, memory holds four: each pass finds again those that the last waves of the one before left.
    assert replay_each([(step, 0, range(5)) for step in range(3)], 4) == [0, 4, 4]


def test_shapes_come_from_the_largest_numbers():
    assert shape_of([(3, 1), (0, 7)]) == (4, 8)
    assert replay([], 2) == 0
