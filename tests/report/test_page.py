import json
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from coterie.artifact import write_artifact, write_json
from coterie.errors import CorruptArtifact, InputError, StaleArtifact
from coterie.model.arch.inspect import inspect
from coterie.model.disk.checkpoint import Checkpoint
from coterie.report.gather import entries_of, gather
from coterie.report.page import report

from .conftest import Page

Maker = Callable[..., Any]
HOSTILE = "<script>alert('x')</script>\"&"


def test_a_full_run_has_every_section(full_run: Any) -> None:
    path = report(full_run.folder)

    page = Page(path)
    assert path == full_run.folder / "report.html"
    assert page.sections == ["headline", "results", "costs", "experts", "changes", "sizes", "provenance"]
    assert {link for link in page.links if link.startswith("#")} == {f"#{section}" for section in page.sections}
    assert len(page.source) < 200_000
    for words in (
        "KL from the original", "Perplexity, as a multiple", "Usage by domain", "How evenly", "How specialised",
        "strongest specialists", "Which experts are alike", "Mean outputs", "Router scores", "Size against cost",
        "Plans that were not carried out", "How to load", "Time by stage", "Where they were scored",
    ):  # fmt: skip
        assert words in page.text


def test_the_page_loads_nothing(full_run: Any) -> None:
    page = Page(report(full_run.folder))

    assert not {"script", "iframe", "link", "object", "embed", "base", "form"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"https?://|@import|url\(", page.source)
    assert str(full_run.folder.parent) not in page.source


def test_equal_artefacts_give_equal_bytes(full_run: Any, tmp_path: Path) -> None:
    first = report(full_run.folder, tmp_path / "a.html").read_bytes()

    assert report(full_run.folder, tmp_path / "b.html").read_bytes() == first
    report(full_run.folder)
    assert report(full_run.folder).read_bytes() == first


def test_the_table_holds_the_numbers_base_first_and_best_marked(full_run: Any) -> None:
    page = Page(report(full_run.folder))

    start = next(i for i, row in enumerate(page.rows) if row[:3] == ["Recipe", "Router", "Experts a layer"])
    header, base, *others = page.rows[start : start + 7]
    assert header[3:] == [
        "Bytes", "of original", "Perplexity", "× original", "KL", "Top-1 agreement", "Exact answers", "Speed",
    ]  # fmt: skip
    assert base == ["original", "–", "–", "977 KiB", "100 %", "10.0", "1.00×", "–", "–", "50.0 %", "1.25×"]
    assert [row[0] for row in others] == [
        "6 experts a layer",
        "reap",
        "4 experts a layer",
        "mergemoe · map",
        "mergemoe",
    ]
    assert others[3][1:3] == ["map", "8 → 4"]
    assert others[3][4:9] == ["75 %", "15.0", "1.50×", "0.125", "93.8 %"]
    assert re.findall(r'class="best">([^<]+)<', page.source) == ["0.125", "93.8\u202f%"]


def test_the_headline_names_the_result_that_costs_least(full_run: Any) -> None:
    page = Page(report(full_run.folder))
    text = " ".join(page.text.split())

    assert "3 compressed results of grandmother. mergemoe · map costs least:" in text
    assert "4 of 8" in text
    assert "Hardest hit: prose (KL 0.250). Least: code (0.125)." in text
    assert page.row("6 experts a layer")[1] == "reap"


def test_heat_tables_hold_every_domain(full_run: Any) -> None:
    page = Page(report(full_run.folder))

    start = next(i for i, row in enumerate(page.rows) if row == ["", "all", "code", "prose"])
    assert page.rows[start + 1 : start + 4] == [
        ["reap", "0.500", "0.500", "1.00"],
        ["mergemoe · map", "0.125", "0.125", "0.250"],
        ["mergemoe", "0.250", "0.250", "0.500"],
    ]
    assert ["mergemoe", "1.50×", "1.50×", "1.50×"] in page.rows


