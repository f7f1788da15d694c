import json
import logging
import re
import shutil
from pathlib import Path

import pytest

import coterie
from coterie.bench import run, tasks
from coterie.bench.run import bench
from coterie.compress.recipes import EFFORTS
from coterie.errors import InputError, NotACheckpoint, OutputBusy, OutputExists, TextError, UnknownName
from coterie.evaluate.scorecard import Scorecard


def measures(cell):
    """Return what a cell says apart from times and memory."""
    return {key: value for key, value in cell.items() if key not in ("seconds", "peak_bytes")}


@pytest.fixture
def again(made, tmp_path, tiny, small):
    """Return a function that runs a bench in a copy of the finished one."""

    def run_again(**changes):
        out = tmp_path / "out"
        if not out.exists():
            shutil.copytree(made.out, out)
        return bench(tiny(), out, **(small | changes))

    return run_again


def test_every_cell_is_there_once(made):
    expected = [
        (seed, removed, method)
        for seed in (0, 1)
        for removed in (0.5,)
        for method in ("reap", "hc-smoe", "hc-smoe (map)")
    ]
    assert [(cell["seed"], cell["removed"], cell["method"]) for cell in made.cells] == expected
    assert made.computed == 6
    assert {cell["status"] for cell in made.cells} == {"done"}
    lines = [json.loads(line) for line in (made.out / "cells.jsonl").read_text().splitlines()]
    assert lines == list(made.cells)


def test_a_cell_is_what_the_commands_say(small, text, tiny, tmp_path, made):
    cell = next(cell for cell in made.cells if (cell["method"], cell["removed"], cell["seed"]) == ("hc-smoe", 0.5, 1))
    shared = {"text": text, "tokens": 512, "seq_len": 64}
    profile = coterie.profile(tiny(), sample_tokens=256, seed=1, **shared)
    made_by_hand = coterie.compress(tiny(), tmp_path / "small", keep=0.5, recipe="hc-smoe", profile=profile, seed=1)
    [card] = coterie.evaluate(made_by_hand.out, against=tiny(), text=text, tokens=256, seq_len=64, questions=2)
    for key, value in card.overall.items():
        assert cell[key] == pytest.approx(value, rel=1e-6), key
    assert cell["bytes"] == card.num_bytes
    assert cell["bytes_ratio"] == card.bytes_ratio
    assert cell["domains"].keys() == card.domains.keys()
    assert cell["domains"]["code"]["kl"] == pytest.approx(card.domains["code"]["kl"], rel=1e-6)
    assert cell["num_experts"] == [4, 4]
    assert cell["loads_with"] == "transformers"
    assert set(cell["seconds"]) == {"profile", "compress", "evaluate", "stages"}
    assert all(cell["seconds"][key] > 0 for key in ("profile", "compress", "evaluate"))


