"""The ways to meet a budget: bytes are those of results, costs those of tables, and none is praised amiss."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coterie.amounts import format_bytes
from coterie.cli.main import app
from coterie.compress.apply import compress
from coterie.compress.decide import plan
from coterie.compress.expected import FEWER_EXPERTS, MIXED, ONE_TYPE, Expected, expected_at
from coterie.compress.header_weights import weights_of_headers
from coterie.compress.prices import Prices
from coterie.compress.source import Source
from coterie.compress.ways import ways
from coterie.errors import Infeasible, InputError, StaleArtifact
from coterie.model.arch.inspect import read_headers
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.encodings.ggml import bits_of
from coterie.testing import tiny_checkpoint, tiny_families
from some import first

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

#: Families of which headers tell every matrix.
PLAIN = ("qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "olmoe", "qwen2_moe", "glm4_moe", "granitemoe")


def by_name(found):
    return {way.name.partition(",")[0]: way for way in found.ways}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model whose rows are long enough for blocks of 32."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen3_moe", moe_intermediate_size=64)


@pytest.fixture(scope="module")
def prices(model):
    """Return prices that nobody measured: four times as much for each bit less, by a number's share."""
    source = Source.open(model)
    damages = {
        weight.pattern: {
            kind: weight.num_elements * 1e-5 * (1 + number % 3) * 4.0 ** -bits_of(kind)
            for kind in ("Q8_0", "Q5_0", "Q4_0")
        }
        for number, weight in enumerate(source.weights)
    }
    return Prices(
        damages=damages, model_digest=source.checkpoint.digest, text_digest="t", num_tokens=1, seq_len=1, seed=0,
        on="all",
    )  # fmt: skip


@pytest.mark.parametrize("model_type", first(3, PLAIN))
def test_headers_alone_find_the_matrices_that_the_model_has(tiny, model_type):
    path = tiny(model_type)
    headers = read_headers(Checkpoint.open(path))
    found = {each.pattern: each for each in weights_of_headers(headers, headers.accounting(), "packed")}
    truth = {each.pattern: each for each in Source.open(path, target="packed").weights}
    assert found.keys() == truth.keys()
    for pattern, weight in truth.items():
        mine = found[pattern]
        assert (mine.columns, mine.num_elements, mine.plain_bytes) == (
            weight.columns, weight.num_elements, weight.plain_bytes,
        ), pattern  # fmt: skip
        assert (mine.kind, mine.head, mine.wraps) == (weight.kind, weight.head, weight.wraps), pattern


def test_for_coterie_alone_narrow_experts_may_have_fewer_bits(tmp_path):
    narrow = tiny_checkpoint(tmp_path / "m", "qwen3_moe", hidden_size=256, moe_intermediate_size=64)
    least = {}
    for target in ("gguf", "packed"):
        least[target] = ways(narrow, "10KiB", target=target).least_bytes
        with pytest.raises(Infeasible, match=f"{format_bytes(least[target])} is the least"):
            plan(narrow, budget="10KiB", target=target)
    assert least["packed"] < least["gguf"]


@pytest.mark.families
@pytest.mark.parametrize("model_type", tiny_families())
def test_of_any_family_headers_find_nearly_all_of_it(tiny, model_type):
    path = tiny(model_type)
    headers = read_headers(Checkpoint.open(path))
    found = sum(each.num_elements for each in weights_of_headers(headers, headers.accounting()))
    truth = sum(each.num_elements for each in Source.open(path).weights)
    assert found == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_bytes_are_those_of_plans(tiny, model_type):
    path = tiny(model_type)
    whole = Checkpoint.open(path).num_bytes
    for share in (0.8, 0.6):
        found = by_name(ways(path, int(share * whole)))
        one = found["one type for all"]
        made = plan(path, type=one.options[0].removeprefix("--type "))
        assert one.num_bytes == made.predicted_bytes <= int(share * whole)
        assert one.experts == made.layers[0].num_experts
        fewer = next(way for name, way in found.items() if " of " in name and len(way.options) == 1)
        pruned = plan(path, recipe="reap", experts=fewer.experts)
        assert fewer.num_bytes == pruned.predicted_bytes <= int(share * whole)


def test_experts_that_went_and_then_eight_bits_weigh_what_is_said(model, text_folder, tmp_path):
    settings = {"text": text_folder, "tokens": 128, "seq_len": 32}
    limit = int(0.225 * Checkpoint.open(model).num_bytes)
    way = next(way for way in ways(model, limit).ways if way.name.endswith("then Q8_0"))
    half = compress(model, tmp_path / "fewer", experts=way.experts, recipe="reap", **settings)
    made = plan(half.out, type="Q8_0")
    assert made.predicted_bytes == way.num_bytes <= limit
    assert way.bits == pytest.approx(8.5)


def test_what_fits_is_left_as_it_is(model):
    [way] = ways(model, "1GiB").ways
    assert (way.name, way.options, way.expected.kl) == ("as it is", (), 0.0)
    assert way.num_bytes == Checkpoint.open(model).num_bytes


def test_what_nothing_meets_says_the_least(model):
    found = ways(model, "10KiB")
    assert (found.ways, found.best) == ((), None)
    assert "no way meets it: with all experts in the smallest types it takes" in found.verdict()
    with pytest.raises(Infeasible, match=f"{format_bytes(found.least_bytes)} is the least"):
        plan(model, budget="10KiB")
    with pytest.raises(InputError, match="12GiB or 12GB"):
        ways(model, "12G")


def test_a_result_in_fewer_bits_has_no_ways(model, text_folder, tmp_path):
    packed = compress(model, tmp_path / "out", type="Q8_0", text=text_folder, tokens=128, seq_len=32)
    found = ways(packed.out, "100KiB")
    assert found.ways == ()
    assert "look at the model that it was made from" in found.verdict()


