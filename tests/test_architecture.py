"""The house rules that a program can check: import direction, no families by name, file length, docstrings."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "coterie"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 550

#: Room -> the rooms that it may import from, beside itself. Rooms are the files and folders of src/coterie.
FOUNDATION = {
    "_callable",
    "errors",
    "amounts",
    "fields",
    "paths",
    "artifact",
    "outputs",
    "journal_lines",
    "journal",
    "progress",
}
ALLOWED = {
    "_callable": set(),
    "errors": set(),
    "amounts": {"errors"},
    "fields": {"errors"},
    "paths": {"errors"},
    "progress": set(),
    "artifact": {"errors", "fields"},
    "outputs": {"errors", "artifact", "paths"},
    "journal_lines": {"errors", "artifact"},
    "journal": {"errors", "artifact", "journal_lines", "progress"},
    "model": FOUNDATION,
    "profile": FOUNDATION | {"model"},
    "route": FOUNDATION | {"model", "profile"},
    "run": FOUNDATION | {"model", "route"},
    "serve": FOUNDATION | {"model", "run", "route"},
    "train": FOUNDATION | {"model", "profile"},
    "publish": FOUNDATION | {"model"},
    "compress": FOUNDATION | {"model", "profile", "train", "publish"},
    "export": FOUNDATION | {"model", "profile", "train", "publish", "compress"},
    "evaluate": FOUNDATION | {"model", "profile", "publish", "route"},
    "report": FOUNDATION | {"model", "profile", "compress", "evaluate", "publish"},
    "bench": FOUNDATION | {"model", "profile", "train", "compress", "evaluate", "report"},
    "testing": FOUNDATION | {"model", "profile", "publish", "compress"},
    "cli": FOUNDATION
    | {"model", "run", "route", "serve", "profile", "publish", "compress", "export", "evaluate", "report", "bench"}
    | {"testing"},
}
#: It may import anything: the front door.
FREE = {"__init__"}

#: The floors of the room "model", from below; a file of a floor imports from its own and from lower ones.
FLOORS = ("disk", "arch", "stream")

HEAVY = {"torch", "transformers", "matplotlib", "scipy", "numpy", "safetensors", "huggingface_hub"}


def sources() -> Iterator[tuple[str, Path, str]]:
    """Yield (name below the package, path, source text) of every file of the package."""
    for file in FILES:
        yield file.relative_to(PACKAGE).as_posix(), file, file.read_text(encoding="utf-8")


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, room) for every way to name a module of ours: imports anywhere, and tables of "module:attribute"."""
    package = ["coterie", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = re.fullmatch(r"coterie\.(\w+)(\.\w+)*(:\w+)?", node.value)
            names = [node.value] if match and match[1] in ALLOWED.keys() | FREE else []
        for name in names:
            parts = re.split("[.:]", name)
            if parts[0] == "coterie":
                yield node.lineno, parts[1] if len(parts) > 1 else ""


def test_every_file_has_a_room():
    assert {room_of(file) for file in FILES} <= ALLOWED.keys() | FREE


def test_rooms_have_no_cycle():
    placed: set[str] = set()
    for room, allowed in ALLOWED.items():
        assert allowed <= placed
        placed.add(room)


def test_imports_point_one_way():
    wrong = []
    for name, file, source in sources():
        room = room_of(file)
        if room in FREE:
            continue
        allowed = ALLOWED[room] | {room, "__version__"}
        rooms = imported_rooms(parsed(source), file)
        wrong += [f"{name}:{line} may not import {to or 'coterie itself'}" for line, to in rooms if to not in allowed]
    assert not wrong


def test_the_import_rule_sees_all_ways_to_import():
    source = """
import coterie.report.page
from coterie import evaluate
from ..compress import plan
def late():
    from coterie.cli.main import main
TABLE = {"x": "coterie.profile.run:profile"}
"""
    found = {target for _, target in imported_rooms(parsed(source), PACKAGE / "model" / "layers.py")}
    assert found == {"report", "evaluate", "compress", "cli", "profile"}


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, file: Path) -> set[str]:
    """Return the modules of ours that a file imports, wherever in it and for whatever: late, or for types only."""
    known = {module_of(other) for other in FILES}
    package = ["coterie", *file.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source)
    return (found & known) - {module_of(file)}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of modules that import each other, however long the way."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in imports.get(todo.pop(), set()) - seen:
                seen.add(other)
                todo.append(other)
        return seen

    reach = {module: reached(module) for module in imports}
    groups = {
        tuple(sorted({module, *(other for other in reach[module] if module in reach[other])})) for module in reach
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def test_no_files_import_each_other_in_a_circle():
    imports = {module_of(file): imported_modules(parsed(source), file) for _, file, source in sources()}
    # The front door names what is behind every door, for type checkers, and whoever enters passes it.
    imports["coterie"] = set()
    assert len(imports) > 100
    assert circles(imports) == []


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_late_imports_and_imports_for_types_count():
    source = """
if TYPE_CHECKING:
    from coterie.model.stream.unit import Unit
def late():
    from coterie.model.arch import seam
"""
    found = imported_modules(parsed(source), PACKAGE / "model" / "disk" / "open.py")
    assert found == {"coterie.model.stream.unit", "coterie.model.arch.seam"}


def test_floors_of_the_model_stand_on_lower_ones():
    wrong = []
    for name, file, source in sources():
        parts = file.relative_to(PACKAGE).parts
        if parts[0] != "model":
            continue
        allowed = FLOORS[: FLOORS.index(parts[1]) + 1] if parts[1] in FLOORS else ()
        for module in imported_modules(parsed(source), file):
            _, room, *rest = module.split(".")
            if room == "model" and rest and rest[0] in FLOORS and rest[0] not in allowed:
                wrong.append(f"{name} may not import {module}")
    assert not wrong


@pytest.fixture(scope="module")
def families() -> set[str]:
    """Model types whose code in transformers holds experts behind the common interface."""
    models = Path(transformers.__file__).parent / "models"
    modules = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if "use_experts_implementation" in file.read_text(encoding="utf-8")
    }
    found = {name for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) in modules}
    assert {"olmoe", "mixtral", "gpt_oss"} <= found
    return found


