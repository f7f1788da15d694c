import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.compress.apply import compress
from coterie.compress.layer_plan import ExpertPlan, LayerPlan, ragged_plan
from coterie.model.arch.inspect import inspect
from coterie.report.gather import entries_of, gather
from coterie.report.layers import expert_shares, layer_kind, share_left
from coterie.report.page import report
from coterie.testing import tiny_text
from some import first

from .conftest import Page

Maker = Callable[..., Any]


def test_narrower_experts_are_said_to_be_narrower(make_run: Maker) -> None:
    run = make_run()
    run.narrower("slim", 8, notes={"slim": {"score": "heapr", "share_of_score": 0.9}})

    page = Page(report(run.folder))
    text = " ".join(page.text.split())

    assert page.row("heapr")[2:4] == ["8 → 8 width 16 → 8", "50 %"]
    assert "2 MoE layers · 8 experts a layer · width 16 · top 2" in text
    assert "neurons of each of 8 experts in each of 2 layers" in text
    assert "8 experts in each of 2 layers, width 8 of 16, plain router" in text
    assert "Every expert keeps 8 of 16 neurons." in text
    assert ["Layer", "Experts", "Width", "Neurons left", "score", "share of score"] in page.rows
    assert ["0", "8 → 8", "16 → 8", "50.0 %", "heapr", "0.900"] in page.rows
    for words in ("unchanged", "Unchanged", "merged", "Every expert, layer by layer", "8 of 8"):
        assert words not in page.text


def test_experts_may_be_fewer_and_narrower(make_run: Maker) -> None:
    run = make_run()
    run.manifest("out", "reap", kept=4, shapes=[{"width_after": 8}] * 2)

    page = Page(report(run.folder))

    assert page.row("reap")[2:4] == ["8 → 4 width 16 → 8", "25 %"]
    assert "Experts that are left keep 8 of 16 neurons." in page.text
    assert ["Layer", "Experts", "Width", "Neurons left", "Narrower", "Dropped"] in page.rows
    assert ["0", "8 → 4", "16 → 8", "25.0 %", "4", "4"] in page.rows
    assert "narrower (8)" in page.text
    assert "Narrower: 0–3" in page.text


def test_ragged_experts_are_shown_one_by_one(make_run: Maker) -> None:
    run = make_run()
    run.ragged("slim", (16, 8, 8, 8, 0, 12, 12, 16), (1, 1, 2, 2, 3, 3, 2, 2))

    page = Page(report(run.folder))
    text = " ".join(page.text.split())

    assert page.row("heapr-ragged")[2:4] == ["8 → 8 width 16 → 0–16 mean 6.00", "38 %"]
    assert "of the experts' neurons: 0–16 of 16 in each of 8 experts, in 2 layers" in text
    assert "Every expert has a width of its own: 0–16 of 16 neurons, 6.00 on average." in text
    assert ["Layer", "Experts", "Width", "Mean width", "Neurons left", "Whole", "In part", "No neuron"] in page.rows
    assert ["0", "8 → 8", "16 → 0–16", "10.0", "62.5 %", "2", "5", "1"] in page.rows
    assert ["1", "8 → 8", "16 → 1–3", "2.00", "12.5 %", "0", "8", "0"] in page.rows
    assert "Expert (width): 0 (16), 1 (8), 2 (8), 3 (8), 4 (0), 5 (12), 6 (12), 7 (16)" in text
    assert "neurons of the expert that are left, in percent" in text
    assert "no neuron left (1)" in text
    assert "Experts that differ in width need Coterie, or the code beside them, to load." in text
    assert "Dropped" not in page.text


def test_experts_that_were_cut_are_shown_by_how_much_of_each_is_left(make_run: Maker) -> None:
    run = make_run()
    run.cut("parts", (4, 3, 2, 1, 0, 2, 2, 1), (2, 2, 2, 2, 2, 2, 1, 2))

    page = Page(report(run.folder))
    text = " ".join(page.text.split())

    assert page.row("coterie")[2:4] == ["8 → 15 parts width 16 → 4 2 → 4 a token", "47 %"]
    assert "parts of width 4, from 7–8 of 8 experts in each of 2 layers; 4 a token" in text
    assert "15 parts of width 4 in each of 2 layers, from 7–8 of 8 experts, 4 a token, plain router" in text
    assert "Each expert was cut into 4 parts of 4 neurons" in text
    assert "a token chooses 4 parts, where it chose 2 experts" in text
    assert next(row for row in page.rows if row[:3] == ["Layer", "Experts", "Parts"])[3:7] == [
        "Neurons left", "Whole", "In part", "Dropped",
    ]  # fmt: skip
    assert next(row for row in page.rows if "32 → 15" in row)[:7] == ["0", "8 → 7", "32 → 15", "46.9 %", "1", "6", "1"]
    assert re.findall(r'<p class="also">([^<]+: [^<]+)</p>', page.source) == [
        "Whole: 0", "3 of 4 parts: 1", "2 of 4 parts: 2, 5, 6", "1 of 4 parts: 3, 7", "Dropped: 4",
        "2 of 4 parts: 0–5, 7", "1 of 4 parts: 6",
    ]  # fmt: skip
    assert "dropped (1)" in text
    for words in ("←", "unchanged", "Unchanged", "merged", "Merged", "8 of 8 experts a"):
        assert words not in page.text