def test_what_was_merged_and_dropped_is_listed(make_run: Maker) -> None:
    run = make_run()
    run.manifest("merged", expert_map=[0, 1, 1, 2, 3, 0, 0, 1], centres=[5, 2, 3, 4])
    run.manifest("pruned", "reap", expert_map=[-1, 0, 1, -1, -1, 2, 3, -1], centres=[1, 2, 5, 6])

    text = " ".join(Page(report(run.folder)).text.split())

    assert "2 ← 1, 7 ×3" in text
    assert "5 ← 0, 6 ×3" in text
    assert "Unchanged: 3, 4" in text
    assert "Unchanged: 1, 2, 5, 6" in text
    assert "Dropped: 0, 3, 4, 7" in text
    assert "dropped (8)" in text  # the legend of the map counts both layers


def test_groups_without_centres_are_drawn(make_run: Maker) -> None:
    run = make_run()
    path = run.manifest("merged")
    document = json.loads(path.read_text())
    for layer in document["body"]["layers"]:
        layer["centres"] = None
    write_artifact(path, kind="manifest", body=document["body"], inputs=document["inputs"])

    text = " ".join(Page(report(run.folder)).text.split())

    assert "– ← 0, 4–7 ×5" in text
    assert "merged into a centre (10)" in text


def test_notes_of_passes_are_shown(full_run: Any) -> None:
    page = Page(report(full_run.folder))

    assert "0.500 with the average, 0.250 with re-fitted down projections" in page.text
    assert "Chosen ridge: 0.01 at the median" in page.text
    assert "0 of 2 merged experts kept the plain average" in page.text
    assert "noted by refit-down" in page.text


def test_a_profile_alone_makes_a_page(make_run: Maker) -> None:
    run = make_run()
    run.profile()

    page = Page(report(run.folder))

    assert page.sections == ["headline", "experts", "provenance"]
    assert "Nothing was compressed" in page.text


def test_a_profile_without_some_statistics_leaves_their_plots_out(make_run: Maker) -> None:
    run = make_run()
    run.profile(drop=("mean_output",))

    page = Page(report(run.folder))

    assert "Router scores" in page.text
    assert "Mean outputs" not in page.text

    other = make_run("other")
    other.profile(drop=("mean_output", "logit_sum"))
    assert "alike" not in Page(report(other.folder)).text


def test_one_domain_has_no_comparison_of_domains(make_run: Maker) -> None:
    run = make_run()
    run.profile(("only",))
    run.base_card(domains=("only",))
    run.card("small", domains=("only",))

    page = Page(report(run.folder))

    assert "How evenly" in page.text
    for words in ("How specialised", "Usage by domain", "specialists", "Hardest hit"):
        assert words not in page.text


def test_layers_of_different_sizes_and_unused_experts(make_run: Maker) -> None:
    run = make_run()
    usage = [np.array([[5.0, 0, 1], [5, 0, 9]]), np.zeros((2, 40))]
    run.profile(usage=usage, drop=("mean_output", "logit_sum", "logit_product"))

    assert "Never chosen: 41 of 43 experts" in Page(report(run.folder)).text


def test_scorecards_alone_and_without_a_base(make_run: Maker) -> None:
    run = make_run()
    run.card("one", None, base=None)
    run.card("two", None, base=None, factor=2.0, accuracy=None)

    page = Page(report(run.folder))

    assert page.sections == ["headline", "results", "costs", "provenance"]
    assert "KL" not in page.text
    assert "the lowest perplexity first" in page.text
    assert ["two", "20.0", "20.0", "40.0"] in page.rows
    assert page.row("one")[3:] == ["732 KiB", "15.0", "50.0 %"]
    assert page.row("two")[3:] == ["732 KiB", "20.0", "–"]


def test_results_that_were_not_scored_show_their_bytes(make_run: Maker) -> None:
    run = make_run()
    run.manifest("merged")

    page = Page(report(run.folder))

    assert page.sections == ["headline", "results", "changes", "sizes", "provenance"]
    assert page.row("mergemoe")[2:] == ["8 → 4", "732 KiB", "75 %"]


def test_a_broken_model_has_infinite_scores(make_run: Maker) -> None:
    run = make_run()
    run.base_card()
    run.card("broken", float("inf"), factor=float("inf"))
    run.card("fine", 0.1)

    page = Page(report(run.folder))

    assert page.row("broken")[5:8] == ["∞", "∞×", "∞"]
    assert "fine costs least" in " ".join(page.text.split())