def family_names(source: str, families: set[str]) -> list[str]:
    """Return string literals of a source text, docstrings apart, that name a family."""
    tree = parsed(source)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    # Some families are called like things (beam, flint); within a sentence only the unmistakable names count.
    unmistakable = {name for name in families if re.search(r"[_\d]", name)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            words = set(re.findall(r"[\w-]+", node.value.lower()))
            if words & (unmistakable if " " in node.value else families):
                found.append(f"line {node.lineno}: {node.value!r}")
    return found


def test_no_family_is_named(families):
    named = []
    for name, file, source in sources():
        # A graph of llama.cpp is written for a family, and a file says which: that is told in one table.
        if room_of(file) != "testing" and name != "model/disk/gguf/families.py":
            named += [f"{name}, {found}" for found in family_names(source, families)]
    assert not named, "derive it from the model instead"


def test_the_family_rule_sees_names(families):
    assert family_names('if kind == "olmoe": pass', families)
    assert family_names('x = f"the {n} of qwen3_moe"', families)
    assert not family_names('"""Works for qwen3_moe and olmoe."""\nx = "a beam of light"', families)


def test_no_file_is_too_long():
    lengths = {name: len(source.splitlines()) for name, _, source in sources()}
    assert not {name: count for name, count in lengths.items() if count > MAX_LINES}, "split by what they are about"


#: What a variable may not be called: it says how the value came about, and not what it is.
NAMELESS = {"found", "made", "held"}


def nameless(tree: ast.AST) -> list[str]:
    """Return where variables and arguments are named by how their value came about."""
    names = [(node.lineno, node.id) for node in ast.walk(tree)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]  # fmt: skip
    names += [(node.lineno, node.arg) for node in ast.walk(tree) if isinstance(node, ast.arg)]
    return [f"line {line}: {name}" for line, name in sorted(names) if name in NAMELESS]


def test_variables_are_named_by_what_they_hold():
    lines = {name: nameless(parsed(source)) for name, _, source in sources()}
    assert not {name: where for name, where in lines.items() if where}


def test_nameless_variables_are_seen():
    source = "found = 1\nfor made in x: pass\ndef f(held): found.made = held\nfound_experts = found"
    assert nameless(parsed(source)) == ["line 1: found", "line 2: made", "line 3: held"]


def public_definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            overload = any("overload" in ast.unparse(decorator) for decorator in child.decorator_list)
            if not overload:
                yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, f"{prefix}{child.name}.")


