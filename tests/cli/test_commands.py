import json
import re
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

import coterie
from coterie.artifact import read_artifact
from coterie.cli.main import app
from coterie.compress.recipes import RECIPES
from coterie.evaluate.scorecard import Scorecard


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr or result.exception
    return result


def words(text):
    """Return the lines of a table with single spaces."""
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]


SMALL = ("--tokens", 512, "--seq-len", 64)


@pytest.fixture(scope="module")
def made(tiny, text, tmp_path_factory):
    """Return a folder with what the commands make one after another from a tiny model, by the paths they print."""
    folder = tmp_path_factory.mktemp("run")
    run("profile", tiny(), folder / "profile", "--text", text, "--sample-tokens", 128, *SMALL)
    run("compress", tiny(), folder / "half", "--keep", 0.5, "--recipe", "reap", "--profile", folder / "profile")
    return folder


def test_inspect_prints_parts_sizes_and_what_fits(tiny):
    lines = words(run("inspect", tiny("deepseek_v3"), "--budget", "240KiB").stdout)
    assert lines[0] == f"{tiny('deepseek_v3')}: deepseek_v3, 3 layers, 2 of them with experts"
    assert "model.layers.1.mlp to model.layers.2.mlp: 8 experts, 2 a token, width 24, model width 32" in lines
    assert "part parameters bytes share of bytes" in lines
    assert any(line.startswith("experts 36.9 k 144 KiB ") for line in lines)
    assert any(line.startswith("dense 3.84 k 15.0 KiB ") for line in lines)
    [budget] = [line for line in lines if line.startswith("a budget of 240 KiB: all experts ")]
    assert "; or 4 experts a layer fit (--keep 0.5), " in budget
    below = run("inspect", tiny("deepseek_v3"), "--budget", "1KiB").stdout
    assert "cannot be met by keeping fewer experts: the least that can be routed, 4 a layer, takes" in below


def test_inspect_as_json_is_the_inspection(tiny):
    shown = json.loads(run("inspect", tiny(), "--budget", "200KiB", "--json").stdout)
    expected = coterie.inspect(tiny(), budget="200KiB").to_json()
    expected["ways"] = coterie.ways(tiny(), "200KiB").content()
    assert shown == json.loads(json.dumps(expected))


def test_profile_writes_what_the_library_makes(tiny, text, made, tmp_path):
    options = ("--domains", "prose", "--seed", 3, "--sample-tokens", 128, *SMALL)
    shown = json.loads(run("profile", tiny(), tmp_path / "out", "--text", text, "--json", *options).stdout)
    profile = coterie.Profile.load(tmp_path / "out")
    assert shown["num_tokens"] == {"prose": 512} == dict(zip(profile.domains, profile.num_tokens, strict=True))
    assert (shown["text_digest"], shown["seed"], shown["layers"]) == (profile.text_digest, 3, 2)
    assert shown["sample_tokens"] == 128
    both = coterie.Profile.load(made / "profile")
    assert both.num_tokens == (256, 256)


def test_profile_measures_what_is_named_and_what_recipes_need(tiny, text, tmp_path):
    options = ("--statistics", "tokens", "--recipe", "reap,easy-slim", "--json", *SMALL)
    shown = json.loads(run("profile", tiny(), tmp_path / "out", "--text", text, *options).stdout)
    assert shown["statistics"] == ["tokens", "usage", "reap", "hidden_square"]
    assert set(coterie.Profile.load(tmp_path / "out").statistics[0]) == {"tokens", "usage", "reap", "hidden_square"}
    for option in ("--statistics", "--recipe"):
        command = ["profile", str(tiny()), str(tmp_path / "b"), "--text", str(text), option, "raep"]
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 1
        assert "did you mean" in refused.stderr
        assert not (tmp_path / "b").exists()


def test_profile_prints_tokens_by_domain(tiny, text, tmp_path):
    lines = words(run("profile", tiny(), tmp_path / "out", "--text", text, *SMALL).stdout)
    assert lines[2:4] == ["code 256", "prose 256"]
    assert "all 512" in lines
    assert lines[-1] == f"profile of 2 MoE layers written to {tmp_path / 'out'}"


