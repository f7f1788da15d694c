"""Which code a key covers: every file that can run, and no other."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from coterie.bench import code
from coterie.bench.cells import BenchSettings, Cell, Model, cell_code, original_key, profile_key
from coterie.bench.code import code_digests
from coterie.compress.recipes import get_recipe
from coterie.testing import tiny_checkpoint, tiny_text

SETTINGS = BenchSettings(
    text="a", text_digest="1", test="b", test_digest="2", tokens=100, test_tokens=50, questions=None, on="all",
    seq_len=10, sample_tokens=20, effort="balanced", device="cpu", max_memory=None, allow_pickle=False,
)  # fmt: skip
CELL = Cell(
    model=Model(name="m", path="p", digest="d"), recipe="hc-smoe", router="plain", removed=0.5, seed=0,
    settings=SETTINGS,
)  # fmt: skip


def keys(recipe):
    """Return the keys of a cell, of a profile and of the original."""
    cell = replace(CELL, recipe=recipe)
    return cell.key, profile_key("d", 0, SETTINGS, gradients=False), original_key("d", SETTINGS)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copied") / "coterie"
    return shutil.copytree(code.ROOT, folder, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture
def tree(copied, monkeypatch):
    """Return a copy of the package that keys are computed from; files that a test writes are restored."""
    before = {file: file.read_bytes() for file in copied.rglob("*.py")}
    monkeypatch.setattr(code, "ROOT", copied)
    yield copied
    for file in copied.rglob("*.py"):
        if file not in before:
            file.unlink()
        elif file.read_bytes() != before[file]:
            file.write_bytes(before[file])


@pytest.mark.long
def test_a_copy_elsewhere_has_the_same_keys(copied, monkeypatch):
    before = keys("reap")
    monkeypatch.setattr(code, "ROOT", copied)
    assert keys("reap") == before


@pytest.mark.parametrize(
    ("file", "recipe", "changed"),
    [
        ("compress/methods/cluster.py", "hc-smoe", (True, False, False)),
        ("compress/methods/cluster_features.py", "hc-smoe", (True, False, False)),
        ("compress/methods/cluster.py", "reap", (False, False, False)),
        ("compress/sizes.py", "reap", (True, False, False)),
        ("compress/allocators/fewer.py", "reap", (True, False, False)),
        ("compress/allocators/ragged.py", "reap", (False, False, False)),
        ("compress/result_steps/distill.py", "coterie", (True, False, False)),
        ("compress/result_steps/distill.py", "reap", (False, False, False)),
        ("compress/plan.py", "reap", (True, False, False)),
        ("train/distill.py", "coterie", (True, False, False)),
        ("profile/run.py", "reap", (True, True, False)),
        ("profile/statistics/reap.py", "reap", (True, True, False)),
        ("profile/calibration.py", "reap", (True, True, True)),
        ("model/arch/layers.py", "reap", (True, True, True)),
        ("model/arch/width.py", "reap", (True, True, True)),
        ("model/stream/stream.py", "reap", (True, True, True)),
        ("model/disk/quantized.py", "reap", (True, True, True)),
        ("evaluate/divergence.py", "reap", (True, False, True)),
        ("evaluate/evaluation.py", "reap", (True, False, True)),
        ("evaluate/harness.py", "reap", (False, False, False)),
        ("artifact.py", "reap", (True, True, True)),
        ("__init__.py", "reap", (True, True, True)),
        ("report/page.py", "coterie", (False, False, False)),
        ("cli/main.py", "coterie", (False, False, False)),
        ("bench/table.py", "coterie", (False, False, False)),
        ("testing/tiny.py", "coterie", (False, False, False)),
    ],
)
def test_keys_follow_the_code_that_can_run_and_no_other(tree, file, recipe, changed):
    before = keys(recipe)
    with (tree / file).open("a") as stream:
        stream.write("\nLIMIT = 7\n")
    assert tuple(a != b for a, b in zip(before, keys(recipe), strict=True)) == changed


def test_a_changed_constant_in_the_middle_of_a_file_counts(tree):
    file = tree / "compress" / "allocators" / "parts.py"
    before, text = keys("coterie"), file.read_text()
    assert text.count("MORE = 1.25\n") == 1
    file.write_text(text.replace("MORE = 1.25\n", "MORE = 1.5\n"))
    assert keys("coterie")[0] != before[0]
    file.write_text(text)
    assert keys("coterie") == before


def test_what_is_only_for_readers_does_not_count(tree):
    file = tree / "compress" / "sizes.py"
    before = CELL.key
    lines = file.read_text().split('"""', 2)
    file.write_text(f'"""Other words."""\n\n\n# And a remark.{lines[2]}')
    assert CELL.key == before


