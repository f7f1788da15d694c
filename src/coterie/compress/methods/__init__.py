"""Passes: one file each, a function ``(state, size, **options) -> state``, and what it needs from a profile.

A pass module holds the pass and a function ``needs(**options) -> tuple[str, ...]`` that names the statistics it reads.
A new pass is one file here and one line in the table; a method of a paper is a recipe of passes
(`coterie.compress.recipes`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from coterie.compress.state import LayerSize, LayerState
from coterie.errors import UnknownName

PASSES: dict[str, str] = {
    "refit-joint": "coterie.compress.methods.refit_joint:refit_joint",
    "reconstruct": "coterie.compress.methods.reconstruct:reconstruct",
    "select": "coterie.compress.methods.select:select",
    "protect": "coterie.compress.methods.protect:protect",
    "leave-one-out": "coterie.compress.methods.leave_one_out:leave_one_out",
    "subset-search": "coterie.compress.methods.subset_search:subset_search",
    "cluster": "coterie.compress.methods.cluster:cluster",
    "align": "coterie.compress.methods.align:align",
    "average": "coterie.compress.methods.average:average",
    "refit-down": "coterie.compress.methods.refit_down:refit_down",
    "subspace": "coterie.compress.methods.subspace:subspace",
    "merge-router": "coterie.compress.methods.merge_router:merge_router",
    "segment": "coterie.compress.methods.segment:segment",
    "slim": "coterie.compress.methods.slim:slim",
    "refit-router": "coterie.compress.methods.refit_router:refit_router",
}

#: Passes that drop experts, and keep those that `LayerState.protected_E` names.
PRUNING_PASSES = ("select", "leave-one-out", "subset-search")


class Pass(Protocol):
    """A pass of a recipe."""

    def __call__(self, state: LayerState, size: LayerSize, **options: Any) -> LayerState:
        """Return the state after the pass; the given one is not changed."""


def load_pass(name: str) -> Pass:
    """Return a pass by name; raises UnknownName."""
    if name not in PASSES:
        raise UnknownName("pass", name, PASSES)
    module, _, attribute = PASSES[name].partition(":")
    function: Pass = getattr(import_module(module), attribute)
    return function


def needs_of(name: str, **options: Any) -> tuple[str, ...]:
    """Return the statistics that a pass reads with these options; raises UnknownName."""
    load_pass(name)
    needs: tuple[str, ...] = import_module(PASSES[name].partition(":")[0]).needs(**options)
    return needs
