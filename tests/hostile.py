"""Artefacts that say what they should not, with digests that fit: what the tests of readers and of the report share."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from coterie.artifact import digest_of

SCRIPT = "<script>alert(1)</script>"

#: Values that have broken readers: of other types, numbers that are none or too large, text that is no plain text.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 99, 2**62, 2**63, 2**64, 10**400, 0.5, -0.0, 1e300, -1e300, 5e-324,
    float("nan"), float("inf"), -float("inf"), "", "nan", "1", SCRIPT, "\x1b[31m\x07\n", "\u202eedit", "x" * 2**20,
    [], [[]], [None], [99], [-1], {}, {"a": 1}, {SCRIPT: None}, {"": {}}, [{}], [["a", {}]], [["a", 1]],
    json.loads("[" * 90 + "]" * 90),
)  # fmt: skip

values = st.sampled_from(VALUES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in JSON content, objects and lists too."""
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield (*path, key)
        yield from places(content[key], (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any, how: str = "replace") -> Any:
    """Return a copy of JSON content with one value replaced, removed, or another one beside it."""
    result = copy.deepcopy(content)
    *above, last = path
    inside = result
    for key in above:
        inside = inside[key]
    if how == "replace":
        inside[last] = value
    elif how == "remove":
        del inside[last]
    elif isinstance(inside, dict):
        inside["beside"] = value
    else:
        inside.append(value)
    return result


def write_digested(path: Path, document: dict[str, Any]) -> None:
    """Write an artefact's document with the digest that its content has, whatever that is."""
    content = {name: value for name, value in document.items() if name != "digest"}
    path.write_text(json.dumps(content | {"digest": digest_of(content)}), encoding="utf-8")