def test_names_are_escaped_everywhere(make_run: Maker) -> None:
    run = make_run()
    run.profile((HOSTILE, "prose"))
    run.base_card(domains=(HOSTILE, "prose"))
    run.card(HOSTILE, domains=(HOSTILE, "prose"))
    run.manifest("merged", HOSTILE, model=HOSTILE, notes={HOSTILE: {HOSTILE: HOSTILE}},
                 passes=[[HOSTILE, {HOSTILE: HOSTILE}]], domains=[HOSTILE],
                 took={"seconds": {HOSTILE: 1.0}, "peak_bytes": 1})  # fmt: skip

    page = Page(report(run.folder))

    assert "script" not in page.tags
    assert "<script" not in page.source
    assert page.text.count("alert(") > 20


def test_what_a_compression_took_is_read_from_beside_its_manifest(make_run: Maker) -> None:
    run = make_run()
    run.manifest("merged", took={"seconds": {"profile": 4.5, "compress": 2}, "peak_bytes": 3 * 2**29, "device": "cpu"})
    [result] = gather(run.folder).results
    assert (dict(result.seconds), result.peak_bytes) == ({"profile": 4.5, "compress": 2.0}, 3 * 2**29)
    page = Page(report(run.folder))
    assert "1.50 GiB" in next(row for row in page.rows if "800" in row)
    assert "6.50 s" in " ".join(page.text.split())


def test_a_report_does_without_what_a_compression_took(make_run: Maker) -> None:
    run = make_run()
    path = run.manifest("merged").with_name("coterie-run.json")
    path.unlink()
    [result] = gather(run.folder).results
    assert (result.seconds, result.peak_bytes) == ({}, None)
    page = Page(report(run.folder))
    assert "Time by stage" not in page.text
    assert page.row("mergemoe")[2:4] == ["8 → 4", "732 KiB"]


@pytest.mark.parametrize("content", ["{", "[]", '{"seconds": {"plan": 1}}', '{"seconds": {"a": "b"}, "peak_bytes": 1}'])
def test_a_damaged_record_of_what_a_compression_took_is_refused(make_run: Maker, content: str) -> None:
    run = make_run()
    path = run.manifest("merged").with_name("coterie-run.json")
    path.write_text(content)
    with pytest.raises(CorruptArtifact, match=r"coterie-run\.json does not say .* remove it"):
        gather(run.folder)


def test_speed_is_not_shown_where_it_was_not_measured(make_run: Maker) -> None:
    run = make_run()
    run.base_card(timed=False)
    run.card("small", timed=False)
    page = Page(report(run.folder))
    assert page.row("small")[3:] == ["732 KiB", "75 %", "15.0", "1.50×", "0.250", "87.5 %", "50.0 %"]
    assert not any("Speed" in row for row in page.rows)


def test_manifest_and_scorecard_meet_by_digest_or_else_by_name(full_run: Any) -> None:
    entries = {entry.label: entry for entry in entries_of(gather(full_run.folder))}

    assert list(entries) == ["grandmother", "reap", "mergemoe · map", "mergemoe"]
    assert all(entry.result and entry.card for label, entry in entries.items() if label != "grandmother")
    assert entries["mergemoe"].score("perplexity_ratio", "code") == pytest.approx(1.5)
    assert entries["mergemoe"].score("kl", "unheard-of") is None
    assert entries["reap"].neuron_share == 0.75


def test_real_checkpoints_meet_by_digest_and_show_their_parts(make_run: Maker, tiny: Callable[..., Path]) -> None:
    run = make_run()
    copytree(tiny(), run.folder / "renamed")
    checkpoint = Checkpoint.open(run.folder / "renamed")
    run.manifest("renamed", bytes_before=2 * checkpoint.num_bytes, bytes_after=checkpoint.num_bytes)
    run.card("another name", digest=checkpoint.digest, num_bytes=checkpoint.num_bytes)

    [entry] = entries_of(gather(run.folder))

    assert entry.card is not None
    assert entry.card.model == "another name"
    assert entry.result is not None
    assert entry.result.expert_bytes == inspect(run.folder / "renamed").parts["experts"].bytes
    assert "Only routed experts" in Page(report(run.folder)).text


