"""Widths and types in one knapsack."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.compress.allocators import mixed_widths
from coterie.compress.allocators.knapsack import Option, lower_hull
from coterie.compress.allocators.problem import Problem
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.frontier import frontier
from coterie.compress.plan import KL_OVER_DAMAGE, NARROWED_KL_OVER_DAMAGE
from coterie.compress.prices import Prices, price
from coterie.compress.source import Source
from coterie.compress.target import Target
from coterie.compress.weights import PRICED_TYPES, at_widths
from coterie.compress.width_prices import STEPS, by_width, curves_of, priced_widths
from coterie.errors import CorruptArtifact, Infeasible, InputError, StaleArtifact
from coterie.model.arch.load import load_model
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import bits_of
from coterie.publish.modeling_coterie import CoterieModel
from coterie.testing import tiny_checkpoint

TEXT = {"tokens": 256, "seq_len": 32}
RECIPE = {"recipe": "coterie-bits-width", "target": "packed"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "olmoe"
    return tiny_checkpoint(folder, "olmoe", dtype=torch.float32, hidden_size=96, intermediate_size=128)


@pytest.fixture(scope="module")
def measured(model, text_folder, tmp_path_factory):
    return price(model, tmp_path_factory.mktemp("prices") / "p", text=text_folder, **TEXT)


@pytest.fixture(scope="module")
def prices(model):
    """Prices that a bit fewer doubles; most of what an expert costs is in a quarter of its neurons."""
    return made_up(model, [neuron**-2.0 for neuron in range(1, 129)])


def made_up(model, cost_F, total=1.0):
    """Return prices: `total` is what all neurons of a layer cost."""
    source = Source.open(model, target="packed")
    damages = {
        weight.pattern: {kind: 2.0 ** -bits_of(kind) for wanted in PRICED_TYPES for kind in weight.fittings(wanted)}
        for weight in source.weights
    }
    widths = {
        f"{layer.experts}.{expert}": by_width([total * cost * (1 + expert) / 36 / sum(cost_F) for cost in cost_F])
        for layer in source.architecture.layers
        for expert in range(layer.num_experts)
    }
    shares = {
        weight.pattern: tuple((1 + expert) / 36 for expert in range(8))
        for weight in source.weights
        if weight.layer is not None
    }
    return Prices(
        damages=damages, widths=widths, shares=shares, model_digest=source.checkpoint.digest, text_digest="none",
        num_tokens=1, seq_len=1, seed=0, on="all",
    )  # fmt: skip


def test_widths_that_are_priced_are_whole_grains_and_few():
    assert priced_widths(128) == (0, 32, 64, 96, 128)
    assert priced_widths(768) == (0, 96, 192, 288, 384, 480, 576, 672, 768)
    assert priced_widths(704) == (0, 96, 192, 288, 384, 480, 576, 672, 704)
    assert priced_widths(32) == priced_widths(100) == ()
    for full in range(64, 4096, 32):
        widths = priced_widths(full)
        assert len(widths) <= STEPS + 1
        assert all(width % 32 == 0 for width in widths)


def test_an_expert_that_nobody_chose_is_like_the_mean_of_the_others():
    prices = {"m.0": by_width([1.0] * 128), "m.2": by_width([3.0] * 128)}
    curves = curves_of(prices, "m", 3, 128)
    assert curves[0] == {0: 128, 32: 96, 64: 64, 96: 32, 128: 0}
    assert curves[1] == {0: 256, 32: 192, 64: 128, 96: 64, 128: 0}
    assert curves_of({}, "m", 3, 128) == []
    assert curves_of(prices, "m", 3, 100) == []


@given(
    st.lists(
        st.builds(Option, name=st.just("a"), num_bytes=st.integers(1, 50), damage=st.floats(0, 8)),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_the_hull_has_what_is_cheapest_at_any_price(options):
    hull = lower_hull(options)
    for price_of_byte in (0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 100.0):
        cheapest = min(each.damage + price_of_byte * each.num_bytes for each in options)
        assert min(each.damage + price_of_byte * each.num_bytes for each in hull) == pytest.approx(cheapest)
    slopes = [(b.damage - a.damage) / (b.num_bytes - a.num_bytes) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)


def test_prices_of_widths_are_kept_and_older_folders_are_read(model, prices, tmp_path):
    prices.write(tmp_path)
    assert Prices.load(tmp_path) == prices
    replace(prices, widths={}).write(tmp_path)
    assert "widths" not in json.loads((tmp_path / "prices.json").read_text())["body"]
    old = Prices.load(tmp_path)
    assert plan(model, bits=3.0, prices=old, target="packed", recipe="coterie-bits").types
    with pytest.raises(StaleArtifact, match="run coterie price again, or take --recipe coterie-bits"):
        plan(model, bits=3.0, prices=old, target="packed")


@pytest.mark.parametrize("widths", [{}, {"0": 1.0}, {"0": 1.0, "64": 0.5, "128": 0.0}, {"x": 1.0}])
def test_prices_of_other_widths_are_damaged(prices, widths, tmp_path):
    replace(prices, widths={**prices.widths, "model.layers.0.mlp.experts.3": widths}).write(tmp_path)
    with pytest.raises(CorruptArtifact, match=r"prices\.json: widths of .*experts\.3"):
        Prices.load(tmp_path)


@pytest.mark.parametrize("bits", [1.2, 1.7, 2.2, 3.1])
def test_a_plan_keeps_to_its_bytes_and_expects_no_more_than_types_alone(model, prices, bits):
    made = plan(model, bits=bits, prices=prices, experts_only=True, **RECIPE)
    whole = plan(model, type="Q4_0", recipe="nearest", experts_only=True)
    numbers = 2 * 8 * 3 * 96 * 128
    in_plain = 4 * numbers
    assert whole.original_bytes - in_plain + numbers * bits / 8 >= made.predicted_bytes
    try:
        types_alone = plan(model, bits=bits, prices=prices, experts_only=True, target="packed", recipe="coterie-bits")
    except InputError:
        assert bits == 1.2
        assert made.ragged
        return
    assert made.damage <= types_alone.damage * 1.000001
    if bits < 2:
        assert made.ragged
        assert made.damage < 0.9 * types_alone.damage


@pytest.mark.long
def test_prices_are_measured_of_every_expert_that_was_chosen(model, measured):
    layers = Source.open(model).architecture.layers
    names = {f"{layer.experts}.{expert}" for layer in layers for expert in range(layer.num_experts)}
    assert measured.widths
    assert measured.widths.keys() <= names
    assert plan(model, bits=1.8, prices=measured, experts_only=True, **RECIPE).damage > 0


@pytest.mark.parametrize("more", [0.05, 0.2, 0.5, 0.9])
def test_no_other_widths_and_types_cost_less(model, more):
    """Beside every combination, of two experts that have three types and four widths."""
    source = Source.open(model, target="packed")
    kinds = ("IQ2_XXS", "Q3_K", "Q8_0")
    of_layer = [weight for weight in source.weights if weight.layer == 0]
    weights = tuple(weight.only(weight.names[:2]) for weight in of_layer)
    random = np.random.default_rng(int(100 * more))
    damages = {
        weight.pattern: {name: cost * random.uniform(0.5, 2) for name, cost in zip(
            dict.fromkeys(kind for wanted in kinds for kind in weight.fittings(wanted)), itertools.cycle((9, 2, 0.1)),
        )}
        for weight in weights
    }  # fmt: skip
    shares = {weight.pattern: (0.2, 0.8) for weight in weights}
    [layer, *_] = source.architecture.layers
    layer = replace(layer, num_experts=2)
    widths = {
        f"{layer.experts}.{expert}": by_width(random.exponential(0.005 * (1 + expert), 128)) for expert in range(2)
    }
    least, most = 2 * 3 * 96 * 32 * 2.0625 / 8, 2 * 3 * 96 * 128 * 8.5 / 8
    budget = int(least + more * (most - least))
    problem = Problem(
        architecture=SimpleNamespace(layers=(layer,)), sizing=SimpleNamespace(num_bytes=lambda layers: sum(
            weight.plain_bytes for weight in at_widths(weights, layers)
        )),
        target=Target(budget=budget, reader="packed"), passes=(), find_weights=lambda: weights, damages=damages,
        widths=widths, shares=shares,
    )  # fmt: skip
    found = mixed_widths.allocate(problem)
    assert found.num_bytes <= budget

    def ways(expert):
        cost = widths[f"{layer.experts}.{expert}"]
        for width in (32, 64, 96, 128):
            left = 1 - cost[str(width)] / cost["0"]
            columns = (
                [
                    (each.num_bytes(kind), damage * share[expert] * left)
                    for kind, damage in damages[weight.pattern].items()
                    if each.holds(kind)
                ]
                for weight in weights
                for share in (shares[weight.pattern],)
                for each in weight.only(weight.names[expert : expert + 1]).at_widths([width] * 2).by_width()
            )
            if width == 32 and expert == 0:  # of a layer one expert stays, that which would cost most
                yield 0, mixed_widths.GONE * cost["0"]
            for parts in itertools.product(*columns):
                yield sum(size for size, _ in parts), cost[str(width)] + sum(damage for _, damage in parts)

    least_damage = min(
        first + second
        for (size, first), (other, second) in itertools.product(ways(0), ways(1))
        if size + other <= budget
    )
    assert found.damage >= least_damage * (1 - 1e-9)
    assert found.damage <= least_damage * (1 + 1e-9) / (1 - found.gap)
    assert found.damage <= 1.15 * least_damage  # two items are few: bytes are left over


def test_a_budget_is_that_of_the_whole_file(model, prices):
    whole = plan(model, bits=3.0, prices=prices, target="packed", recipe="coterie-bits").predicted_bytes
    for budget in (whole, whole - 1, whole * 7 // 8):
        made = plan(model, budget=budget, prices=prices, **RECIPE)
        assert made.ragged
        assert 0.97 * budget < made.predicted_bytes <= budget


def test_where_all_neurons_matter_alike_none_goes_at_many_bits(model):
    made = plan(model, bits=6.0, prices=made_up(model, [1.0] * 128, total=100.0), **RECIPE)
    assert not made.ragged
    assert all(layer.experts is None for layer in made.layers)


def test_an_outline_says_what_is_too_small(model):
    assert plan(model, bits=3.0, **RECIPE).types
    assert plan(model, bits=1.2, experts_only=True, **RECIPE).ragged
    with pytest.raises(Infeasible, match="cannot be met"):
        plan(model, bits=0.3, experts_only=True, **RECIPE)
    with pytest.raises(InputError, match="--target packed as well, or take coterie-bits"):
        plan(model, bits=3.0, recipe="coterie-bits-width")


@pytest.mark.long
@pytest.mark.parametrize("held", [True, False])
def test_a_result_is_what_was_planned(held, model, prices, text_folder, tmp_path, request):
    given = prices if held else None
    result = compress(
        model, tmp_path / "out", bits=1.8, prices=given, experts_only=True, text=text_folder, **TEXT, **RECIPE
    )
    planned = plan(model, bits=1.8, prices=given or request.getfixturevalue("measured"), experts_only=True, **RECIPE)
    assert (result.plan.types, result.plan.layers) == (planned.types, planned.layers)
    if held:
        assert result.plan.ragged
    stored = Checkpoint.open(result.out).tensors.values()
    assert sum(info.num_bytes for info in stored) == planned.predicted_bytes
    assert result.logits_error <= 1e-6
    loaded = load_model(result.out, dtype=torch.float32).state_dict()
    for name, tensor in CoterieModel.from_pretrained(result.out, dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, loaded[name]), name


@pytest.mark.long
def test_experts_in_one_tensor_get_types_alone(text_folder, tmp_path):
    model = tiny_checkpoint(tmp_path / "m", "granitemoe", dtype=torch.float32, hidden_size=96, intermediate_size=64)
    prices = price(model, tmp_path / "prices", text=text_folder, **TEXT)
    assert prices.widths == {}
    widths, types = (plan(model, bits=2.5, prices=prices, target="packed", recipe=recipe) for recipe in (
        "coterie-bits-width", "coterie-bits",
    ))  # fmt: skip
    assert (widths.types, widths.layers, widths.damage) == (types.types, types.layers, types.damage)


def test_it_is_what_a_packed_result_is_made_by_and_the_frontier_lists_it(model, prices):
    made = plan(model, bits=1.8, prices=prices, target="packed")
    assert made.recipe == "coterie-bits-width"
    assert plan(model, bits=4.5, prices=prices).recipe == "coterie-bits"
    budget = made.predicted_bytes
    [packed] = frontier(model, prices, budgets=[budget], target="packed").mixed
    assert packed.damage == pytest.approx(made.damage)
    assert packed.num_bytes == budget
    kept = sum(each.width for layer in made.layers for each in layer.experts)
    assert packed.neurons == pytest.approx(kept / (2 * 8 * 128))
    assert packed.neurons < 1
    assert packed.expected_kl == made.expected_kl == NARROWED_KL_OVER_DAMAGE * made.damage
    types_alone = plan(model, budget=budget, prices=prices, target="packed", recipe="coterie-bits")
    assert types_alone.expected_kl == KL_OVER_DAMAGE * types_alone.damage > packed.expected_kl