def test_one_more_method_makes_no_results_old(tree):
    before = CELL.key, replace(CELL, recipe="reap").key
    (tree / "compress" / "methods" / "another.py").write_text("def another(state, size):\n    return state\n")
    table = tree / "compress" / "methods" / "__init__.py"
    line = '    "cluster": "coterie.compress.methods.cluster:cluster",\n'
    assert table.read_text().count(line) == 1
    entry = '    "another": "coterie.compress.methods.another:another",\n'
    table.write_text(table.read_text().replace(line, line + entry))
    recipes = tree / "compress" / "recipes.py"
    start = "    for recipe in (\n"
    assert recipes.read_text().count(start) == 1
    another = '        _recipe("another", "one more", None, "another"),\n'
    recipes.write_text(recipes.read_text().replace(start, start + another))
    assert (CELL.key, replace(CELL, recipe="reap").key) == before
    # A pass that is used is no longer the same when its entry names another function.
    table.write_text(table.read_text().replace(line, line.replace(":cluster", ":other")))
    assert CELL.key != before[0]
    assert replace(CELL, recipe="reap").key == before[1]


SOURCES = {
    "__init__.py": "if TYPE_CHECKING:\n    from coterie.typed import T\nHOMES = {'T': 'coterie.unused'}\n",
    "start.py": "import os.path\n\n\ndef late():\n    from coterie.room import one\n    import coterie.third\n",
    "typed.py": "",
    "third.py": "from . import fourth\n",
    "fourth.py": "",
    "unused.py": "",
    "room/__init__.py": 'from coterie._callable import make_callable\nmake_callable(__name__, "coterie.unused:f")\n',
    "room/one.py": "from .two import value\nfrom ..table import A\n",
    "room/two.py": "import coterie.start\n",
    "_callable.py": "",
    "table.py": 'A = {"a": Entry("coterie.a:f"), "b": "coterie.b:f"}\nC = {"c": "coterie.c"}\nNAME = "coterie.d:f"\n',
    "a.py": "", "b.py": "", "c.py": "", "d.py": 'FILE = "coterie.json"',
}  # fmt: skip
ALWAYS = {"", "start", "third", "fourth", "room", "room.one", "room.two", "_callable", "table", "d"}


@pytest.fixture
def small(tmp_path, monkeypatch):
    for name, source in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("entries", "more"),
    [
        (None, {"a", "b", "c"}),
        ({"coterie.table": {"a", "c"}}, {"a", "c"}),
        ({"coterie.table": ()}, set()),
        ({"coterie.elsewhere": ()}, {"a", "b", "c"}),
    ],
)
def test_every_way_to_import_is_followed(small, entries, more):
    expected = {f"coterie.{name}".rstrip(".") for name in ALWAYS | more}
    assert code_digests(["coterie.start"], entries=entries).keys() == expected


def test_code_of_a_user_counts_with_what_it_imports_of_the_package(small, tmp_path, monkeypatch):
    own = tmp_path / "my_methods"
    own.mkdir()
    (own / "__init__.py").write_text("")
    (own / "one.py").write_text("from coterie.third import fourth\nfrom .two import RATE\nimport json\n")
    (own / "two.py").write_text("RATE = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_digests(["my_methods.one"])
    assert before.keys() == {
        "my_methods", "my_methods.one", "my_methods.two", "coterie", "coterie.third", "coterie.fourth",
    }  # fmt: skip
    (own / "two.py").write_text("RATE = 3\n")
    after = code_digests(["my_methods.one"])
    assert {name for name in before if before[name] != after[name]} == {"my_methods.two"}


def test_a_module_that_is_not_there(small):
    with pytest.raises(ModuleNotFoundError, match=r"^no module 'coterie\.nowhere' was found in .* or to import$"):
        code_digests(["coterie.nowhere"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["coterie", "hc-smoe"])
def test_nothing_runs_that_the_key_does_not_cover(tmp_path, recipe):
    """What Python loads while a cell is computed is the oracle for what was read from imports."""
    model, text = tiny_checkpoint(tmp_path / "model"), tiny_text(tmp_path / "text")
    program = f"""
import json, sys
from coterie.compress.apply import compress
from coterie.evaluate.evaluation import Evaluation
from coterie.profile.run import profile
shared = dict(text={str(text)!r}, tokens=512, seq_len=32)
profile({str(model)!r}, {str(tmp_path / "profile")!r}, gradients={recipe == "coterie"}, **shared)
compress({str(model)!r}, {str(tmp_path / "out")!r}, keep=0.5, recipe={recipe!r}, router="plain", effort="fast",
         profile={str(tmp_path / "profile")!r}, **shared)
with Evaluation(against={str(model)!r}, **shared) as evaluation:
    evaluation.score({str(tmp_path / "out")!r})
print(json.dumps(sorted(name for name in sys.modules if name.split(".")[0] == "coterie")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert len(loaded) > 60
    # All statistics are measured; a cell reads some.
    covered = cell_code(get_recipe(recipe), "plain").keys() | code_digests(["coterie.profile.run"]).keys()
    assert loaded - covered == set()