def test_plan_prints_and_writes_the_same_plan(tiny, made, tmp_path):
    file = tmp_path / "plan.json"
    options = ("--budget", "200KiB", "--recipe", "hc-smoe", "--router", "map", "--seed", 5, "--out", file)
    lines = words(run("plan", tiny(), made / "profile", *options).stdout)
    assert lines[:2] == ["recipe hc-smoe, router map, seed 5", "MoE layers 0 to 1: 5 experts"]
    plan = coterie.Plan.load(file)
    assert {size.num_experts for size in plan.layers} == {5}
    assert any(line.startswith("bytes 239 KiB 18") for line in lines)
    shown = json.loads(run("plan", tiny(), made / "profile", *options, "--json").stdout)
    assert shown.pop("inputs") == dict(plan.inputs)
    assert shown.pop("ways") == json.loads(json.dumps(coterie.ways(tiny(), "200KiB").content()))
    assert shown == json.loads(json.dumps(plan.body()))


def test_plan_needs_no_profile(tiny):
    shown = json.loads(run("plan", tiny(), "--keep", 0.5, "--json").stdout)
    assert [(layer["num_experts"], layer["width"], layer["top_k"]) for layer in shown["layers"]] == [(11, 8, 3)] * 2
    assert shown["recipe"] == "coterie"
    lines = words(run("plan", tiny(), "--keep", 0.5).stdout)
    assert lines[1] == "MoE layers 0 to 1: 11 experts of width 8, 3 for each token"


def test_plan_says_how_wide_experts_become(tiny):
    lines = words(run("plan", tiny(), "--width", 16, "--recipe", "heapr").stdout)
    assert lines[1] == "MoE layers 0 to 1: 8 experts of width 16"
    shown = json.loads(run("plan", tiny(), "--keep", 0.5, "--recipe", "easy-slim", "--json").stdout)
    assert [layer["width"] for layer in shown["layers"]] == [8, 8]


def test_a_ragged_result_says_which_widths_and_who_loads_it(tiny, text, tmp_path):
    out = tmp_path / "out"
    made = run("compress", tiny(), out, "--width", 8, "--recipe", "heapr-ragged", "--text", text, *SMALL)
    lines = words(made.stdout)
    assert re.fullmatch(r"MoE layer 0: 8 experts of width \d+ to \d+, \d+\.\d on average", lines[1])
    assert lines[-1] == f"load it with coterie.load_model({str(out)!r})"


