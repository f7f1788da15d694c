"""Prices that are kept: the same as those of a run, from which plans are made in seconds, and the frontier."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

import coterie.compress.prices as prices_module
from checkpoints import weight_digests
from coterie.cli.main import app
from coterie.cli.plan import print_plan
from coterie.compress.apply import compress
from coterie.compress.damages import DamageMeter
from coterie.compress.decide import plan
from coterie.compress.dry_run import dry_run
from coterie.compress.frontier import frontier
from coterie.compress.plan import Plan
from coterie.compress.prices import Prices, price
from coterie.compress.source import Source
from coterie.errors import Infeasible, InputError, OutputExists, StaleArtifact
from coterie.model.disk.encodings.ggml import bits_of
from coterie.model.stream.stream import Stream
from coterie.testing import tiny_checkpoint

TEXT = {"tokens": 256, "seq_len": 32}

#: Of compressions: nothing is trained.
MAKE = {**TEXT, "effort": "fast"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen3_moe", moe_intermediate_size=64)


@pytest.fixture(scope="module")
def prices(model, text_folder, tmp_path_factory):
    return price(model, tmp_path_factory.mktemp("prices") / "p", text=text_folder, **TEXT)


@pytest.fixture(scope="module")
def whole(model, text_folder, tmp_path_factory):
    return compress(model, tmp_path_factory.mktemp("whole") / "out", bits=6.0, text=text_folder, **MAKE)


def place(prices, folder):
    prices.write(folder)
    return folder


def test_what_is_kept_is_what_was_measured(model, prices, tmp_path):
    assert Prices.load(place(prices, tmp_path)) == prices
    assert prices.damages.keys() == {weight.pattern for weight in Source.open(model).weights}
    for pattern, by_type in prices.damages.items():
        assert 0 < by_type["Q8_0"] < by_type["Q5_0"] < by_type["Q4_0"], pattern
    assert prices.num_tokens == 256


def test_a_plan_with_prices_is_the_plan_of_a_run_that_measures_them(model, prices, whole):
    """The types, the bytes and the expected damage; and with them compress measures nothing."""
    planned = plan(model, bits=6.0, prices=prices)
    assert planned.types == whole.plan.types
    assert len(set(planned.types.values())) > 1
    assert (planned.damage, planned.predicted_bytes) == (whole.plan.damage, whole.plan.predicted_bytes)


def test_a_plan_says_how_much_of_what_it_costs_could_be_saved_at_most(model, prices, tmp_path, capsys):
    planned = plan(model, bits=6.0, prices=prices)
    assert 0 <= planned.gap < 0.5
    assert Plan.load(planned.save(tmp_path / "plan.json")).gap == planned.gap
    print_plan(replace(planned, gap=0.0123))
    assert "of that, at most 1.2 % could be saved in the same bytes" in capsys.readouterr().out
    outlined = plan(model, bits=6.0)
    assert (outlined.gap, outlined.damage) == (None, None)
    print_plan(outlined)
    assert "could be saved" not in capsys.readouterr().out


@pytest.mark.parametrize("held", [True, pytest.param(False, marks=pytest.mark.long)])
def test_compress_with_prices_gives_the_same_bytes_and_measures_nothing(
    held, model, prices, whole, text_folder, tmp_path, monkeypatch
):

    def refuse(self, skip=()):
        raise AssertionError("it was measured again")

    given = prices if held else place(prices, tmp_path / "prices")
    monkeypatch.setattr(DamageMeter, "measure", refuse)
    again = compress(model, tmp_path / "again", bits=6.0, text=text_folder, prices=given, **MAKE)
    assert weight_digests(again.out) == weight_digests(whole.out)
    foretold = dry_run(model, tmp_path / "other", bits=6.0, text=text_folder, prices=given, **MAKE)
    assert "pricing types" not in {time.name for time in foretold.outlook.times}


@pytest.mark.long
def test_compress_keeps_prices_where_it_is_told_to(model, prices, text_folder, tmp_path):
    compress(model, tmp_path / "out", bits=6.0, text=text_folder, prices=tmp_path / "new" / "prices", **MAKE)
    assert Prices.load(tmp_path / "new" / "prices") == prices
    assert {path.name for path in tmp_path.iterdir()} == {"new", "out"}


class Killed(BaseException):
    pass


def killed(model, text, place, monkeypatch):
    """Price a model until its first unit is done; return the name of that."""
    real, priced = DamageMeter._price, []

    def first(self, stage, weights):
        if len(priced) == 1:
            raise Killed
        priced.append(stage.unit.name)
        yield from real(self, stage, weights)

    with monkeypatch.context() as patch:
        patch.setattr(DamageMeter, "_price", first)
        with pytest.raises(Killed):
            price(model, place, text=text, **TEXT)
    assert not place.exists()
    return priced[0]


def test_pricing_that_was_killed_goes_on_with_what_it_had(model, prices, text_folder, tmp_path, monkeypatch):
    done = killed(model, text_folder, tmp_path / "p", monkeypatch)
    real, later = DamageMeter._price, []
    monkeypatch.setattr(DamageMeter, "_price", lambda self, stage, weights: later.append(stage.unit.name) or real(
        self, stage, weights
    ))  # fmt: skip
    assert price(model, tmp_path / "p", text=text_folder, **TEXT) == prices
    assert done not in later
    assert later


def test_a_killed_run_with_other_settings_is_not_gone_on_with(model, text_folder, tmp_path, monkeypatch):
    killed(model, text_folder, tmp_path / "p", monkeypatch)
    with pytest.raises(StaleArtifact, match="text was"):
        price(model, tmp_path / "p", text=text_folder, tokens=128, seq_len=32)


def test_prices_of_another_model_are_refused(prices, text_folder, tmp_path):
    other = tiny_checkpoint(tmp_path / "other", "qwen3_moe", moe_intermediate_size=64, vocab_size=300)
    folder = place(prices, tmp_path / "prices")
    for act in (
        lambda: plan(other, bits=6.0, prices=folder),
        lambda: frontier(other, folder),
        lambda: compress(other, tmp_path / "out", bits=6.0, text=text_folder, prices=folder, **MAKE),
    ):
        with pytest.raises(StaleArtifact, match=r"of another model.*run coterie price again"):
            act()
    assert not (tmp_path / "out").exists()


def test_prices_are_refused_where_nobody_chooses_by_them(model, prices, text_folder, tmp_path):
    with pytest.raises(InputError, match="does not choose types by what they cost"):
        plan(model, type="Q8_0", prices=prices)
    with pytest.raises(InputError, match="--prices is for recipes that choose types"):
        compress(model, tmp_path / "out", type="Q8_0", text=text_folder, prices=prices, **MAKE)


def test_a_place_that_is_taken_is_refused_before_any_work(model, text_folder, tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine").touch()
    monkeypatch.setattr(Stream, "__enter__", lambda self: pytest.fail("work began"))
    with pytest.raises(OutputExists):
        price(model, tmp_path / "p", text=text_folder, **TEXT)
    with pytest.raises(OutputExists):
        compress(model, tmp_path / "out", bits=6.0, text=text_folder, prices=tmp_path / "p", **MAKE)


def test_a_matrix_that_no_token_passes_keeps_enough_bits(model, prices):
    weights = Source.open(model).weights
    few = {name: by_type for name, by_type in prices.damages.items() if name != weights[3].pattern}
    free = prices_module._with_unseen(few, weights)[weights[3].pattern]
    assert free
    assert set(free.values()) == {0.0}
    assert all(bits_of(kind) >= 4 for kind in free)
    assert prices_module._with_unseen(prices.damages, weights) == prices.damages


# --- the frontier -------------------------------------------------------------------------------------------------


def test_fewer_bytes_cost_more_and_a_mixture_no_more_than_one_type(model, prices):
    found = frontier(model, prices)
    sizes = [point.num_bytes for point in found.mixed]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 2
    damages = [point.damage for point in found.mixed]
    assert damages == sorted(damages)
    for point in found.mixed:
        plain = found.plain_within(point.num_bytes)
        assert plain is None or point.damage <= plain.damage
        assert sum(point.types.values()) == pytest.approx(1)
    assert any(found.plain_within(size) is not None for size in sizes)


def test_each_mixture_is_what_a_plan_says(model, prices):
    [point] = frontier(model, prices, budgets=["120KB"]).mixed
    made = plan(model, budget="120KB", prices=prices)
    assert point.num_bytes == made.predicted_bytes <= 120_000
    assert point.damage == pytest.approx(made.damage)
    with pytest.raises(Infeasible, match="the least"):
        frontier(model, prices, budgets=["3KB"])


def test_one_type_costs_what_its_prices_sum_up_to(model, prices):
    found = frontier(model, prices)
    [smallest] = [point for point in found.single if point.name == "Q8_0"]
    assert smallest.damage == pytest.approx(sum(by_type["Q8_0"] for by_type in prices.damages.values()))


def test_the_command_lists_what_there_is_and_draws_it(model, prices, tmp_path):
    folder, picture = place(prices, tmp_path / "prices"), tmp_path / "new" / "frontier.svg"
    found = frontier(model, prices)
    for _ in range(2):  # the second time the picture is replaced
        result = CliRunner().invoke(app, ["frontier", str(model), str(folder), "--picture", str(picture)])
        assert result.exit_code == 0, result.stderr
    for point in found.mixed:
        assert f"{point.expected_kl:.2g}" in result.stdout
    drawn = picture.read_text()
    assert drawn.count("<title>types mixed") == len(found.mixed) + 1  # its line and its marks
    assert len(ElementTree.fromstring(drawn)) > len(found.mixed)
    listed = CliRunner().invoke(app, ["frontier", str(model), str(folder), "--budgets", "120KB,100KB", "--json"])
    large, small = (each["bytes"] for each in json.loads(listed.stdout)["mixed"])
    assert 100_000 < large <= 120_000
    assert small <= 100_000
    picture.write_text("mine")
    refused = CliRunner().invoke(app, ["frontier", str(model), str(folder), "--picture", str(picture)])
    assert refused.exit_code == 1
    assert "only a picture that coterie wrote is replaced" in refused.stderr
    assert picture.read_text() == "mine"


# --- answers alone ------------------------------------------------------------------------------------------------


def test_prices_of_answers_count_the_loss_of_answers_alone(model):
    """The head is priced where a token that counts is predicted; what no such token's loss reaches costs nothing."""
    source = Source.open(model)
    ids = torch.randint(5, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    answers = torch.zeros(4, 12, dtype=torch.bool)
    answers[:, 6:] = True
    nobody = torch.zeros(4, 12, dtype=torch.bool)
    nobody[0, 0] = True  # a first token, which nothing predicts

    def measured(counts):
        found = {}
        with Stream(source.checkpoint) as stream:
            meter = DamageMeter(stream=stream, source=source, batches=[ids], counts=[counts], types=("Q4_0",))
            for _, some in meter.measure():
                found |= some
        return {name: by_type["Q4_0"] for name, by_type in found.items() if by_type}

    every, last = measured(None), measured(answers)
    assert every.keys() == last.keys()
    assert every != last
    assert set(measured(nobody).values()) == {0.0}
    hidden = torch.randn(4, 12, 3)
    meter = DamageMeter(stream=None, source=source, batches=[ids, ids], counts=[answers, None], types=())
    expected = torch.cat([hidden[:, 5:11].reshape(-1, 3), hidden.reshape(-1, 3)])
    assert torch.equal(meter._predicting([hidden, hidden]), expected)
