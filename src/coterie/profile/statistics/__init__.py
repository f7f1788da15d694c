"""Statistics: what is measured of the experts of a layer, value by value, as sums over tokens.

Every value is a function ``Observation -> sum over the tokens of the batch`` (float64); None where the model does not
show what it is made from. Batches, halves of a text and domains add up; the few in `MAXIMA` are maxima instead. A new
value is one function in a file here and one line in the table. No torch here.

Matrices that would be too large by domain and in float64 are a second kind, `MATRICES`: functions that add a batch in
place to one float32 sum over all text, on the device that computes the layer. Their halves add up to rounding: a sum of
B blocks of up to 1,024 tokens is within ``(B + 1024) 2**-24 sqrt(m_ii m_jj)`` of the exact one, element by element.

Legend: E experts, D model width, F expert width, G domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from coterie.errors import UnknownName

if TYPE_CHECKING:
    from torch import Tensor

    from coterie.model.arch.layers import MoELayer
    from coterie.profile.observation import Observation

    Statistic = Callable[[Observation], Tensor | None]
    MatrixStatistic = Callable[[Observation, Tensor], None]

STATISTICS: dict[str, str] = {
    "tokens": "coterie.profile.statistics.usage:tokens",
    "usage": "coterie.profile.statistics.usage:usage",
    "gate_mass": "coterie.profile.statistics.gate_mass:gate_mass",
    "reap": "coterie.profile.statistics.reap:reap",
    "output_norm": "coterie.profile.statistics.output_norm:output_norm",
    "output_square": "coterie.profile.statistics.output_norm:output_square",
    "output_peak": "coterie.profile.statistics.output_peak:output_peak",
    "mean_output": "coterie.profile.statistics.mean_output:mean_output",
    "easy_ep": "coterie.profile.statistics.easy_ep:easy_ep",
    "logit_sum": "coterie.profile.statistics.logits:logit_sum",
    "logit_product": "coterie.profile.statistics.logits:logit_product",
    "tcess": "coterie.profile.statistics.tcess:tcess",
    "tcess_tokens": "coterie.profile.statistics.tcess:tcess_tokens",
    "hidden_square": "coterie.profile.statistics.channels:hidden_square",
    "gated_hidden_square": "coterie.profile.statistics.channels:gated_hidden_square",
    "channel_gradient": "coterie.profile.statistics.channels:channel_gradient",
    "channel_fisher": "coterie.profile.statistics.channels:channel_fisher",
    "gradient_energy": "coterie.profile.statistics.channels:gradient_energy",
}

#: Sums over all text, without a domain axis, float32; see above.
MATRICES: dict[str, str] = {
    "hessian_input": "coterie.profile.statistics.hessian:hessian_input",
    "hessian_hidden": "coterie.profile.statistics.hessian:hessian_hidden",
}

#: The axes of a value, in letters of the legend; those that are not named here have one number for each expert, "E".
AXES: dict[str, str] = {
    "tokens": "",
    "mean_output": "ED",
    "logit_product": "EE",
    "hidden_square": "EF",
    "gated_hidden_square": "EF",
    "channel_gradient": "EF",
    "channel_fisher": "EF",
    "gradient_energy": "EF",
    "hessian_input": "EDD",
    "hessian_hidden": "EFF",
}

#: Values, none of them negative, that are the maximum over tokens instead of a sum.
MAXIMA = frozenset({"output_peak"})

#: Values that only a backward pass shows.
GRADIENTS = frozenset({"channel_gradient", "channel_fisher", "gradient_energy"})

#: Values that no recipe and no report reads: measured when they are named.
ON_REQUEST = frozenset({"channel_fisher", *MATRICES})

#: Fields of an `Observation` that are filled only when a value that is made from them is measured.
FIELDS: dict[str, str] = {
    "reap": "norm_TK",
    "output_norm": "norm_TK",
    "output_square": "norm_TK",
    "easy_ep": "norm_TK",
    "output_peak": "peak_TK",
    "hidden_square": "hidden_square_EF",
    "gated_hidden_square": "gated_hidden_square_EF",
}


def wanted_statistics(names: Iterable[str] | None = None, *, gradients: bool = False) -> tuple[str, ...]:
    """Return the values to measure, in the order of the table, each once.

    Args:
        names: those that are asked for; None for all that a recipe or the report reads and a forward pass shows.
        gradients: those that a recipe reads and only a backward pass shows, as well.

    Raises:
        UnknownName: no such statistic.
    """
    known = {**STATISTICS, **MATRICES}
    usual = known.keys() - ON_REQUEST
    wanted = usual - GRADIENTS if names is None else set(names)
    if gradients:
        wanted |= usual & GRADIENTS
    for name in sorted(wanted):
        if name not in known:
            raise UnknownName("statistic", name, known)
    return tuple(name for name in known if name in wanted)


def needs_gradients(names: Iterable[str]) -> bool:
    """Tell whether one of these values is measured in a backward pass only."""
    return not GRADIENTS.isdisjoint(names)


def fields_of(names: Iterable[str]) -> frozenset[str]:
    """Return the fields of an `Observation` that have to be filled for these values."""
    return frozenset(FIELDS[name] for name in names if name in FIELDS)


def merged(name: str, one: Tensor, two: Tensor) -> Tensor:
    """Return a value over two sets of tokens together: the sum, or for `MAXIMA` the larger one."""
    return one.maximum(two) if name in MAXIMA else one + two


def over_domains(name: str, value_G: Tensor) -> Tensor:
    """Return a value over all domains; its domain axis comes first, where it has one."""
    if name in MATRICES:
        return value_G
    return value_G.amax(0) if name in MAXIMA else value_G.sum(0)


def shape_of(name: str, layer: MoELayer) -> tuple[int, ...]:
    """Return the shape of a value of a layer, without the domain axis."""
    sizes = {"E": layer.num_experts, "D": layer.hidden_size, "F": layer.width}
    return tuple(sizes[axis] for axis in AXES.get(name, "E"))


def load_statistic(name: str) -> Statistic:
    """Return the function of a value of the first kind; raises UnknownName."""
    function: Statistic = _load(name, STATISTICS)
    return function


def load_matrix(name: str) -> MatrixStatistic:
    """Return the function of a value of the second kind; raises UnknownName."""
    function: MatrixStatistic = _load(name, MATRICES)
    return function


def _load(name: str, table: dict[str, str]) -> Any:
    if name not in table:
        raise UnknownName("statistic", name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
