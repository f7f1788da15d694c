from dataclasses import replace

import pytest

from coterie.bench import cells
from coterie.bench.cells import (
    BenchSettings,
    Cell,
    Model,
    choose_recipes,
    grid,
    original_key,
    profile_key,
    source_digest,
)
from coterie.bench.times import CellTimes
from coterie.compress.recipes import RECIPES
from coterie.errors import InputError, TextError, UnknownName

SETTINGS = BenchSettings(
    text="a", text_digest="1", test="b", test_digest="2", tokens=100, test_tokens=50, questions=None, on="all",
    seq_len=10, sample_tokens=20, effort="balanced", device="cpu", max_memory=None, allow_pickle=False,
)  # fmt: skip
CELL = Cell(
    model=Model(name="m", path="p", digest="d"), recipe="hc-smoe", router="plain", removed=0.5, seed=0,
    settings=SETTINGS,
)  # fmt: skip


def keys(settings):
    """Return the keys of a cell, of its profile and of the original."""
    cell = replace(CELL, settings=settings)
    return cell.key, profile_key("d", 0, settings, gradients=False), original_key("d", settings)


@pytest.mark.parametrize(
    ("field", "value", "changed"),
    [
        ("text_digest", "3", (True, True, False)),
        ("tokens", 101, (True, True, False)),
        ("sample_tokens", 21, (True, True, False)),
        ("seq_len", 11, (True, True, True)),
        ("device", "cuda", (True, True, True)),
        ("on", "assistant", (True, True, True)),
        ("test_digest", "3", (True, False, True)),
        ("test_tokens", None, (True, False, True)),
        ("questions", 0, (True, False, True)),
        ("text", "elsewhere", (False, False, False)),
        ("test", "elsewhere", (False, False, False)),
        ("max_memory", 10**9, (False, False, False)),
        ("effort", "fast", (False, False, False)),
    ],
)
def test_a_key_changes_with_what_it_depends_on_and_nothing_else(field, value, changed):
    before, after = keys(SETTINGS), keys(replace(SETTINGS, **{field: value}))
    assert tuple(a != b for a, b in zip(before, after, strict=True)) == changed


@pytest.mark.parametrize(
    "change",
    [{"recipe": "m-smoe"}, {"router": "map"}, {"removed": 0.25}, {"seed": 1},
     {"model": Model(name="m", path="p", digest="e")}],
)  # fmt: skip
def test_every_cell_has_a_key_of_its_own(change):
    assert replace(CELL, **change).key != CELL.key


def test_a_model_that_was_moved_keeps_its_cells():
    assert replace(CELL, model=Model(name="n", path="q", digest="d")).key == CELL.key


def test_effort_counts_where_something_is_trained(monkeypatch):
    trained = replace(RECIPES[CELL.recipe], result_steps=(("distill", {}),))
    before = CELL.key
    monkeypatch.setitem(RECIPES, CELL.recipe, trained)
    distilled = CELL.key
    assert distilled != before
    assert replace(CELL, settings=replace(SETTINGS, effort="fast")).key not in (before, distilled)


@pytest.mark.parametrize("package", ["torch", "transformers", "numpy"])
def test_other_versions_have_other_keys(monkeypatch, package):
    before, real = keys(SETTINGS), cells.version
    monkeypatch.setattr(cells, "version", lambda name: "0" if name == package else real(name))
    assert all(one != other for one, other in zip(before, keys(SETTINGS), strict=True))


def test_all_that_a_recipe_says_counts_but_for_what_it_says_to_readers(monkeypatch):
    recipe, before = RECIPES[CELL.recipe], CELL.key
    monkeypatch.setitem(RECIPES, CELL.recipe, replace(recipe, summary="better", paper="1234.56789"))
    assert CELL.key == before
    for change in ({"allocator": "ragged"}, {"measures": ()}, {"passes": recipe.passes[:-1]}):
        monkeypatch.setitem(RECIPES, CELL.recipe, replace(recipe, **change))
        assert CELL.key != before


def test_a_cell_survives_json():
    assert Cell.from_json(CELL.to_json()) == CELL
    assert Cell.from_json(CELL.to_json()).key == CELL.key


