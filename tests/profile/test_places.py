"""Places of the token sample: the same tokens whether a text is drawn from as a whole or in parts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.profile import places as places_module
from coterie.profile.places import chosen_places, lowest


def tokens(rows, *, seq_len=7, values=5, seed=0):
    return torch.randint(values, (rows, seq_len), generator=torch.Generator().manual_seed(seed))


def sampled(ids_NS, count, *, numbers=None, seed=3):
    """Return a sample as a run would collect it; its rows hold what names the token in the whole text."""
    places = chosen_places("code", ids_NS, count=count, seed=seed)
    numbers = torch.arange(len(ids_NS)) if numbers is None else numbers
    width = ids_NS.shape[1]
    place_N2 = torch.stack((numbers[places.position_N // width], places.position_N % width), 1)
    rows = {"place_N2": place_N2, "domain_T": torch.zeros(len(place_N2), dtype=torch.int64)}
    return lowest(rows | {"priority_T": places.priority_N}, [count])


def joined(one, two, count):
    return lowest({name: torch.cat((one[name], two[name])) for name in one}, [count])


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 12), cut=st.integers(0, 12), count=st.integers(1, 60),
    values=st.sampled_from([1, 2, 1000]),
)  # fmt: skip
def test_two_halves_have_the_sample_of_the_whole(seed, rows, cut, count, values):
    # With one value all sequences are the same token for token, with two some are.
    ids_NS = tokens(rows, seq_len=4, values=values, seed=seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    whole = sampled(ids_NS, count)
    parts = [sampled(ids_NS[chosen], count, numbers=chosen) for chosen in (order[:cut], order[cut:]) if len(chosen)]
    merged = parts[0] if len(parts) == 1 else joined(*parts, count)
    assert equal(merged, whole)
    assert equal(merged if len(parts) == 1 else joined(*parts[::-1], count), whole)
    assert len(whole["place_N2"]) == min(count, ids_NS.numel())


def test_blocks_do_not_matter(monkeypatch):
    ids_NS = tokens(30)
    whole = chosen_places("code", ids_NS, count=20, seed=0)
    monkeypatch.setattr(places_module, "_BLOCK", 4)
    found = chosen_places("code", ids_NS, count=20, seed=0)
    assert torch.equal(found.position_N, whole.position_N)
    assert torch.equal(found.priority_N, whole.priority_N)


def test_the_chosen_have_lower_priorities_than_all_others():
    ids_NS = tokens(40, values=10**6)
    every = chosen_places("code", ids_NS, count=10**9, seed=0)
    assert every.position_N.tolist() == list(range(280))
    assert len(set(every.priority_N.tolist())) == 280
    assert every.priority_N.min() >= 0
    few = chosen_places("code", ids_NS, count=31, seed=0)
    expected = every.priority_N.sort().indices[:31].sort().values
    assert torch.equal(few.position_N, expected)
    assert torch.equal(few.priority_N, every.priority_N[expected])


def test_seed_domain_text_and_position_decide():
    ids_NS = tokens(1, values=10**6)
    base = chosen_places("code", ids_NS, count=100, seed=0).priority_N.tolist()
    other = ids_NS.clone()
    other[0, -1] += 1
    for found in (
        chosen_places("code", ids_NS, count=100, seed=1),
        chosen_places("prose", ids_NS, count=100, seed=0),
        chosen_places("code", other, count=100, seed=0),
    ):
        assert not set(found.priority_N.tolist()) & set(base)
    again = chosen_places("code", torch.cat((tokens(3, seed=9), ids_NS)), count=100, seed=0)
    assert again.priority_N[-7:].tolist() == base, "what stands around it does not"


def test_places_are_spread_evenly():
    # 100 of 4,000 sequences of 16 tokens: each position and each quarter of the text is as likely as another.
    places = chosen_places("code", tokens(4000, seq_len=16, values=10**6), count=6400, seed=0)
    by_position = torch.bincount(places.position_N % 16, minlength=16)
    by_quarter = torch.bincount(places.position_N // 16000, minlength=4)
    assert by_position.sum() == 6400
    assert (by_position - 400).abs().max() < 5 * 20, "five standard deviations of a count of 400"
    assert (by_quarter - 1600).abs().max() < 5 * 35


def test_domains_are_kept_apart_and_in_order():
    rows = {
        "domain_T": torch.tensor([1, 0, 1, 0, 0]),
        "priority_T": torch.tensor([4, 9, 2, 7, 8]),
        "row_T": torch.arange(5),
    }
    assert lowest(rows, [2, 5])["row_T"].tolist() == [3, 4, 2, 0]
    assert lowest(rows, [1, 1])["row_T"].tolist() == [3, 2]


def test_between_equal_priorities_the_bytes_decide_and_not_the_order():
    rows = {
        "domain_T": torch.zeros(3, dtype=torch.int64),
        "priority_T": torch.tensor([5, 5, 1]),
        "value_T": torch.tensor([[1.0, 2.0], [1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16),
    }
    order = torch.tensor([1, 2, 0])
    one, two = lowest(rows, [2]), lowest({name: tensor[order] for name, tensor in rows.items()}, [2])
    assert equal(one, two)
    assert one["priority_T"].tolist() == [1, 5]
