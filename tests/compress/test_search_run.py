"""A search as a part of a compression: never over the bytes, never worse, the same again and after a kill."""

import logging
import re

import pytest
from typer.testing import CliRunner

import coterie.compress.search.run as run_module
from checkpoints import weight_digests
from coterie.cli.main import app
from coterie.compress.apply import compress
from coterie.compress.damages import DamageMeter
from coterie.compress.decide import plan
from coterie.compress.dry_run import dry_run
from coterie.compress.prices import Prices
from coterie.compress.search.divergence import Divergences
from coterie.compress.search.evolve import PATIENCE, Parent
from coterie.compress.search.forecast import SEARCHING
from coterie.compress.search.run import Search, ladders_of
from coterie.compress.source import Source
from coterie.errors import InputError
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import bits_of
from coterie.model.disk.manifest import Manifest
from coterie.testing import tiny_checkpoint

TEXT = {"tokens": 512, "seq_len": 32, "effort": "fast", "bits": 5.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen3_moe", moe_intermediate_size=64)


@pytest.fixture(scope="module")
def prices(model):
    """Prices that nobody measured: what they leave to gain is the search's own affair."""
    damages = {
        weight.pattern: {
            kind: weight.num_elements * 4 ** -bits_of(kind)
            for name in ("Q8_0", "Q5_0", "Q4_0")
            if (kind := weight.fitting(name))
        }
        for weight in Source.open(model).weights
    }
    return Prices(
        damages=damages, model_digest=Checkpoint.open(model).digest, text_digest="", num_tokens=512, seq_len=32, seed=0,
        on="all",
    )  # fmt: skip


@pytest.fixture(scope="module")
def searched(model, prices, text_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "out"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(run_module.log, "info", lambda text, *values: said.append(text % values))
        return compress(model, out, search=6, text=text_folder, prices=prices, **TEXT), said


def test_a_search_gains_by_its_own_measure_in_the_same_bytes_and_says_so(model, prices, searched):
    result, said = searched
    chosen = plan(model, bits=5.5, prices=prices)
    weights = Source.open(model).weights

    def size(types):
        return sum(weight.num_bytes(types[weight.pattern]) for weight in weights)

    assert result.plan.types != chosen.types
    assert result.plan.types.keys() == chosen.types.keys()
    assert size(result.plan.types) <= 5.5 / 8 * sum(weight.num_elements for weight in weights)
    assert result.plan.predicted_bytes == Checkpoint.open(result.out).num_bytes
    damage = sum(prices.damages[pattern][kind] for pattern, kind in result.plan.types.items())
    assert result.plan.damage == pytest.approx(damage)
    assert (result.plan.gap, chosen.gap is None) == (None, False)
    [line] = [line for line in said if line.startswith("types: ")]
    before, after = map(float, re.findall(r"\b\d\.\d+", line))
    assert after < before
    assert "6 generations (512 tokens" in line
    command = Manifest.read(result.out).provenance.commands[-1]
    assert "--search 6" in command


class Killed(BaseException):
    pass


@pytest.mark.long
def test_a_search_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    model, prices, searched, text_folder, tmp_path, monkeypatch
):
    out, real, begun = tmp_path / "out", run_module.next_generation, []

    def third_is_killed(*arguments):
        begun.append(arguments)
        if len(begun) == 3:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "next_generation", third_is_killed)
        with pytest.raises(Killed):
            compress(model, out, search=6, text=text_folder, prices=prices, **TEXT)
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    later = []
    monkeypatch.setattr(run_module, "next_generation", lambda *each: later.append(each) or real(*each))
    again = compress(model, out, search=6, text=text_folder, prices=prices, **TEXT)
    assert len(later) == 4
    assert again.plan == searched[0].plan
    assert weight_digests(again.out) == weight_digests(searched[0].out)


@pytest.mark.long
def test_a_run_that_was_killed_after_its_search_does_not_search_again(
    model, prices, searched, text_folder, tmp_path, monkeypatch
):
    import coterie.compress.apply as apply_module

    def killed(work):
        raise Killed

    with monkeypatch.context() as patch:
        steps = [(name, killed if name == "compress" else step) for name, step in apply_module.STEPS]
        patch.setattr(apply_module, "STEPS", steps)
        with pytest.raises(Killed):
            compress(model, tmp_path / "out", search=6, text=text_folder, prices=prices, **TEXT)

    def refuse(*arguments):
        raise AssertionError("it was searched again")

    monkeypatch.setattr(Divergences, "of", refuse)
    monkeypatch.setattr(Divergences, "read_original", refuse)
    again = compress(model, tmp_path / "out", search=6, text=text_folder, prices=prices, **TEXT)
    assert weight_digests(again.out) == weight_digests(searched[0].out)