def test_the_grid_has_the_router_forms_that_a_recipe_has_a_use_for():
    models = [replace(CELL.model, name=name) for name in "ab"]
    found = grid(
        models, recipes=["reap", "hc-smoe"], routers=["plain", "map"], removed=[0.25, 0.5, 0.25], seeds=[0, 1],
        settings=SETTINGS,
    )  # fmt: skip
    assert len(found) == len({(cell.model.name, cell.method, cell.removed, cell.seed) for cell in found}) == 24
    assert {cell.method for cell in found} == {"reap", "hc-smoe", "hc-smoe (map)"}
    assert [cell.model.name for cell in found] == ["a"] * 12 + ["b"] * 12
    every = grid(
        models[:1], recipes=["reap", "hc-smoe"], routers=["plain", "mean", "refit", "map"], removed=[0.5], seeds=[0],
        settings=SETTINGS,
    )  # fmt: skip
    assert [cell.method for cell in every] == [
        "reap", "reap (refit)", "hc-smoe", "hc-smoe (mean)", "hc-smoe (refit)", "hc-smoe (map)",
    ]  # fmt: skip


@pytest.mark.long
def test_a_recipe_of_one_s_own_has_cells(tmp_path, monkeypatch):
    file = tmp_path / "own_method.py"
    source = """
from coterie.compress.recipes import Recipe

RATE = 1

def needs():
    return ()

def run(state, plan):
    return state

RECIPE = Recipe(name="own", passes=(("own_method:run", {}),))
"""
    file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    recipes = ["own_method:RECIPE", "reap+protect"]
    cells_ = grid([CELL.model], recipes=recipes, routers=["plain", "map"], removed=[0.5], seeds=[0], settings=SETTINGS)
    assert [cell.method for cell in cells_] == recipes
    before = [cell.key for cell in cells_]
    file.write_text(source.replace("RATE = 1", "RATE = 2"))
    assert [cell.key == key for cell, key in zip(cells_, before, strict=True)] == [False, True]


def test_recipes_are_named_or_all():
    assert choose_recipes("all") == tuple(RECIPES)
    assert choose_recipes(" reap, hc-smoe,reap ") == ("reap", "hc-smoe")
    assert choose_recipes(["reap"]) == ("reap",)
    with pytest.raises(UnknownName, match="did you mean reap"):
        choose_recipes("raep")
    with pytest.raises(InputError, match="no recipe"):
        choose_recipes("")


def test_the_digest_of_a_folder_is_that_of_its_texts(tmp_path):
    with pytest.raises(TextError, match="holds no"):
        source_digest(str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    first = source_digest(str(tmp_path))
    (tmp_path / "notes.md").write_text("not a text of ours")
    assert source_digest(str(tmp_path)) == first
    (tmp_path / "a.qa.jsonl").write_text("{}")
    assert source_digest(str(tmp_path)) != first
    (tmp_path / "a.qa.jsonl").unlink()
    (tmp_path / "a.txt").write_text("two")
    assert source_digest(str(tmp_path)) != first


def test_the_digest_of_a_data_set_is_that_of_its_commit_or_its_files_and_of_the_part_that_is_read(tmp_path):
    sources = ["hf:org/name@c0ffee", "hf:org/name@decaf", "hf:org/name@c0ffee:de", "hf:org/name@c0ffee::test"]
    assert len({source_digest(source) for source in sources}) == 4
    for place in ("here", "there"):
        (tmp_path / place / "set" / "data").mkdir(parents=True)
        (tmp_path / place / "set" / "data" / "train.jsonl").write_text('{"text": "one"}')
    here, there = (f"hf:{tmp_path}/{place}/set" for place in ("here", "there"))
    assert source_digest(here) == source_digest(there)
    assert source_digest(here) != source_digest(f"{there}::test")
    (tmp_path / "there" / "set" / "data" / "train.jsonl").write_text('{"text": "two"}')
    assert source_digest(here) != source_digest(there)


def test_cells_take_as_long_as_those_like_them():
    times = CellTimes([])
    cells = [replace(CELL, recipe=recipe) for recipe in ("reap", "reap", "coterie")]
    assert times.left(cells, jobs=1) == 3
    done = {"status": "done", "model": "m", "seconds": {"compress": 8.0, "evaluate": 2.0}}
    times.add(done | {"recipe": "reap"})
    times.add({"status": "failed", "model": "m", "recipe": "coterie", "seconds": {}})
    assert times.left(cells, jobs=1) == 30
    times.add(done | {"recipe": "coterie", "model": "another", "seconds": {"compress": 90.0, "evaluate": 10.0}})
    assert times.left(cells, jobs=1) == 120
    assert times.left(cells, jobs=2) == 100  # no sooner than the longest
    assert times.left([], jobs=2) == 0
