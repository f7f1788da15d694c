"""``coterie families``: every family is listed, with what its code in transformers says of it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import transformers
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.errors import CoterieError, UnknownName
from coterie.testing import describe
from coterie.testing.describe import compare, describe_families
from coterie.testing.facts import FILE, FamilyFacts, FamilyTable, known_families
from coterie.testing.families import TINY, UNSUPPORTED

SOME = ("aria_text", "deepseek_v3", "gpt_oss", "inkling_text", "muse_spark", "nemotron_h", "olmoe", "qwen3_next")


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
    last = result.stdout.splitlines()[-1]
    assert f"{works} of {len(TINY)} families work with transformers {known_families().transformers}" in last
    assert not result.stderr


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_facts_are_those_of_the_family_s_code(check):
    result = run("--json", *check, *SOME)
    assert result.exit_code == 0, result.output
    facts = {entry["model_type"]: entry for entry in json.loads(result.stdout)}
    assert tuple(facts) == SOME
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


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_family_that_does_not_work_says_what_the_library_says(check):
    (facts,) = json.loads(run("deepseek_v4", "--json", *check).stdout)
    assert facts["problem"] == UNSUPPORTED["deepseek_v4"]
    assert "tid2eid" in facts["refusal"]
    assert facts["layers"] == []


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_an_unknown_family_gets_the_nearest_names(check):
    result = run("olmo", *check)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unknown model family 'olmo'; did you mean olmoe")
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    with pytest.raises(UnknownName):
        known_families().select(["olmoe", "olmo"])


def test_the_table_is_read_without_torch_or_transformers():
    program = """
import sys
from coterie.cli.main import app
app(["families"], standalone_mode=False)
print(*sorted({"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)), "loaded")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"
    assert "olmoe" in done.stdout


@pytest.mark.slow
def test_the_table_is_what_the_installed_transformers_says():
    known, now = known_families(), describe_families()
    assert now == known, f"python -m coterie.testing.describe --write mends it: {compare(known, now)}"
    assert known.transformers == transformers.__version__


def test_a_written_table_is_read_as_it_was_and_the_shipped_one_is_written_so(tmp_path):
    describe.write(known_families(), tmp_path / "families.json")
    assert known_families(tmp_path / "families.json") == known_families()
    assert (tmp_path / "families.json").read_bytes() == FILE.read_bytes()


def test_what_differs_is_said_fact_by_fact():
    old = FamilyFacts(model_type="a", model_class="A", layers=("moe",), router=("groups",))
    new = replace(old, router=(), problem="it should work, and does not")
    other = FamilyFacts(model_type="b", model_class="B")
    known = FamilyTable(transformers="1", families=(old, replace(other, model_type="c")))
    assert compare(known, FamilyTable(transformers="2", families=(new, other))) == (
        "a: router is none, was groups",
        "a: problem is 'it should work, and does not', was None",
        "b: is not in the table",
    )
    assert compare(known, known) == ()


def test_a_check_that_finds_a_difference_says_so_and_ends_with_1(monkeypatch):
    def fail(model_type):
        raise CoterieError(f"{model_type} was changed")

    monkeypatch.setattr(describe, "describe_family", fail)
    result = run("--check", "--json", "olmoe")
    assert result.exit_code == 1
    (facts,) = json.loads(result.stdout)
    assert facts["problem"] == "it should work, and does not"
    assert facts["refusal"] == "olmoe was changed"
    assert f"with transformers {transformers.__version__}: olmoe: layers is none, was moe, moe\n" in result.stderr
    assert "olmoe: refusal is 'olmoe was changed', was None\n" in result.stderr
