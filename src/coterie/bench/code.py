"""Which code can change what a function computes: all files that it imports, however late and however far, as digests.

Followed are imports anywhere in a file, and names of modules in tables, like ``"module:attribute"``. Left out are
imports for types alone, what the front door and callable packages stand for (whoever calls it imports it), comments
and docstrings.
Two things that are no code of their own can be left out by name, so that one more method does not make the results of
all others old: entries of a table that are not used, and a table that is in a key with its content.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from coterie.artifact import digest_of

#: The package whose imports are followed; imports of other packages count by their versions.
PACKAGE = "coterie"
ROOT = Path(__file__).resolve().parents[1]

_ENTRY = re.compile(rf"({PACKAGE}(\.\w+)+)(:\w+)?")


def code_digests(
    starts: Iterable[str],
    *,
    entries: Mapping[str, Collection[str]] | None = None,
    without: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return a digest of the code of every module that can run when these modules are used, by module name.

    Args:
        starts: names of modules. Of one that is outside of the package, imports of its own package are followed too.
        entries: for a module that holds a table, the names in it that are used; all of them in others.
        without: for a module, the name that it assigns a value which does not count.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    used, ignored = {PACKAGE: (), **(entries or {})}, without or {}
    digests: dict[str, str] = {}
    waiting = list(starts)
    roots = frozenset({PACKAGE} | {name.split(".")[0] for name in waiting})
    while waiting:
        name = waiting.pop()
        if name in digests:
            continue
        file = _file_of(name)
        if file is None:
            raise ModuleNotFoundError(f"no module {name!r} was found in {ROOT} or to import", name=name)
        names = frozenset(used[name]) if name in used else None
        digests[name], imported = _read(name, file, file.stat().st_mtime_ns, roots, names, ignored.get(name))
        waiting += imported
    return dict(sorted(digests.items()))


def _file_of(name: str) -> Path | None:
    """Return the file of a module, None where there is none; modules of the package are looked for in `ROOT`."""
    package, *parts = name.split(".")
    if package == PACKAGE:
        place = ROOT.joinpath(*parts)
        candidates = (place / "__init__.py", place.with_name(f"{place.name}.py"))
        return next((file for file in candidates if file.is_file()), None)
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # a name in a module
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


@cache
def _read(
    name: str, file: Path, changed: int, roots: frozenset[str], used: frozenset[str] | None, ignored: str | None
) -> tuple[str, tuple[str, ...]]:
    """Return the digest of a file's code and the modules of these packages that it imports.

    `changed` is when it was written last.
    """
    tree = ast.parse(file.read_bytes())
    _strip(tree, used, ignored)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    modules = {part for imported_name in _imports(tree, package) for part in _with_packages(imported_name, roots)}
    return digest_of(ast.dump(tree)), tuple(sorted(modules))


def _strip(tree: ast.Module, used: frozenset[str] | None, ignored: str | None) -> None:
    """Take docstrings, imports for types, unused entries and an assignment out of a file's code."""
    if ignored is not None:
        tree.body = [node for node in tree.body if ignored not in _assigned(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body.clear()
        elif isinstance(node, ast.Dict) and used is not None:
            used_entries = [
                (key, value)
                for key, value in zip(node.keys, node.values, strict=True)
                if not (_has_entry(value) and isinstance(key, ast.Constant) and key.value not in used)
            ]
            node.keys, node.values = [key for key, _ in used_entries], [value for _, value in used_entries]


def _assigned(node: ast.stmt) -> set[str]:
    """Return the names that a statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _entry(node: ast.AST) -> str | None:
    """Return the module that a string names; None where it is no string, or names none of ours."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return None
    match = _ENTRY.fullmatch(node.value)
    return match[1] if match is not None and _file_of(match[1]) is not None else None


def _has_entry(value: ast.AST) -> bool:
    return any(_entry(node) is not None for node in ast.walk(value))


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the names of what a file imports, or names in tables; some are attributes, and some of other packages."""
    verbs = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "make_callable"
        for argument in node.args
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif id(node) not in verbs and (entry := _entry(node)) is not None:
            yield entry


def _with_packages(name: str, roots: frozenset[str]) -> Iterator[str]:
    """Yield a module of one of these packages and the packages that it is in, which are imported before it."""
    parts = name.split(".")
    if parts[0] in roots:
        for length in range(1, len(parts) + 1):
            candidate = ".".join(parts[:length])
            if _file_of(candidate) is not None:
                yield candidate
