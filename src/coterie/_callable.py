"""Packages that are also verbs.

`coterie.profile`, `coterie.compress`, `coterie.evaluate` and `coterie.report` are packages, and the library's functions
have the same names. Importing any module of a package makes Python set the package as an attribute of `coterie`, so a
function of that name would vanish as soon as anything imported, say, ``coterie.profile.run``. Therefore the package
itself can be called and calls the function: whatever was imported first, ``coterie.profile`` is one object.
To type checkers it is the function, see ``coterie/__init__.py``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package that, when called, imports its function and calls it."""

    _verb: str

    def function(self) -> Callable[..., Any]:
        """Import and return the function."""
        home, _, name = self._verb.partition(":")
        function: Callable[..., Any] = getattr(import_module(home), name)
        return function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.function()(*arguments, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function())


def make_callable(package: str, verb: str) -> None:
    """Make a package callable; for its own ``__init__``.

    Args:
        package: name of the package (``__name__``).
        verb: what a call does, as ``"module:function"``.
    """
    module = sys.modules[package]
    module.__class__ = CallablePackage
    assert isinstance(module, CallablePackage)
    module._verb = verb