def test_results_that_shrank_in_different_ways_meet_where_as_many_neurons_are_left(make_run: Maker) -> None:
    run = make_run()
    run.base_card()
    run.manifest("pruned", "reap", kept=4)
    run.narrower("slim", 8)
    run.cut("parts", (2,) * 8, (2,) * 8, top_k=2)
    run.narrower("slimmer", 4)
    for name, kl in (("pruned", 0.5), ("slim", 0.3), ("parts", 0.1), ("slimmer", 0.9)):
        run.card(name, kl)

    entries = entries_of(gather(run.folder))
    page = Page(report(run.folder))

    assert [(entry.label, entry.neuron_share) for entry in entries] == [
        ("grandmother", None), ("coterie · 16 parts", 0.5), ("heapr · width 8", 0.5), ("reap · 4", 0.5),
        ("heapr · width 4", 0.25),
    ]  # fmt: skip
    assert [entry.size for entry in entries[2:]] == ["50\u202f% of the experts' neurons"] * 2 + [
        "8 experts a layer, width 4 of 16"
    ]
    assert page.row("50 % of the experts' neurons")[1] == "coterie · 16 parts"
    assert page.row("reap · 4")[2:4] == ["8 → 4", "50 %"]
    assert page.row("8 experts a layer, width 4 of 16")[1] == "heapr · width 4"


def test_plans_name_width_and_parts_and_are_known_again_when_carried_out(make_run: Maker) -> None:
    run = make_run()
    for name, size in (
        ("narrow", LayerPlan(num_experts=8, width=8)),
        ("ragged", ragged_plan((16, 16, 1, 1, 2, 2, 1, 1))),
        ("cut", LayerPlan(num_experts=15, width=4, top_k=4)),
    ):
        run.plan(name, size=size).save(run.folder / "plans" / f"{name}.json")
    run.plan().save(run.folder / "plans" / "done.json")
    run.manifest("merged", plan=run.plan().body())

    page = Page(report(run.folder))

    assert page.row("plans/narrow.json")[3] == "8, width 8"
    assert page.row("plans/ragged.json")[3] == "8, width 1–16, mean 5.00"
    assert page.row("plans/cut.json")[3] == "15 parts of width 4, 4 a token"
    assert not any(row[0] == "plans/done.json" and len(row) == 8 for row in page.rows if row)


def test_a_plan_that_names_no_experts_is_known_again_when_it_was_executed(make_run: Maker) -> None:
    run = make_run()
    plan = run.plan()
    plan.save(run.folder / "plans" / "done.json")
    executed = plan.body()
    for layer in executed["layers"]:
        layer["experts"] = [{"sources": [expert]} for expert in range(layer["num_experts"])]
    run.manifest("merged", plan=executed)
    other = replace(plan, layers=(replace(plan.layers[0], experts=(ExpertPlan(sources=(3,)),)), *plan.layers[1:]))
    other.save(run.folder / "plans" / "other.json")

    page = Page(report(run.folder))

    listed = [row[0] for row in page.rows if row and len(row) == 8]
    assert "plans/other.json" in listed
    assert "plans/done.json" not in listed


@pytest.mark.parametrize("recipe", first(2, ["heapr-ragged", "coterie-local", "reap", "heapr"]))
def test_results_as_they_are_written_are_understood(
    make_run: Maker, tiny: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    run = make_run()
    model, text = tiny(), tiny_text(tmp_path / "text", documents=2)
    compress(model, run.folder / "out", keep=0.5, recipe=recipe, text=text, tokens=512, seq_len=64)

    [entry] = entries_of(gather(run.folder))
    result = entry.result
    page = Page(report(run.folder))

    assert result is not None
    layers = result.manifest.layers
    assert {layer_kind(layer) for layer in layers} == {
        {"reap": "whole", "heapr": "narrower", "heapr-ragged": "ragged", "coterie-local": "cut"}[recipe]
    }
    original = inspect(model)
    assert result.fixed_bytes == original.total.bytes - original.parts["experts"].bytes
    assert result.expert_bytes == pytest.approx((entry.neuron_share or 0) * original.parts["experts"].bytes)
    for layer in layers:
        assert sum(expert_shares(layer)) / layer.num_experts_before == pytest.approx(share_left([layer]))
    assert page.row(recipe)[2].startswith(f"{layers[0].num_experts_before} → {layers[0].num_experts_after}")
