"""The report of a run in which any one value was changed: a page that shows text as text, or one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.artifact import digest_of
from coterie.errors import CoterieError
from coterie.report.page import report
from hostile import VALUES, changed, places, write_digested

from .conftest import Page, RunMaker


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Any]:
    """Return the JSON content of every artefact of a run by path; each may be overwritten, and is put back."""
    run = RunMaker(tmp_path_factory.mktemp("hostile") / "run")
    run.profile()
    run.base_card()
    refit = {"ridge": [0.01, None], "merged": 1, "kept_average": 0, "heldout_error_average": 0.5,
             "heldout_error_refit": 0.25}  # fmt: skip
    run.manifest("merged", notes={"refit-down": refit, "select": {"score": "reap"}})
    run.card("merged", num_bytes=750_000)
    run.manifest("mapped", "reap", "map")
    run.ragged("ragged", [4, 8, 8, 8, 8, 8, 8, 8], [8] * 7 + [1])
    run.plan().save(run.folder / "plan.json")
    assert Page(report(run.folder)).sections
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in run.folder.rglob("*.json")}


def folder_of(hostile_run: dict[Path, Any]) -> Path:
    return next(path.parent for path in hostile_run if path.name == "plan.json")


def shown_or_refused(hostile_run: dict[Path, Any], path: Path, content: Any) -> None:
    """Make the report with other content in one file; it shows no tag that it did not write, or says why in a line."""
    if path.name == "coterie-run.json":
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        write_digested(path, content)
    try:
        page = report(folder_of(hostile_run)).read_text(encoding="utf-8")
        assert "<script" not in page
    except CoterieError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 1500
    finally:
        path.write_text(json.dumps(hostile_run[path]), encoding="utf-8")


def check_drawn(hostile_run: dict[Path, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(list(hostile_run)), label="file")
    place = data.draw(st.sampled_from(list(places(hostile_run[path]))), label="place")
    value = data.draw(st.sampled_from(VALUES), label="value")
    how = data.draw(st.sampled_from(("replace", "replace", "remove", "add")), label="how")
    shown_or_refused(hostile_run, path, changed(hostile_run[path], place, value, how))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_one_value_of_a_run_may_be_anything(hostile_run: dict[Path, Any], data: st.DataObject) -> None:
    check_drawn(hostile_run, data)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(data=st.data())
def test_any_one_value_of_a_run_may_be_anything_at_length(hostile_run: dict[Path, Any], data: st.DataObject) -> None:
    check_drawn(hostile_run, data)


def free_content() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (place, value) of what a manifest may say as it likes, and the report shows or reads."""
    for name in ("ridge", "merged", "kept_average", "heldout_error_average", "heldout_error_refit"):
        yield ("body", "layers", 0, "notes", "refit-down", name), "<u>much</b>"  # type: ignore[misc]
    yield ("body", "layers", 0, "notes", "refit-down", "ridge"), [None, "<u>", [1], True]  # type: ignore[misc]
    yield ("body", "plan", "layers"), 5
    yield ("body", "plan", "layers"), [5, [{}]]
    yield ("body", "plan"), {}


@pytest.mark.parametrize(("place", "value"), list(free_content()))
def test_what_a_manifest_may_say_as_it_likes_is_shown(
    hostile_run: dict[Path, Any], place: tuple[str, ...], value: Any
) -> None:
    path = folder_of(hostile_run) / "merged" / "coterie.json"
    write_digested(path, changed(hostile_run[path], place, value))
    try:
        page = Page(report(folder_of(hostile_run)))
    finally:
        path.write_text(json.dumps(hostile_run[path]), encoding="utf-8")
    assert "changes" in page.sections
    assert "<u>" not in page.source


def test_a_scorecard_with_numbers_that_are_text_is_refused_in_a_line(make_run: Callable[..., RunMaker]) -> None:
    run = make_run()
    path = run.base_card()
    document = json.loads(path.read_text(encoding="utf-8"))
    for value in ("12.5", None, float("nan"), {}, [1.0]):
        document["body"]["overall"]["tokens"] = value
        document.pop("digest", None)
        path.write_text(json.dumps(document | {"digest": digest_of(document)}), encoding="utf-8")
        with pytest.raises(CoterieError, match=rf"{path.name}: overall.tokens is .*: should be a whole number"):
            report(run.folder)
