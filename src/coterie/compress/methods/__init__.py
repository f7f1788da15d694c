"""Passes: one file each, a function ``(state, plan, **options) -> state``, and what it needs from a profile.

A pass module holds the pass and a function ``needs(**options) -> tuple[str, ...]`` that names the statistics it reads.
One that chooses by statistics alone also holds ``decide(layer, plan, measured, **options) -> plan``, see
`coterie.compress.state`; one that does not take about as long as running the token sample through all experts holds
`SAMPLE_RUNS`, how many times that long. A pass of your own is named ``"module:attribute"`` in a recipe; nothing is
registered.
A new pass is one file here and one line in the table; a method of a paper is a recipe of passes
(`coterie.compress.recipes`).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

from coterie.compress.layer_plan import LayerPlan
from coterie.compress.state import LayerState, Measured
from coterie.errors import InputError, UnknownName
from coterie.model.arch.layers import MoELayer

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
    "slim-activations": "coterie.compress.methods.slim_activations:slim_activations",
    "refit-router": "coterie.compress.methods.refit_router:refit_router",
}


class Pass(Protocol):
    """A pass of a recipe."""

    def __call__(self, state: LayerState, plan: LayerPlan, **options: Any) -> LayerState:
        """Return the state after the pass; the given one is not changed."""


class Decide(Protocol):
    """What a pass decides by statistics alone, before any weight is read."""

    def __call__(self, layer: MoELayer, plan: LayerPlan, measured: Measured, **options: Any) -> LayerPlan:
        """Return the plan with what the pass decides about this layer; the given one is not changed."""


def load_pass(name: str) -> Pass:
    """Return a pass by name or as ``"module:attribute"``; raises UnknownName, or InputError where it is not there."""
    module, attribute = _home(name)
    function: Pass = getattr(module, attribute)
    return function


def load_decide(name: str) -> Decide | None:
    """Return what a pass decides by, None where it decides nothing without weights; raises like `load_pass`."""
    function: Decide | None = getattr(_home(name)[0], "decide", None)
    return function


def needs_of(name: str, **options: Any) -> tuple[str, ...]:
    """Return the statistics that a pass reads with these options; raises like `load_pass`."""
    needs: tuple[str, ...] = _home(name)[0].needs(**options)
    return needs


def sample_runs(name: str) -> float:
    """Return how long a pass takes, in runs of the token sample through all experts; raises like `load_pass`."""
    runs: float = getattr(_home(name)[0], "SAMPLE_RUNS", 1.0)
    return runs


def _home(name: str) -> tuple[ModuleType, str]:
    if ":" not in name and name not in PASSES:
        raise UnknownName("pass", name, PASSES)
    place, _, attribute = PASSES.get(name, name).partition(":")
    try:
        module = import_module(place)
    except ImportError as error:
        raise InputError(f"pass {name} cannot be imported ({error}); write module:attribute") from error
    missing = [needed for needed in (attribute, "needs") if not hasattr(module, needed)]
    if missing:
        raise InputError(f"pass {name}: module {place} has no {missing[0]!r}; it holds the pass and a function needs")
    return module, attribute