@pytest.mark.long
def test_data_sets_and_answers_are_measured_as_the_commands_measure_them(small, tiny, tmp_path):
    pytest.importorskip("datasets")
    for name, answer in (("calibration", "the mat"), ("test", "the sofa")):
        rows = [{"prompt": f"Where does cat {n} sit? ", "completion": f"On {answer}, or {n}."} for n in range(60)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, test = (f"hf:{tmp_path / name}" for name in ("calibration", "test"))
    changes = {"text": text, "test": test, "recipes": "reap", "routers": ("plain",), "seeds": 1, "on": "assistant"}
    [cell] = bench(tiny(), tmp_path / "out", **(small | changes)).cells
    profile = coterie.profile(tiny(), text=text, tokens=512, seq_len=64, sample_tokens=256, on="assistant")
    by_hand = coterie.compress(tiny(), tmp_path / "small", keep=0.5, recipe="reap", profile=profile)
    shared = {"against": tiny(), "text": test, "tokens": 256, "seq_len": 64}
    [card] = coterie.evaluate(by_hand.out, on="assistant", **shared)
    assert list(cell["domains"]) == ["test"]
    assert cell["tokens"] == card.overall["tokens"] < coterie.evaluate(by_hand.out, **shared)[0].overall["tokens"]
    assert cell["kl"] == pytest.approx(card.overall["kl"], rel=1e-6)
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert [settings[name] for name in ("text", "test", "on")] == ["hf:calibration", "hf:test", "assistant"]


def test_text_without_answers_is_refused_before_anything_is_made(small, tiny, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "rows.jsonl").write_text('{"words": "one"}\n')
    with pytest.raises(TextError, match=r"is plain text, in which nothing is an answer"):
        bench(tiny(), tmp_path / "out", **(small | {"on": "assistant"}))
    pytest.importorskip("datasets")
    with pytest.raises(TextError, match=r'has no column "text"'):
        bench(tiny(), tmp_path / "out", **(small | {"test": f"hf:{tmp_path / 'plain'}"}))
    with pytest.raises(UnknownName, match="choice of tokens"):
        bench(tiny(), tmp_path / "out", **(small | {"on": "answers"}))
    assert not (tmp_path / "out").exists()


def test_draws_differ_in_the_calibration_text_only(made):
    cells = [cell for cell in made.cells if (cell["method"], cell["removed"]) == ("hc-smoe", 0.5)]
    assert cells[0]["kl"] != cells[1]["kl"]
    assert cells[0]["tokens"] == cells[1]["tokens"] == 252
    assert {cell["bytes"] for cell in cells} == {cells[0]["bytes"]}


def test_the_original_is_scored_too(text, tiny, made):
    [(name, card)] = made.originals.items()
    assert name == tiny().name
    [alone] = coterie.evaluate(tiny(), text=text, tokens=256, seq_len=64, questions=2)
    assert card.overall["perplexity"] == pytest.approx(alone.overall["perplexity"], rel=1e-6)
    assert card.overall["accuracy"] == alone.overall["accuracy"]
    assert card.overall["kl"] == pytest.approx(0, abs=1e-6)
    [file] = (made.out / "originals").iterdir()
    assert Scorecard.load(file) == card


def test_a_second_call_computes_nothing(again, made, monkeypatch):
    monkeypatch.setattr(run, "open_pool", None)
    found = again()
    assert found.computed == 0
    assert found.cells == made.cells
    assert found.table == made.table == (found.out / "table.md").read_text()


def test_only_what_is_new_is_computed(again, made, monkeypatch):
    made_profiles = []
    monkeypatch.setattr(tasks, "profile", lambda *args, **options: made_profiles.append(options))
    found = again(removed=(0.5, 0.625), recipes="reap", seeds=1)
    assert found.computed == 1
    assert not made_profiles
    assert [measures(cell) for cell in found.cells[:1]] == [
        measures(cell) for cell in made.cells if cell["method"] == "reap" and cell["seed"] == 0
    ]
    assert len((found.out / "cells.jsonl").read_text().splitlines()) == 7


@pytest.mark.long
def test_an_end_within_a_line_costs_one_cell(tmp_path, again, made, caplog):
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    lines = (out / "cells.jsonl").read_bytes().splitlines(keepends=True)
    (out / "cells.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:100])
    found = again()
    assert "ended within a line" in caplog.text
    assert found.computed == 2
    assert [measures(cell) for cell in found.cells] == [measures(cell) for cell in made.cells]


@pytest.mark.long
def test_what_was_finished_before_an_error_is_kept(small, tiny, tmp_path, made, monkeypatch):
    def stop(entry, count=[], say=run._say):  # noqa: B006
        count.append(entry)
        if len(count) == 1:
            raise KeyboardInterrupt
        return say(entry)

    out = tmp_path / "out"
    settings = small | {"recipes": "reap"}
    monkeypatch.setattr(run, "_say", stop)
    with pytest.raises(KeyboardInterrupt):
        bench(tiny(), out, **settings)
    assert not (out / "work").exists()
    monkeypatch.undo()
    found = bench(tiny(), out, **settings)
    assert found.computed == 1
    same = [cell for cell in made.cells if cell["method"] == "reap"]
    assert [measures(cell) for cell in found.cells] == [measures(cell) for cell in same]


@pytest.mark.long
def test_what_cannot_be_done_is_said_and_not_tried_again(
    again,
):
    found = again(removed=(0.5, 0.875), recipes="reap", seeds=1)
    cell = found.cells[1]
    assert cell["status"] == "infeasible"
    assert cell["error"] == "Infeasible"
    assert "1 experts a layer cannot be routed" in cell["reason"]
    assert "every token chooses 2 experts" in cell["reason"]
    assert f"- reap, 87.5 % removed: infeasible: {cell['reason']}" in found.table
    assert again(removed=(0.5, 0.875), recipes="reap", seeds=1).computed == 0


@pytest.mark.long
def test_what_memory_refused_is_tried_again_and_a_cell_says_whether_it_trained(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setitem(EFFORTS, "balanced", 128)
    arguments = {
        "text": text, "test": text, "tokens": 128, "test_tokens": 64, "seq_len": 16, "sample_tokens": 64,
        "questions": 0, "jobs": 0, "recipes": "coterie", "routers": ("plain",), "removed": (0.5,), "seeds": 1,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("coterie.model.stream.memory.free_bytes", lambda device: 2**20)
        [cell] = bench(tiny(), tmp_path / "out", **arguments).cells
    assert (cell["status"], cell["error"]) == ("infeasible", "NotEnoughMemory")
    assert "more than was free" in cell["reason"]
    [cell] = bench(tiny(), tmp_path / "out", max_memory="100GiB", **arguments).cells
    assert cell["status"] == "done"
    assert cell["trained"] is True
    assert bench(tiny(), tmp_path / "out", **arguments).computed == 0
    [cell] = bench(tiny(), tmp_path / "out", effort="fast", **arguments).cells
    assert cell["trained"] is False


@pytest.mark.long
def test_an_error_of_ours_is_one_failed_cell_that_is_tried_again(small, tiny, tmp_path, made, monkeypatch):
    def broken(*arguments, compress=tasks.compress, **options):
        if options["seed"] == 0:
            raise RuntimeError("no such luck")
        return compress(*arguments, **options)

    monkeypatch.setattr(tasks, "compress", broken)
    settings = small | {"recipes": "reap"}
    found = bench(tiny(), tmp_path / "out", **settings)
    assert [cell["status"] for cell in found.cells] == ["failed", "done"]
    assert found.failed == (found.cells[0],)
    assert found.cells[0]["reason"] == "no such luck"
    assert "in broken" in found.cells[0]["traceback"]
    monkeypatch.undo()
    found = bench(tiny(), tmp_path / "out", **settings)
    assert found.computed == 1
    assert not found.failed
    same = [cell for cell in made.cells if cell["method"] == "reap"]
    assert [measures(cell) for cell in found.cells] == [measures(cell) for cell in same]


@pytest.mark.long
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])  # each starts an interpreter
def test_workers_find_the_same(small, tiny, tmp_path, made, caplog, jobs):
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO, logger="coterie.bench"):
        found = bench(tiny(), out, **(small | {"jobs": jobs, "recipes": "reap"}))
    same = [cell for cell in made.cells if cell["method"] == "reap"]
    assert [measures(cell) for cell in found.cells] == [measures(cell) for cell in same]
    assert len(re.findall(r"^\[\d+/2\] .*: KL \d\.\d{4}, \d+ KiB, ", "\n".join(caplog.messages), re.MULTILINE)) == 2


@pytest.mark.long
def test_results_are_kept_on_request(small, tiny, tmp_path, made):
    changes = {"recipes": "hc-smoe", "removed": (0.5,), "seeds": 1, "keep_results": True}
    found = bench(tiny(), tmp_path / "out", **(small | changes))
    kept = sorted(path.name for path in (found.out / "results" / tiny().name).iterdir())
    assert kept == ["hc-smoe-map-0.5-seed0", "hc-smoe-plain-0.5-seed0"]
    model = coterie.load_model(found.out / "results" / tiny().name / kept[1])
    assert model.config.num_experts == 4
    assert not (made.out / "results").exists()


def test_nothing_is_left_but_what_was_found(made):
    names = [".lock", "cells.jsonl", "originals", "plot.svg", "profiles", "results.json", "table.md"]
    assert sorted(path.name for path in made.out.iterdir()) == names
    content = json.loads((made.out / "results.json").read_text())
    assert content["cells"] == list(made.cells)
    assert len(content["rows"]) == 3
    assert content["settings"]["tokens"] == 512
    assert str(made.out.parent) not in json.dumps(content)


@pytest.mark.long
def test_two_models_are_told_apart(small, tiny, tmp_path):
    models = [tiny(), tiny("mixtral")]
    settings = small | {"recipes": ["reap"], "removed": [0.5], "seeds": (3,)}
    found = bench(models, tmp_path / "out", **settings)
    assert [(cell["model"], cell["seed"]) for cell in found.cells] == [(model.name, 3) for model in models]
    assert all(f"## {model.name}\n" in found.table for model in models)
    with pytest.raises(InputError, match=r"need distinct names"):
        bench([tiny(), tiny()], tmp_path / "other", **settings)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"recipes": "reep"}, UnknownName, "did you mean reap"),
        ({"recipes": ","}, InputError, "no recipe was named"),
        ({"routers": ["flat"]}, UnknownName, "router form 'flat'"),
        ({"routers": []}, InputError, "no router form"),
        ({"effort": "none"}, UnknownName, "effort 'none'"),
        ({"removed": [0.5, 1]}, InputError, "1 of the experts cannot be removed"),
        ({"removed": []}, InputError, "no share"),
        ({"seeds": 0}, InputError, "no seed"),
        ({"jobs": -1}, InputError, "--jobs -1 cannot be"),
        ({"models": []}, InputError, "no model"),
        ({"models": Path("nowhere")}, NotACheckpoint, "does not exist"),
        ({"text": Path("nowhere")}, TextError, "not a folder"),
        ({"test": Path("nowhere")}, TextError, "not a folder"),
    ],
)
def test_nonsense_is_refused_before_anything_is_made(small, tiny, tmp_path, change, error, message):
    arguments = {"models": tiny()} | small | change
    with pytest.raises(error, match=message):
        bench(arguments.pop("models"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "--tokens 0 cannot be; give a whole number from 1"),
        ({"test_tokens": -1}, "--test-tokens -1 cannot be"),
        ({"sample_tokens": 2**63}, "--sample-tokens 9223372036854775808 cannot be"),
        ({"questions": -1}, "--questions -1 cannot be; give a whole number from 0"),
        ({"seq_len": 1}, "--seq-len 1 cannot be; give a whole number from 2"),
        ({"jobs": 10**6}, "--jobs 1000000 cannot be; give a whole number from 0 to 1024"),
        ({"seeds": [2**64]}, "seed 18446744073709551616 cannot be"),
    ],
)
def test_amounts_that_cannot_be_are_refused_before_anything_is_made(small, tiny, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        bench(tiny(), tmp_path / "out", **small | change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_bench_that_ends_before_anything_was_finished_leaves_no_folder(small, tiny, tmp_path, monkeypatch, there):
    def refuse(jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "open_pool", refuse)
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        bench(tiny(), tmp_path / "out", **small)
    assert (tmp_path / "out").exists() == there


def test_a_folder_of_something_else_is_not_written_to(small, tiny, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputExists, match="exists; choose another place"):
        bench(tiny(), tmp_path, **small)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_one_bench_writes_at_a_time(small, tiny, tmp_path, made):
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    with run.FileLock(out / ".lock"), pytest.raises(OutputBusy, match="another bench"):
        bench(tiny(), out, **small)
