"""``coterie calibrate``, and text and domains as the other commands take them."""

import json
import re

import pytest
from typer.testing import CliRunner

import coterie
from coterie.artifact import open_artifact
from coterie.cli.main import app
from coterie.profile.calibrate import calibrate
from coterie.profile.shares import parse_domains

SMALL = ("--tokens", 512, "--seq-len", 64)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.stderr or result.exception
    return result


def words(text):
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]


def test_calibrate_prints_the_sources_and_the_mix(tiny, text):
    found = calibrate(tiny(), text=text, tokens=512, seq_len=64)
    lines = words(run("calibrate", tiny(), "--text", text, *SMALL).stdout)
    assert lines[0] == "source tokens perplexity 4-grams repeated different pairs entropy (nats) share of mix"
    for source in found.sources:
        assert (
            f"{source.domain} 256 {source.perplexity:.2f} {100 * source.aggregation:.1f} % "
            f"{100 * source.diversity:.1f} % {source.entropy:.2f} {100 * found.weights[source.domain]:.1f} %"
        ) in lines
    assert lines[-1] == f"use it with --text {text} --domains {found.domains}"


def test_the_mix_that_is_shown_can_be_pasted(tiny, text, tmp_path):
    shown = json.loads(run("calibrate", tiny(), "--text", text, *SMALL, "--json").stdout)
    library = calibrate(tiny(), text=text, tokens=512, seq_len=64)
    assert shown == {**json.loads(json.dumps(library.to_json())), "written": None}
    assert parse_domains(shown["domains"]) == shown["weights"]
    options = ("--text", text, *SMALL, "--domains", shown["domains"], "--json")
    made = json.loads(run("profile", tiny(), tmp_path / "out", *options).stdout)
    for domain, weight in shown["weights"].items():
        assert made["num_tokens"][domain] == round(512 * weight / sum(shown["weights"].values()) / 64) * 64