@pytest.mark.long
def test_the_plan_stays_where_no_generation_gains_and_the_search_ends_early(
    model, prices, text_folder, tmp_path, monkeypatch, caplog
):
    tried = []
    monkeypatch.setattr(run_module, "next_generation", lambda parent, *others: tried.append(parent) or parent)
    monkeypatch.setattr(Divergences, "of", lambda self, candidates, rows: [0.25] * len(candidates))
    with caplog.at_level(logging.INFO, logger="coterie"):
        kept = compress(model, tmp_path / "kept", search=99, text=text_folder, prices=prices, **TEXT)
    assert len(tried) == PATIENCE
    assert tried[0] == Parent(types=kept.plan.types, divergence=0.25)
    chosen = plan(model, bits=5.5, prices=prices)
    assert (kept.plan.types, kept.plan.damage, kept.plan.gap) == (chosen.types, chosen.damage, chosen.gap)
    assert f"after a search of {PATIENCE} generations" in caplog.text


def test_nothing_is_brought_down_to_types_whose_damage_rounding_does_not_tell(prices):
    class Wide:
        pattern, wraps = "m", False

        def num_bytes(self, kind):
            return {"IQ1_S": 1, "IQ1_M": 2, "IQ2_XXS": 3, "Q2_K": 4}[kind]

    damages = {"m": {"IQ1_S": 9.0, "IQ1_M": 8.0, "IQ2_XXS": 3.0, "Q2_K": 2.0}}
    for now, names in {"IQ2_XXS": ["IQ2_XXS", "Q2_K"], "IQ1_S": ["IQ1_S", "IQ2_XXS", "Q2_K"]}.items():
        [ladder] = ladders_of([Wide()], {"m": now}, damages)
        assert [level.name for level in ladder.levels] == names


def test_a_dry_run_says_what_a_search_takes(model, prices, text_folder, tmp_path):
    foretold = dry_run(model, tmp_path / "out", search=6, text=text_folder, prices=prices, **TEXT)
    [time] = [time for time in foretold.outlook.times if time.name == SEARCHING]
    assert time.seconds > 0
    names = {stage.name for stage in foretold.outlook.memory.stages}
    assert {"searching the types of a layer", "comparing predictions in the search"} <= names
    assert foretold.outlook.disk["rounded matrices, while types are searched"] > 0
    without = dry_run(model, tmp_path / "out", text=text_folder, prices=prices, **TEXT)
    assert SEARCHING not in {time.name for time in without.outlook.times}


def test_a_search_is_refused_where_there_are_no_types_to_search_for(model, text_folder, tmp_path):
    out = str(tmp_path / "out")
    for settings, message in (
        ({"type": "Q4_0"}, "the recipe is gptaq"),
        ({"keep": 0.5}, "the recipe is coterie:"),
        ({"bits": 5.5, "recipe": "pmq"}, "the recipe is pmq"),
        ({"bits": 5.5, "recipe": "coterie-bits-width", "target": "packed"}, "say --recipe coterie-bits, or"),
    ):
        with pytest.raises(InputError, match=message):
            compress(model, out, search=4, text=text_folder, **settings)
    with pytest.raises(InputError, match="--search -1 is no number of generations"):
        compress(model, out, search=-1, bits=5.5, text=text_folder)
    saved = plan(model, bits=6.0).save(tmp_path / "plan.json")
    with pytest.raises(InputError, match="leave --search out, or --plan"):
        compress(model, out, plan=saved, search=4, text=text_folder)
    arguments = ["compress", str(model), out, "--type", "Q4_0", "--search", "4", "--text", str(text_folder)]
    done = CliRunner().invoke(app, arguments)
    assert "the recipe is gptaq" in str(done.output) + str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_search_and_prices_measure_in_one_run(model, searched, text_folder, tmp_path, monkeypatch):
    """Prices that the run measures itself are those that were given; no search takes them as they are."""
    measured = []
    real = DamageMeter.measure
    monkeypatch.setattr(DamageMeter, "measure", lambda self, skip=(): measured.append(1) or real(self, skip))
    monkeypatch.setattr(Search, "in_run", lambda self, run, chosen, prices: chosen)
    made = compress(model, tmp_path / "out", search=6, text=text_folder, **TEXT)
    assert measured == [1]
    assert made.plan.types.keys() == searched[0].plan.types.keys()