def test_labels_are_unique(make_run: Maker) -> None:
    run = make_run()
    for name, kept in (("a", 4), ("b", 4), ("c", 6)):
        run.manifest(name, kept=kept)
    run.manifest("d", "reap")

    labels = [entry.label for entry in entries_of(gather(run.folder))]

    assert labels == ["mergemoe · 6", "mergemoe · 4 (a)", "mergemoe · 4 (b)", "reap · 4"]


def test_a_model_that_was_scored_twice_is_shown_once_and_said_so(make_run: Maker) -> None:
    run = make_run()
    run.card("small", 0.1, place="a.json")
    run.card("small", 0.2, place="b.json")
    run.card("small", None, base=None, place="c.json")

    page = Page(report(run.folder))

    assert page.row("small")[-4] == "0.200"
    assert "a.json scores the same model on the same text as b.json" in page.text
    assert "c.json scores the same model on the same text as b.json" in page.text


def test_scores_on_different_texts_are_flagged(make_run: Maker) -> None:
    run = make_run()
    run.card("one")
    run.card("two", text="other")

    assert "2 different texts" in Page(report(run.folder)).text


def test_other_json_files_are_passed_over_and_other_kinds_named(full_run: Any) -> None:
    before = Page(report(full_run.folder)).source
    write_json(full_run.folder / "tokenizer.json", {"model": list(range(5000))})
    write_json(full_run.folder / "config.json", {"quantization_config": {"quant_method": "coterie"}})
    (full_run.folder / "merged" / "broken.json").write_text("{")
    (full_run.folder / ".hidden").mkdir()
    (full_run.folder / ".hidden" / "profile.json").write_text("{")
    assert Page(report(full_run.folder)).source == before

    write_artifact(full_run.folder / "odd.json", kind="oddity", body={}, inputs={})
    assert "odd.json is of the kind oddity" in Page(report(full_run.folder)).text


def test_artefacts_are_found_three_levels_deep_and_no_deeper(make_run: Maker) -> None:
    run = make_run()
    run.manifest("a/b")
    assert "mergemoe" in Page(report(run.folder)).text

    deep = make_run("deep")
    deep.manifest("a/b/c")
    with pytest.raises(InputError, match="nothing to report on"):
        report(deep.folder)