def test_compress_says_where_it_is_and_how_to_load_it(tiny, text, tmp_path):
    options = (
        "--experts",
        4,
        "--recipe",
        "mergemoe",
        "--router",
        "map",
        "--text",
        text,
        "--profile",
        tmp_path / "profile",
        *SMALL,
    )
    out = run("compress", tiny(), tmp_path / "out", *options).stdout
    assert f"written to {tmp_path / 'out'}; loaded again, its logits differ by " in out
    assert f"load it with coterie.load_model('{tmp_path / 'out'}')" in out
    assert (tmp_path / "profile" / "profile.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "profile"]


def test_compress_as_json_is_the_manifest(tiny, made, tmp_path):
    options = ("--keep", 0.5, "--recipe", "reap", "--profile", made / "profile", "--json")
    shown = json.loads(run("compress", tiny(), tmp_path / "out", *options).stdout)
    assert shown.pop("out") == str(tmp_path / "out")
    took = json.loads((tmp_path / "out" / "coterie-run.json").read_text())
    for key in ("seconds", "forecast_bytes", "peak_bytes"):
        assert shown.pop(key) == took[key]
    assert shown == read_artifact(tmp_path / "out" / "coterie.json", kind="manifest")[0]
    # The same command gives the same weights.
    weights = [
        {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
        for folder in (tmp_path / "out", made / "half")
    ]
    assert weights[0] == weights[1]


def test_evaluate_prints_every_domain_and_keeps_scorecards(tiny, text, made, tmp_path):
    options = ("--against", tiny(), "--text", text, "--questions", 2, "--out", tmp_path / "cards", *SMALL)
    lines = words(run("evaluate", made / "half", tiny(), *options).stdout)
    assert lines[0] == f"half, {tiny().name} against {tiny().name}"
    assert lines[1] == "504 tokens in 8 sequences, 2 questions"
    assert "domain model perplexity KL (nats) agreement exact answers" in lines
    assert "all domains perplexity rise KL (nats) agreement exact answers" in lines
    files = [tmp_path / "cards" / f"scorecard-{name}.json" for name in ("half", tiny().name)]
    half, itself = map(Scorecard.load, files)
    for name, scores in {**half.domains, "": half.overall}.items():
        start = f"{name} half {scores['perplexity']:.3f} ".lstrip()
        if not name:
            start += f"{scores['perplexity_rise']:+.3f} ± {scores['perplexity_rise_error']:.3f} "
        start += f"{scores['kl']:.4f} ± {scores['kl_error']:.4f} {100 * scores['agreement']:.1f} %"
        assert any(line.startswith(start) for line in lines)
    assert sum(line.startswith(f"{tiny().name} {itself.overall['perplexity']:.3f} - - - ") for line in lines) == 1
    assert "model bytes of base" in lines  # speed and memory only on request
    assert itself.overall["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[-2:] == [f"scorecard written to {file}" for file in files]


def test_evaluate_shows_the_original_in_a_row_of_its_own(tiny, text, made):
    lines = words(run("evaluate", made / "half", "--against", tiny(), "--text", text, "--questions", 2, *SMALL).stdout)
    rows = [line.split()[:2] for line in lines if line.startswith(("code ", "prose "))]
    assert rows == [[domain, name] for domain in ("code", "prose") for name in (tiny().name, "half")]
    start = lines.index("all domains perplexity rise KL (nats) agreement exact answers")
    own, half = lines[start + 2 : start + 4]
    assert re.fullmatch(rf"{tiny().name} [\d.]+ - - - \d+\.0 %", own)
    assert re.fullmatch(r"half [\d.]+ [+-][\d.]+ ± [\d.]+ [\d.]+ ± [\d.]+ [\d.]+ % [\d.]+ %", half)


def test_evaluate_shows_a_model_alone_without_columns_that_compare(tiny, text):
    lines = words(run("evaluate", tiny(), "--text", text, "--questions", 0, *SMALL).stdout)
    assert lines[0] == tiny().name
    assert "domain perplexity exact answers" in lines
    assert "all domains perplexity exact answers" in lines


@pytest.mark.long
def test_evaluate_measures_speed_and_memory_on_request(tiny, text, monkeypatch):
    monkeypatch.setattr("coterie.cli.evaluate._SPEED_SECONDS", 0.0)
    options = ("--text", text, "--questions", 0, "--speed", *SMALL)
    lines = words(run("evaluate", tiny(), *options).stdout)
    assert lines[-3] == "model bytes of base memory peak memory tokens/s of base"
    assert re.fullmatch(rf"{tiny().name} 239 KiB - 239 KiB [\d.]+ \w+ [\d,]+ -", lines[-1])


def test_evaluate_refuses_what_does_not_fit(tiny, text):
    result = CliRunner().invoke(app, ["evaluate", str(tiny()), "--text", str(text), "--max-memory", "64MiB"])
    assert result.exit_code == 1
    assert "judging predictions takes at most 790 MiB of memory" in result.stderr


def test_evaluate_as_json_is_the_scorecards(tiny, text, tmp_path):
    file = tmp_path / "card.json"
    options = ("--text", text, "--questions", 0, "--out", file, "--json", *SMALL)
    [shown] = json.loads(run("evaluate", tiny(), *options).stdout)
    assert shown == json.loads(json.dumps(asdict(Scorecard.load(file))))
    assert shown["base"] is None
    assert shown["overall"]["tokens"] == 504


def test_report_draws_a_page(made, tmp_path):
    page = tmp_path / "page.html"
    assert run("report", made, "--out", page).stdout == f"page written to {page}\n"
    assert "<html" in page.read_text(encoding="utf-8")
    assert json.loads(run("report", made, "--out", page, "--json").stdout) == {"page": str(page)}


def test_recipes_lists_all():
    shown = json.loads(run("recipes", "--json").stdout)
    assert [recipe["name"] for recipe in shown] == list(RECIPES)
    kinds = {recipe["name"]: recipe["kind"] for recipe in shown}
    assert (kinds["reap"], kinds["mergemoe"]) == ("drop", "merge")
    printed = run("recipes").stdout
    for recipe in RECIPES.values():
        assert recipe.summary in printed