def test_public_names_are_documented():
    bare = []
    for name, _, source in sources():
        if not source.strip():
            continue  # an empty __init__.py
        tree = parsed(source)
        if not ast.get_docstring(tree):
            bare.append(name)
        bare += [f"{name}: {public}" for public, node in public_definitions(tree) if not ast.get_docstring(node)]
    assert not bare


def test_exported_names_are_documented():
    import coterie

    for name in getattr(coterie, "__all__", ()):
        exported = getattr(coterie, name)
        assert isinstance(exported, str) or (exported.__doc__ or "").strip(), name


def modules_loaded_by(*arguments: str) -> set[str]:
    """Run a fresh interpreter and return the top-level packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if line not in lines)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_help_imports_nothing_heavy():
    loaded = modules_loaded_by("-m", "coterie.cli.main", "--help")
    assert "coterie" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "module",
    [
        "coterie",
        "coterie.errors",
        "coterie.amounts",
        "coterie.artifact",
        "coterie.model.disk.checkpoint",
        "coterie.model.disk.manifest",
        "coterie.model.disk.open",
        "coterie.model.disk.encodings",
        "coterie.model.disk.encodings.block_scaled",
        "coterie.model.disk.encodings.mxfp4",
        "coterie.model.disk.encodings.plain",
        "coterie.model.disk.encodings.ragged",
    ],
)
def test_light_modules_import_nothing_heavy(module):
    loaded = modules_loaded_by("-c", f"import {module}")
    assert "coterie" in loaded
    assert not loaded & HEAVY


#: What loads by a name or a config, and asks on the terminal whether to run code that comes with a checkpoint.
LOADERS = {"from_pretrained", "from_config", "HFLM"}
#: What has these names and runs no code: ours, and a file of settings.
HARMLESS = {"Architecture", "cls", "GenerationConfig"}


def loads_that_may_run_code(tree: ast.AST) -> list[int]:
    """Return the lines of calls that load with transformers without a word on code that comes with a checkpoint."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        path = ast.unparse(node.func).split(".")
        refused = any(
            word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False
            for word in node.keywords
        )
        if path[-1] in LOADERS and path[0] not in HARMLESS and not refused:
            lines.append(node.lineno)
    return lines


def test_code_that_comes_with_a_checkpoint_is_refused_wherever_one_is_loaded():
    files = [*FILES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "reference").rglob("*.py")]
    sources = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    lines = {name: loads_that_may_run_code(parsed(source)) for name, source in sources.items()}
    assert not {name: found for name, found in lines.items() if found}, "say trust_remote_code=False"


def test_loads_that_may_run_code_are_seen():
    source = """
AutoTokenizer.from_pretrained(path)
type(model).from_pretrained(path, trust_remote_code=True)
auto.from_config(config)
HFLM(pretrained=model)
GenerationConfig.from_pretrained(path)
Architecture.from_config(config)
stock.from_pretrained(path, trust_remote_code=False)
"""
    assert loads_that_may_run_code(parsed(source)) == [2, 3, 4, 5]


def repository_files() -> list[Path]:
    """Files that are in the repository, or would be with the next commit; none outside a git checkout."""

    def listed(*options: str) -> list[str]:
        command = ["git", "ls-files", "-z", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.split("\0") if done.returncode == 0 else []

    folders = ["src", "tests", "docs", "benchmarks", "recipes", ".ci"]
    new = listed("-o", "--exclude-standard", "--", *folders, ":(glob)*", ":(glob).*")
    return [ROOT / name for name in sorted({*listed(), *new}) if name]


def test_no_file_names_a_registry_or_a_path_of_one_machine():
    # Put together here, so that this file does not hold them either.
    foreign = [f"/{folder}/" for folder in ("work", "root")]
    foreign += ["pypi" + ".org", "python" + "hosted.org", "registry." + "npmjs", "npmjs" + ".org"]
    files = repository_files()
    if not files:
        pytest.skip("not a git checkout")
    found = []
    for file in files:
        # The texts of the reference model are other people's words.
        is_text = file.is_relative_to(ROOT / "reference") and file.suffix in {".txt", ".jsonl"}
        if is_text or not file.is_file():
            continue
        content = file.read_bytes()
        if b"\0" in content[:8192]:
            continue
        found += [f"{file.relative_to(ROOT)}: {text}" for text in foreign if text.encode() in content]
    assert not found