def test_an_empty_folder_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"profile\.json .* coterie\.json .* scorecards"):
        report(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        report(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(full_run: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; name the file"):
        report(full_run.folder, tmp_path)
    with pytest.raises(InputError, match="is not a folder; make it first"):
        report(full_run.folder, tmp_path / "missing" / "page.html")


@pytest.mark.parametrize(
    "name", ["profile/profile.json", "merged/coterie.json", "plans/small.json", "scorecards/01.json"]
)
def test_damaged_artefacts_are_errors(full_run: Any, name: str) -> None:
    path = full_run.folder / name
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"seed"', '"seeds"'), encoding="utf-8")
    with pytest.raises(CorruptArtifact, match="digest"):
        report(full_run.folder)

    path.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(CorruptArtifact, match="not JSON"):
        report(full_run.folder)
    assert not (full_run.folder / "report.html").exists()


def test_damaged_tensors_and_incomplete_manifests_are_errors(full_run: Any, make_run: Maker) -> None:
    next((full_run.folder / "profile").glob("*.safetensors")).write_bytes(b"short")
    with pytest.raises(CorruptArtifact, match="do not match the digest"):
        report(full_run.folder)

    run = make_run("other")
    run.manifest("merged", layers=[{"index": 0, "block": "x", "top_k_before": 2}])
    with pytest.raises(CorruptArtifact, match=r"merged/coterie\.json: layers\[0\]\.num_experts_before is missing"):
        report(run.folder)
    run.manifest("merged", shapes=[{"expert_map": [4] * 8}] * 2)
    with pytest.raises(CorruptArtifact, match=r"layers\[0\]\.expert_map\[0\] is 4: it should be from -1 to 3"):
        report(run.folder)
    run.manifest("merged", seed="x")
    with pytest.raises(CorruptArtifact, match="seed is 'x': should be a whole number"):
        report(run.folder)


def test_a_newer_format_is_stale(full_run: Any) -> None:
    path = full_run.folder / "merged" / "coterie.json"
    document = json.loads(path.read_text())
    document["format"] = 99
    write_json(path, document)

    with pytest.raises(StaleArtifact, match="upgrade"):
        report(full_run.folder)


def test_prediction_layers_and_awkward_shapes_are_said_of_each_result(make_run: Maker) -> None:
    run = make_run()
    layers = {"layers": ["model.layers.2"], "kept": True}
    follows = {"compressed": ["model.layers.2"], "like": "model.layers.1", "experts": [0, 1, 2], "width": 8}
    run.manifest("a", "reap", kept=3, prediction=layers | follows | {"neurons": "largest weights"})
    run.manifest("b", "frequency", kept=4, prediction={"layers": [HOSTILE], "kept": False})
    run.manifest("c", "mergemoe", kept=4, prediction=layers)
    page = Page(report(run.folder))
    text = " ".join(page.text.split())
    assert "got what model.layers.1 got, 3 experts, of width 8: model.layers.2" in text
    assert "reap" in text.partition("3 experts cannot be shared out evenly among 2 or 4 or 8 devices")[0]
    assert f"prediction layers (MTP) were left out: {HOSTILE}" in text
    assert "prediction layers (MTP) were kept as they are: model.layers.2" in text
    assert "<script" not in page.source


def test_what_scrolls_is_named_and_can_be_reached_by_key(full_run: Any) -> None:
    source = Page(report(full_run.folder)).source

    scrollers = re.findall(r'<div class="wide[^"]*"([^>]*)>', source)
    assert len(scrollers) > 10
    assert all(re.fullmatch(r' tabindex="0" role="group" aria-label="[^"]+"', rest) for rest in scrollers)
    assert len(re.findall("<table", source)) == len(re.findall('<div class="wide[^>]*><table', source))
    assert 'aria-label=""' not in source


def test_a_table_of_many_domains_is_cut_for_paper_and_whole_on_screen(make_run: Maker) -> None:
    run = make_run()
    domains = [f"domain_{number}" for number in range(9)]
    run.base_card(domains=domains)
    run.card("pruned", 0.5, domains=domains)

    page = Page(report(run.folder))

    parts = [row for row in page.rows if row[:2] == ["", "all"]]
    assert parts[0] == ["", "all", *domains]
    assert parts[1:3] == [["", "all", *domains[:6]], ["", "all", *domains[6:]]]
    assert page.source.count('class="wide on-screen"') * 2 == page.source.count('class="wide on-paper"')


def test_standard_errors_stand_behind_numbers_and_are_drawn(make_run: Maker) -> None:
    run = make_run()
    run.base_card()
    for name, kl, num_bytes in (("small", 0.25, 750_000), ("smaller", 0.5, 500_000)):
        run.manifest(name, "reap", "plain", 4)
        run.card(name, kl, num_bytes=num_bytes, spread=0.0125)
    page = Page(report(run.folder))
    row = next(row for row in page.rows if "0.250 ± 0.013" in row)
    assert "1.50× ± 0.013" in row
    assert "± is the standard error over sequences" in page.text
    # One bar a point of the trade-off, and one a domain and model of the dots.
    assert page.source.count('class="error l') == 2 + 2 * 2
    assert "0.250 ± 0.013" in "".join(re.findall("<title>[^<]*</title>", page.source))


def test_an_error_bar_ends_where_its_axis_ends(make_run: Maker) -> None:
    run = make_run()
    run.manifest("small", "reap", "plain", 4)
    run.card("small", 0.25, spread=1e6)
    page = report(run.folder).read_text(encoding="utf-8")
    bars = re.findall(r'class="error l\d" x1="([^"]+)" y1="[^"]+" x2="([^"]+)"', page)
    assert bars
    assert all(0 <= float(x) <= 980 for bar in bars for x in bar)


def test_an_original_without_a_scorecard_of_its_own_is_shown(make_run: Maker) -> None:
    run = make_run()
    run.card("small", original=0.875)
    run.card("smaller", 0.5, num_bytes=500_000, factor=2.0, original=0.875)
    page = Page(report(run.folder))
    row = page.row("original")
    assert "10.0" in row
    assert "87.5 %" in row
    assert "1.50×" in page.row("small")
    assert "original 87.5\u202f%" in page.text
