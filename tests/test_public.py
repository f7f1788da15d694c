"""The front door: every public name works whatever was imported before, and is imported only when it is used."""

import importlib
import inspect
import subprocess
import sys

import pytest

import coterie
from coterie.cli.main import app

PACKAGES = {
    "bench": "coterie.bench.run",
    "compress": "coterie.compress.apply",
    "evaluate": "coterie.evaluate.run",
    "export": "coterie.export.run",
    "profile": "coterie.profile.run",
    "report": "coterie.report.page",
}


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_name_is_there_and_listed():
    for name in coterie.__all__:
        assert callable(getattr(coterie, name)), name
        assert name in dir(coterie)
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = coterie.nonsense


def test_every_command_on_a_model_is_a_function_of_the_same_name():
    commands = {command.callback.__name__ for command in app.registered_commands}
    assert commands - {"recipes", "families"} == {name for name in coterie.__all__ if name in commands}


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, coterie; print(coterie.inspect.__module__, {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert python(code) == "coterie.model.arch.inspect set()"


@pytest.mark.parametrize(("name", "home"), PACKAGES.items())
def test_a_package_can_be_called_like_its_function(name, home):
    function = getattr(importlib.import_module(home), name)
    package = getattr(coterie, name)
    assert inspect.ismodule(package)
    assert package.__path__
    assert inspect.signature(package) == inspect.signature(function)
    assert package.function() is function
    required = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
    ]
    assert required
    with pytest.raises(TypeError, match=f"{name}\\(\\) missing"):
        package()


@pytest.mark.long
def test_the_order_of_imports_does_not_matter():
    # One interpreter for all orders: what was imported of ours is forgotten in between.
    lines = ["import sys"]
    for name, home in PACKAGES.items():
        ways = [f"from {home} import {name} as function", f"import coterie; coterie.{name}"]
        for way in ways:
            lines += [
                "[sys.modules.pop(each) for each in list(sys.modules) if each.split('.')[0] == 'coterie']",
                way,
                *ways,
                f"import coterie, {home}",
                f"assert coterie.{name} is sys.modules['coterie.{name}']",
                f"assert coterie.{name}.function() is sys.modules['{home}'].{name}",
                f"assert type(coterie.{name}).__name__ == 'CallablePackage'",
            ]
    assert python("\n".join([*lines, "print('done')"])) == "done"


def test_a_call_reaches_the_function(tiny, text):
    made = coterie.profile(tiny(), text=text, tokens=128, seq_len=64)
    assert isinstance(made, coterie.Profile)
    assert made.num_tokens == (64, 64)
    assert coterie.plan(tiny(), made, keep=0.5, recipe="mergemoe").layers[0].num_experts == 4
