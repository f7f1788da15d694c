"""``coterie families``: every family is listed, with what its code in transformers says of it."""

import json

from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.testing.families import TINY, UNSUPPORTED


def run(*arguments):
    return CliRunner().invoke(app, ["families", *arguments])


def test_every_family_is_in_the_table_and_the_count_below_it():
    result = run()
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.stdout.splitlines() if line and not line.startswith((" ", "─"))]
    assert set(TINY) <= set(rows)
    for name, problem in UNSUPPORTED.items():
        assert f"{name} does not work: {problem}" in result.stdout
    works = len(TINY) - len(UNSUPPORTED)
    assert f"{works} of {len(TINY)} families work" in result.stdout.splitlines()[-1]
    assert not result.stderr


def test_facts_are_those_of_the_family_s_code():
    names = ["aria_text", "deepseek_v3", "gpt_oss", "inkling_text", "muse_spark", "nemotron_h", "olmoe", "qwen3_next"]
    result = run("--json", *names)
    assert result.exit_code == 0, result.output
    facts = {entry["model_type"]: entry for entry in json.loads(result.stdout)}
    assert list(facts) == names
    assert facts["olmoe"] == {
        "model_type": "olmoe", "model_class": "OlmoeForCausalLM", "layers": ["moe", "moe"], "token_mixing": [],
        "router": [], "experts": [], "shared_experts": False, "problem": None, "refusal": None,
    }  # fmt: skip
    assert facts["deepseek_v3"]["layers"] == ["dense", "moe", "moe"]
    assert facts["deepseek_v3"]["router"] == ["vectors", "groups"]
    assert facts["deepseek_v3"]["shared_experts"]
    assert facts["inkling_text"]["router"] == ["vectors", "spare rows"]
    assert facts["qwen3_next"]["token_mixing"] == ["linear_attention", "full_attention"]
    experts = {name: entry["experts"] for name, entry in facts.items() if entry["experts"]}
    assert experts == {
        "aria_text": ["transposed"],
        "gpt_oss": ["transposed", "interleaved", "bias"],
        "muse_spark": ["norm"],
        "nemotron_h": ["no gate"],
    }


def test_a_family_that_does_not_work_says_what_the_library_says():
    (facts,) = json.loads(run("deepseek_v4", "--json").stdout)
    assert facts["problem"] == UNSUPPORTED["deepseek_v4"]
    assert "tid2eid" in facts["refusal"]
    assert facts["layers"] == []


def test_an_unknown_family_gets_the_nearest_names():
    result = run("olmo")
    assert result.exit_code == 1
    assert "olmoe" in result.stderr
    assert not result.stdout
