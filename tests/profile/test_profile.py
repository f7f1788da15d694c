"""The Profile as an artefact and as a sum: what is saved comes back, and what does not belong together is refused."""

import json
from dataclasses import replace

import pytest
import torch

from coterie.errors import CorruptArtifact, StaleArtifact, UnknownName
from coterie.model.arch.layers import MoELayer
from coterie.profile.profile import FILE, Profile, Sample, _LayerFiles, layer_file, summed
from coterie.profile.sums import Totals


def layer(index, **facts):
    defaults = {
        "block": f"model.layers.{index}.mlp",
        "experts": f"model.layers.{index}.mlp.experts",
        "router": f"model.layers.{index}.mlp.gate",
        "router_tensors": ((f"model.layers.{index}.mlp.gate.weight", 0), (f"model.layers.{index}.mlp.gate.bias", 1)),
        "num_experts": 4,
        "top_k": 2,
        "width": 3,
        "hidden_size": 5,
        "num_groups": 2,
    }
    return MoELayer(index=index, **(defaults | facts))


def sample(seed, *, tokens=6, logits=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return Sample(
        inputs_TD=normal(tokens, 5).to(torch.bfloat16),
        index_TK=torch.randint(5, (tokens, 2), generator=generator),
        weight_TK=normal(tokens, 2),
        logits_TE=normal(tokens, 4) if logits else None,
        output_TD=normal(tokens, 5).to(torch.bfloat16),
        domain_T=torch.arange(tokens) % 2,
        priority_T=torch.randperm(1000, generator=generator)[:tokens] + 1000 * seed,
    )


def make(seed=0, *, logits=True, **changes):
    generator = torch.Generator().manual_seed(seed)

    def statistics():
        return {
            "tokens": torch.tensor([10.0, 20.0], dtype=torch.float64),
            "usage": torch.rand(2, 4, generator=generator, dtype=torch.float64),
            "logit_product": torch.randn(2, 4, 4, generator=generator, dtype=torch.float64),
        }

    fields = {
        "model_digest": "m" * 64,
        "text_digest": f"{seed}" * 64,
        "domains": ("code", "größe.v2"),
        "num_tokens": (10, 20),
        "seq_len": 7,
        "seed": 3,
        "layers": (layer(0), layer(1, router=None, num_groups=1)),
        "statistics": (statistics(), statistics()),
        "samples": (sample(seed, logits=logits), sample(seed + 100, logits=logits)),
        "sample_counts": (4, 5),
        "thin": 2 + seed,
        "asked": ("tokens", "usage", "logit_product"),
    }
    return Profile(**(fields | changes))


def assert_same(one, two):
    for name in ("model_digest", "text_digest", "domains", "num_tokens", "seq_len", "seed", "layers", "thin"):
        assert getattr(one, name) == getattr(two, name), name
    for name in ("sample_counts", "asked"):
        assert getattr(one, name) == getattr(two, name), name
    for a, b in zip(one.statistics, two.statistics, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    for first, second in zip(one.samples, two.samples, strict=True):
        a, b = first.tensors(), second.tensors()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("logits", [True, False])
def test_saved_and_loaded_is_the_same(tmp_path, logits):
    profile = make(logits=logits)
    path = profile.save(tmp_path / "run" / "profile")
    assert path == tmp_path / "run" / "profile" / FILE
    loaded = Profile.load(path.parent)
    assert_same(loaded, profile)
    assert (loaded.samples[0].logits_TE is not None) == logits
    assert isinstance(loaded.layers[0].router_tensors[0], tuple), "facts compare equal after a round trip"
    assert_same(Profile.load(str(path.parent), model_digest="m" * 64, text_digest="0" * 64), profile)


def test_equal_profiles_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        make().save(tmp_path / name)
    for file in ("profile.json", layer_file(0), layer_file(1)):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_file_says_in_words_what_it_holds(tmp_path):
    document = json.loads(make().save(tmp_path).read_text(encoding="utf-8"))
    assert document["kind"] == "profile"
    assert document["inputs"] == {"model": "m" * 64, "text": "0" * 64}
    assert document["body"]["domains"] == ["code", "größe.v2"]
    assert document["body"]["num_tokens"] == [10, 20]
    assert document["body"]["layers"][1]["block"] == "model.layers.1.mlp"


def test_a_profile_of_another_model_or_text_is_stale(tmp_path):
    make().save(tmp_path)
    with pytest.raises(StaleArtifact, match="made from another model"):
        Profile.load(tmp_path, model_digest="x" * 64)
    with pytest.raises(StaleArtifact, match="made from another text"):
        Profile.load(tmp_path, text_digest="x" * 64)


def test_a_place_without_a_profile(tmp_path):
    with pytest.raises(CorruptArtifact, match=r"profile\.json does not exist"):
        Profile.load(tmp_path)
    path = make().save(tmp_path)
    with pytest.raises(CorruptArtifact, match="does not exist"):
        Profile.load(path)  # the file where its folder belongs
    layer = tmp_path / layer_file(1)
    damaged = bytearray(layer.read_bytes())
    damaged[-1] ^= 1
    layer.write_bytes(damaged)
    found = Profile.load(tmp_path)
    assert found.statistics[0].keys() == make().statistics[0].keys()
    with pytest.raises(CorruptArtifact, match=layer_file(1)):
        _ = found.samples[1]
    layer.unlink()
    with pytest.raises(CorruptArtifact, match=rf"{layer_file(1)} is missing"):
        Profile.load(tmp_path)


def test_the_digest_is_that_of_the_content(tmp_path):
    one, two = make(), make()
    assert one.digest() == two.digest()
    assert one.digest() != make(1).digest()
    one.save(tmp_path / "a")
    two.save(tmp_path / "b")
    assert Profile.load(tmp_path / "a").digest() == Profile.load(tmp_path / "b").digest()


def test_sums_and_domains():
    profile = make()
    held = profile.statistics[1]["logit_product"]
    assert torch.equal(profile.by_domain(1, "logit_product"), held)
    assert torch.equal(profile.sum(1, "logit_product"), held[0] + held[1])
    assert profile.sum(0, "tokens").item() == 30
    for ask in (profile.sum, profile.by_domain):
        with pytest.raises(UnknownName, match="unknown statistic 'usages'; did you mean usage"):
            ask(0, "usages")


def test_profiles_of_two_texts_add_up():
    one, two = make(0), make(1, num_tokens=(1, 2))
    both = one.merge(two)
    assert both.num_tokens == (11, 22)
    assert both.domains == one.domains
    assert both.model_digest == one.model_digest
    assert both.text_digest not in (one.text_digest, two.text_digest)
    for index in range(2):
        for name in ("tokens", "usage", "logit_product"):
            expected = one.statistics[index][name] + two.statistics[index][name]
            assert torch.equal(both.by_domain(index, name), expected)
        rows = [
            (domain, priority, each, row)
            for each in (one, two)
            for row, (domain, priority) in enumerate(
                zip(each.samples[index].domain_T.tolist(), each.samples[index].priority_T.tolist(), strict=True)
            )
        ]
        lowest = [sorted((row for row in rows if row[0] == domain), key=lambda row: row[:2]) for domain in (0, 1)]
        kept = lowest[0][:4] + lowest[1][:5]
        for name, joined in both.samples[index].tensors().items():
            assert torch.equal(
                joined, torch.stack([each.samples[index].tensors()[name][row] for *_, each, row in kept])
            )


def test_adding_in_another_order_gives_the_same_sums_to_the_last_bit(tmp_path):
    one, two, three = make(0), make(1), make(2)
    ways = [one.merge(two).merge(three), three.merge(one.merge(two)), two.merge(three).merge(one)]
    for number, way in enumerate(ways):
        way.save(tmp_path / f"{number}")
    for a in (*ways, *(Profile.load(tmp_path / f"{number}") for number in range(3))):
        for held, other in zip(a.statistics, ways[0].statistics, strict=True):
            assert held.keys() == other.keys()
            assert all(torch.equal(held[name], other[name]) for name in other)
    orders = ((one, two, three), (three, two, one))
    plain = [sum(each.statistics[0]["logit_product"] for each in order) for order in orders]
    assert not torch.equal(*plain), "plain addition would not give that"


def test_statistics_over_all_domains_are_read_when_they_are_asked_for():
    held = make().statistics[0]
    read = []
    totals = summed(Totals(held, lambda name: read.append(name) or held[name]))
    assert totals.keys() == held.keys()
    assert read == []
    assert totals["usage"].equal(held["usage"][0] + held["usage"][1])
    assert read == ["usage"]


def test_what_was_added_is_stored_to_the_last_bit(tmp_path):
    one, two, three = make(0), make(1), make(2)
    one.merge(two).save(tmp_path / "both")
    expected = one.merge(two).merge(three)
    found = Profile.load(tmp_path / "both").merge(three)
    for a, b in zip(found.statistics, expected.statistics, strict=True):
        for name in b:
            for part in ("digits_K", "place"):
                assert torch.equal(getattr(a.exact(name), part), getattr(b.exact(name), part))


def test_layers_are_added_one_at_a_time_and_when_they_are_asked_for(tmp_path, monkeypatch):
    for number in range(2):
        make(number).save(tmp_path / f"{number}")
    read = []
    real = _LayerFiles._open
    monkeypatch.setattr(_LayerFiles, "_open", lambda self, index: read.append(index) or real(self, index))
    both = Profile.load(tmp_path / "0").merge(Profile.load(tmp_path / "1"))
    assert read == []
    assert both.sum(1, "tokens").item() == 60
    assert set(read) == {1}


def test_adding_keeps_what_both_hold():
    lean = make(1, logits=False)
    lean = replace(lean, statistics=tuple({"usage": held["usage"]} for held in lean.statistics))
    both = make(0).merge(lean)
    assert [set(held) for held in both.statistics] == [{"usage"}] * 2
    assert all(each.logits_TE is None and len(each.inputs_TD) == 9 for each in both.samples)


def test_the_smaller_sample_and_the_larger_thin_count():
    both = make(0).merge(make(1, sample_counts=(3, 1)))
    assert both.sample_counts == (3, 1)
    assert torch.bincount(both.samples[0].domain_T).tolist() == [3, 1]
    assert both.thin == 3


def test_samples_that_were_drawn_in_another_way_are_not_joined():
    with pytest.raises(StaleArtifact, match=r"seeds 3 and 4 cannot be added.*profile again with one seed"):
        make().merge(replace(make(1), seed=4))
    with pytest.raises(StaleArtifact, match=r"does not say how its sample was drawn.*profile again"):
        make().merge(make(1, sample_counts=()))


@pytest.mark.parametrize(
    "changes",
    [{"model_digest": "x"}, {"domains": ("code", "prose")}, {"layers": (layer(0), layer(1, num_experts=5))}],
    ids=["model", "domains", "layers"],
)
def test_what_does_not_belong_together_is_not_added(changes):
    with pytest.raises(StaleArtifact, match="different models or domains"):
        make().merge(make(1, **changes))
