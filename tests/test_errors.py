"""The exception tree: what is drawn in the docstring is what exists, and who catches what."""

import errno
import inspect
import re

import pytest

from coterie import errors
from coterie.errors import CoterieError, InputError, OutOfSpace, UnknownName

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
}


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Return name -> its bases as the drawing shows them."""
    lines = [line for line in (errors.__doc__ or "").splitlines() if re.match(r"\s*([├└│]|CoterieError)", line)]
    bases: dict[str, tuple[str, ...]] = {"CoterieError": ("Exception",)}
    parents = {-1: "CoterieError"}
    for line in lines[1:]:
        match = re.search(r"──\s*(\w+)(?:\s+\((\w+)\))?", line)
        assert match, line
        depth = match.start()
        parent = parents[max(level for level in parents if level < depth)]
        parents = {level: name for level, name in parents.items() if level < depth} | {depth: match[1]}
        bases[match[1]] = (parent, *([match[2]] if match[2] else []))
    return bases


def test_the_drawing_is_the_tree():
    assert drawn_tree() == {name: tuple(base.__name__ for base in each.__bases__) for name, each in CLASSES.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_documented_and_has_the_root(name):
    assert issubclass(CLASSES[name], CoterieError)
    assert (CLASSES[name].__doc__ or "").strip()


def test_what_the_user_got_wrong_is_a_value_error():
    assert issubclass(InputError, ValueError)
    assert issubclass(errors.Infeasible, ValueError)
    assert not issubclass(errors.ArchitectureMismatch, ValueError), "our limits are not the user's mistake"


def test_out_of_space_is_the_system_error_that_callers_know():
    error = OutOfSpace(errno.ENOSPC, "the disk is full")
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    assert "the disk is full" in str(error)


def test_unknown_name_gives_the_nearest():
    error = UnknownName("recipe", "mergmoe", ["reap", "mergemoe", "msmoe", "freq"])
    assert "unknown recipe 'mergmoe'; did you mean mergemoe" in str(error)
    assert error.nearest[0] == "mergemoe"
    assert isinstance(error, InputError)


def test_unknown_name_without_anything_near_lists_all_sorted():
    error = UnknownName("domain", "xyz", iter(["prose", "code"]))
    assert str(error) == "unknown domain 'xyz'; choose from: code, prose"
    assert error.nearest == []
