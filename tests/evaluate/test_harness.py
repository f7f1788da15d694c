"""The bridge to the lm-evaluation-harness; where the extra is not installed, what is said then."""

import json
import logging
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from coterie.cli.main import app
from coterie.compress.apply import compress
from coterie.errors import Infeasible, InputError, UnknownName
from coterie.evaluate import harness, run, speed
from coterie.evaluate.run import evaluate
from coterie.evaluate.scorecard import Scorecard
from coterie.model.arch.load import load_model
from coterie.model.disk.tokenizer import load_tokenizer

TASKS = Path(__file__).parents[2] / "docs" / "examples" / "harness"
OWN = {"tasks": ["sums_choose", "sums_write"], "include_path": TASKS}
QUESTIONS = [json.loads(line) for line in (TASKS / "sums.jsonl").read_text().splitlines()]

installed = pytest.mark.skipif(
    any(find_spec(name) is None for name in harness._NEEDED), reason="needs pip install 'coterie[eval]'"
)
#: What other people's code does is not ours to mend.
others = pytest.mark.filterwarnings("default")


def test_without_the_extra_the_command_that_installs_it_is_said(base_path, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "Stream", None)
    with pytest.raises(InputError, match=r"\(lm_eval, accelerate, datasets not found\): pip install 'coterie\[eval\]'"):
        evaluate(base_path, **OWN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a text folder with --text, or tasks with --tasks"),
        ({"tasks": ["a"], "against": "x"}, "take text"),
        ({"tasks": ["a"], "speed_seconds": 0}, "take text"),
        ({"tasks": ["a"], "limit": 0}, "limit is 0"),
        ({"text": "x", "limit": 3}, "about tasks"),
        ({"text": "x", "include_path": "y"}, "about tasks"),
    ],
)
def test_what_does_not_fit_together_is_refused(base_path, arguments, message, monkeypatch):
    monkeypatch.setattr(run, "Stream", None)
    with pytest.raises(InputError, match=message):
        evaluate(base_path, **arguments)
    with pytest.raises(InputError, match="no task was named"):
        harness.run_tasks(base_path, [])


def test_a_model_that_does_not_fit_as_a_whole_is_refused(base_path, monkeypatch):
    monkeypatch.setattr(run, "find_tasks", lambda *arguments, **options: None)
    monkeypatch.setattr(speed.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**29}))
    with pytest.raises(
        Infeasible, match=r"--tasks with models in memory as a whole takes.*512 MiB are free: leave --tasks out"
    ):
        evaluate(base_path, **OWN)


def test_metrics_are_named_without_the_harness_own_none():
    found = harness._metrics(
        {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,first": 1, "em_stderr,first": float("nan")}
    )
    assert found == {"acc": 0.5, "acc_stderr": None, "em [first]": 1.0, "em_stderr [first]": None}


def test_scorecards_keep_tasks_and_older_ones_have_none(base_path, text_path, tmp_path, monkeypatch):
    tasks = {"sums": {"acc": 0.25, "acc_stderr": None, "examples": 4}}
    monkeypatch.setattr(run, "find_tasks", lambda *arguments, **options: None)
    monkeypatch.setattr(run, "run_tasks", lambda *arguments, **options: tasks)
    [card] = evaluate(base_path, text=text_path, tokens=128, seq_len=32, questions=0, tasks=["sums"])
    assert card.tasks == tasks
    assert card.overall["perplexity"] > 1
    assert Scorecard.load(card.save(tmp_path / "card.json")) == card
    document = json.loads((tmp_path / "card.json").read_text())
    del document["body"]["tasks"], document["digest"]
    document["format"] = 1
    from coterie.artifact import digest_of

    document["body_digest"] = digest_of(document["body"])
    (tmp_path / "old.json").write_text(json.dumps(document))
    assert Scorecard.load(tmp_path / "old.json").tasks == {}


def test_tasks_without_text_have_a_scorecard_of_their_own(base_path, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "find_tasks", lambda *arguments, **options: None)
    monkeypatch.setattr(run, "run_tasks", lambda *arguments, **options: {"sums": {"acc": 0.25, "examples": 4}})
    out = tmp_path / "card.json"
    result = CliRunner().invoke(app, ["evaluate", str(base_path), "--tasks", "sums", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "task metric value standard error examples" in lines
    assert "sums acc 0.2500 - 4" in lines
    card = Scorecard.load(out)
    assert card.domains == {}
    assert card.overall["tokens"] == 0
    assert card.num_bytes > 0


@pytest.fixture(scope="module")
def mapped(base_path, text_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("mapped") / "out"
    compress(base_path, out, keep=0.5, recipe="hc-smoe", router="map", text=text_path, tokens=256, seq_len=32)
    return out


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def slow_choices(path):
    """Return the share of questions whose right choice is the likeliest, and the likeliest a letter."""
    model, tokenizer = load_model(path), load_tokenizer(path)
    hits = {"acc": 0, "acc_norm": 0}
    for entry in QUESTIONS:
        prompt = tokenizer(entry["question"])["input_ids"]
        totals = []
        for choice in entry["choices"]:
            ids = tokenizer(f"{entry['question']} {choice}")["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            totals.append(sum(float(log_p[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
        by_letter = [total / len(choice) for total, choice in zip(totals, entry["choices"], strict=True)]
        hits["acc"] += totals.index(max(totals)) == entry["right"]
        hits["acc_norm"] += by_letter.index(max(by_letter)) == entry["right"]
    return {name: count / len(QUESTIONS) for name, count in hits.items()}


@installed
@others
@pytest.mark.parametrize("kind", ["plain", "mapped"])
def test_a_task_of_ones_own_runs_on_any_result_without_a_hub(base_path, request, kind, capfd):
    path = base_path if kind == "plain" else request.getfixturevalue("mapped")
    seed_all(3)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    seed_all(3)
    [card] = evaluate(path, **OWN)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert card.tasks["sums_choose"]["examples"] == card.tasks["sums_write"]["examples"] == len(QUESTIONS) == 24
    assert {name: card.tasks["sums_choose"][name] for name in ("acc", "acc_norm")} == slow_choices(path)
    assert 0 <= card.tasks["sums_write"]["exact_match [stripped]"] <= 1
    said = capfd.readouterr()
    assert not said.out
    assert "requests" not in said.err
    assert "fatal" not in said.err
    assert logging.getLogger("lm_eval").level != logging.ERROR


@installed
@others
def test_fewer_examples_on_request(base_path):
    assert harness.run_tasks(base_path, ["sums_choose"], include_path=TASKS, limit=3)["sums_choose"]["examples"] == 3


@installed
@others
@pytest.mark.slow
def test_an_unknown_task_is_named_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean arc_easy"):
        harness.find_tasks(["arc_eazy"])
    with pytest.raises(InputError, match="unknown task 'qqqqqqqqqqqq'; `lm-eval ls tasks`"):
        harness.find_tasks(["qqqqqqqqqqqq"])
    with pytest.raises(InputError, match="nowhere is not a folder"):
        harness.find_tasks(["arc_easy"], include_path="nowhere")