def test_sources_that_are_left_out_are_named(tiny, text, tmp_path):
    for file in text.glob("*.txt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "loop.txt").write_text("la" * 2000)
    lines = words(run("calibrate", tiny(), "--text", tmp_path, *SMALL).stdout)
    [loop] = [line for line in lines if line.startswith("loop 192 ")]
    assert loop.endswith(" -"), "no share"
    assert any(line.startswith("loop is left out: 9") and "of its 4-grams are repeats" in line for line in lines)
    assert "loop" not in lines[-1].partition("--domains")[2]
    only = words(run("calibrate", tiny(), "--text", tmp_path, "--domains", "prose, code", *SMALL).stdout)
    assert not any(line.startswith("loop") for line in only)


@pytest.mark.long
def test_generate_writes_text_and_looks_at_it(tiny, tmp_path):
    out = tmp_path / "own"
    options = ("--tokens", 128, "--seq-len", 32, "--seed", 3)
    lines = words(run("calibrate", tiny(), "--generate", out, *options, "--temperature", 0.7).stdout)
    assert lines[-1] == f"text written to {out / 'self.jsonl'}; use it with --text {out}"
    assert any(line.startswith("self 128 ") and line.endswith(" 100.0 %") for line in lines)
    assert json.loads((out / "self.json").read_text())["body"]["temperature"] == 0.7
    shown = json.loads(run("calibrate", tiny(), "--generate", tmp_path / "b", *options, "--json").stdout)
    assert shown["written"] == str(tmp_path / "b" / "self.jsonl")
    direct = run("calibrate", tiny(), "--text", "self", *options)
    assert words(direct.stdout)[-1] == "use it with --text self"
    assert (
        json.loads(run("calibrate", tiny(), "--text", "self", *options, "--json").stdout)["text_digest"]
        == (shown["text_digest"])
    )


def test_own_text_serves_profile_and_compress(tiny, tmp_path):
    options = ("--tokens", 128, "--seq-len", 32, "--json")
    made = json.loads(run("profile", tiny(), tmp_path / "profile", "--text", "self", *options).stdout)
    assert made["num_tokens"] == {"self": 128}
    line = ("--keep", 0.5, "--recipe", "reap", "--text", "self")
    shown = json.loads(run("compress", tiny(), tmp_path / "out", *line, *options).stdout)
    assert shown["recipe"] == "reap"
    assert open_artifact(tmp_path / "out" / "coterie.json", kind="manifest").inputs["text"] == made["text_digest"]
    assert coterie.load_model(tmp_path / "out").config.num_experts == 4


def test_profile_takes_weights(tiny, text, tmp_path):
    options = ("--text", text, *SMALL, "--domains", "prose=3,code", "--json")
    shown = json.loads(run("profile", tiny(), tmp_path / "out", *options).stdout)
    assert shown["num_tokens"] == {"code": 128, "prose": 384}


@pytest.mark.long
@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_compress_takes_weights(tiny, text, tmp_path, inputs):
    options = ("--text", text, *SMALL, "--domains", "prose=3,code")
    profiled = json.loads(run("profile", tiny(), tmp_path / "profile", *options, "--json").stdout)
    line = ("--keep", 0.5, "--recipe", "reap", "--inputs", inputs, *options)
    run("compress", tiny(), tmp_path / "out", *line)
    made = open_artifact(tmp_path / "out" / "coterie.json", kind="manifest")
    if inputs == "original":
        assert made.inputs["text"] == profiled["text_digest"]
        run("compress", tiny(), tmp_path / "again", *line, "--profile", tmp_path / "other")
        assert coterie.Profile.load(tmp_path / "other").num_tokens == (128, 384)
    assert "two weights" in refused("compress", tiny(), tmp_path / "x", "--keep", 0.5, *options, "--domains", "a=1,a=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--text, --generate: give exactly one of them; got neither"),
        (("--text", "t", "--generate", "o"), "give exactly one of them; got both"),
        (("--generate", "o", "--domains", "a"), "--domains: text that the model writes has no domains"),
        (("--text", "t", "--first-token", "any"), "'any' is not one of"),
    ],
)
def test_a_command_line_that_is_not_understood_ends_with_2(arguments, message):
    result = run("calibrate", "m", *arguments, code=2)
    assert message in re.sub(r"\s+", " ", result.stderr)


def refused(*arguments):
    result = run(*arguments, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_what_cannot_be_done_is_said(tiny, text, tmp_path):
    model = tiny()
    assert "is not a folder" in refused("calibrate", model, "--text", tmp_path / "none")
    assert "hold no 4-grams" in refused("calibrate", model, "--text", text, "--tokens", 64, "--seq-len", 3)
    assert "did you mean prose" in refused("calibrate", model, "--text", text, "--domains", "pros")
    assert "--max-memory allows 1.00 MiB" in refused("calibrate", model, "--text", text, "--max-memory", "1MiB")
    own = tmp_path / "own"
    assert "draws nothing" in refused("calibrate", model, "--generate", own, "--temperature", 0)
    says = "with the model in memory as a whole takes at most"
    assert says in refused("calibrate", model, "--generate", own, "--max-memory", "9MiB")
    assert not own.exists()
    (tmp_path / "self.txt").write_text("mine")
    assert "self.txt exists" in refused("calibrate", model, "--generate", tmp_path)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ("prose=two", "'two', the weight in 'prose=two', is not a number"),
        ("prose=-1", "the weight of domain 'prose' is -1"),
        ("prose=0,code=0", "all weights are 0 (prose, code)"),
        ("prose=nan", "'nan', the weight in 'prose=nan', is not a number"),
        ("pros=2", "unknown domain 'pros'; did you mean prose"),
        ("", "none of the domains code, prose was asked for"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(tiny, text, tmp_path, domains, message):
    line = ("profile", tiny(), tmp_path / "out", "--text", text, "--domains", domains, *SMALL)
    assert message in refused(*line)
    assert not (tmp_path / "out").exists()