def test_the_tables_are_what_the_benchmarks_printed():
    bits = (BENCHMARKS / "bits.md").read_text(encoding="utf-8").partition("**qwen3_moe**")[2]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in bits.splitlines() if "," in line]
    printed = {float(row[2]): (row[3].split()[0], row[5].split()[0] if len(row) > 5 else "") for row in rows}
    for share, kl in MIXED[:-1]:
        assert float(printed[share][1]) == kl
    for share, kl in ONE_TYPE[:-1]:
        assert float(printed[share][0]) == kl
    plain = (BENCHMARKS / "plain_quantisation.md").read_text(encoding="utf-8")
    assert "| 8-bit rounding | 53% | 0.000052 |" in plain
    assert MIXED[-1] == ONE_TYPE[-1] == (0.53, 0.000052)
    methods = (BENCHMARKS / "methods.md").read_text(encoding="utf-8")
    [coterie] = re.findall(r"^\| coterie \| (.*)$", methods.partition("### 25 %")[0].partition("## model")[2], re.M)
    costs = [float(each) for each in re.findall(r"\*{0,2}(0\.\d+) ±", coterie)[:4]]
    assert [kl for _, kl in reversed(FEWER_EXPERTS)] == costs


@pytest.mark.parametrize("points", [MIXED, ONE_TYPE, FEWER_EXPERTS])
def test_more_bytes_never_cost_more(points):
    read = [expected_at(points, share / 100).kl for share in range(1, 101)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(read))
    for share, kl in points:
        assert expected_at(points, share).kl == pytest.approx(kl)
        assert expected_at(points, share).relation == "about"
    assert expected_at(points, points[0][0] - 0.01).relation == "above"
    assert expected_at(points, points[-1][0] + 0.01).relation == "below"


def test_by_prices_the_mixture_stands_beside_the_best_type_that_is_no_larger(model, prices):
    limit = int(0.185 * Checkpoint.open(model).num_bytes)
    found = ways(model, limit, prices=prices)
    one, mixed = found.ways[0], by_name(found)["a type for each matrix"]
    made = plan(model, budget=limit, prices=prices)
    assert (mixed.num_bytes, mixed.expected.kl) == (made.predicted_bytes, made.expected_kl)
    kind = one.options[0].removeprefix("--type ")
    types = plan(model, type=kind).types
    slow = sum(prices.damages[pattern][each] for pattern, each in types.items())
    assert one.expected.kl == pytest.approx(1.3 * slow)
    assert {one.expected.basis, mixed.expected.basis} == {"prices"}
    assert found.best is mixed
    assert mixed.expected.kl < one.expected.kl
    assert f"costs {one.expected.kl / mixed.expected.kl:.2g} times as much" in found.verdict()


def test_where_a_mixture_is_not_better_one_type_is_said(model, prices):
    """What all matrices have alike in a type that fits to the byte cannot be beaten by a mixture."""
    damages = {name: {"Q8_0": 1e-6, "Q5_0": 1e-6, "Q4_0": 1.0} for name in prices.damages}
    limit = plan(model, type="Q5_0").predicted_bytes
    found = ways(model, limit + 40, prices=replace(prices, damages=damages))
    assert found.best.options == ("--type Q5_0",)
    assert "times as much" not in found.verdict()


def test_what_is_known_from_above_is_never_best(model):
    found = ways(model, "1GiB")
    known = Expected(kl=0.5, relation="about", basis="bundled")
    [whole] = found.ways
    poor = replace(whole, name="poor", expected=replace(known, relation="above", kl=0.1))
    fair = replace(whole, name="fair", options=("--x",), expected=known)
    assert replace(found, ways=(poor, fair)).best is None  # the one above 0.1 may cost less than 0.5
    assert "not known" in replace(found, ways=(poor, fair)).verdict()
    worse = replace(poor, expected=replace(poor.expected, kl=0.6))
    assert replace(found, ways=(worse, fair)).best is fair
    assert replace(found, ways=(poor,)).best is None
    measured = replace(fair, name="measured", expected=replace(known, basis="prices", kl=0.9))
    assert replace(found, ways=(fair, measured)).best is measured
    assert replace(found, ways=(poor, measured)).best is measured  # a bound of other models says nothing of this one


def test_prices_of_another_model_are_refused(model, prices):
    with pytest.raises(StaleArtifact, match="another model"):
        ways(model, "100KiB", prices=place(replace(prices, model_digest="0" * 64), model.parent / "stale"))


def place(prices, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    prices.write(folder)
    return folder


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_inspect_and_plan_print_them(model, prices, tmp_path):
    limit = int(0.185 * Checkpoint.open(model).num_bytes)
    said = run("inspect", model, "--budget", limit)
    assert re.search(r"a type for each matrix .* \d+\.\d\d", said)
    assert "best: " in said
    assert "on the bundled models" in said
    said = run("plan", model, "--budget", limit)
    assert "`coterie price` and `coterie plan --prices` say" in said
    folder = place(prices, tmp_path / "prices")
    said = run("plan", model, "--budget", limit, "--prices", folder)
    assert "what the prices of this model predict" in said
    content = json.loads(run("plan", model, "--budget", limit, "--prices", folder, "--json"))
    assert content["ways"] == json.loads(json.dumps(ways(model, limit, prices=prices).content()))
    assert "ways" not in json.loads(run("plan", model, "--bits", 6, "--json"))


def test_nothing_heavy_is_imported(model):
    code = (
        f"import sys; from coterie.compress.ways import ways; ways({str(model)!r}, '100KiB');"
        "print({'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
