"""Statistics: one file each, a function ``Observation -> {name: sum over tokens}``.

Every value is a sum over the tokens of the batch, float64, so batches, halves of a text and domains add up; the few in
`MAXIMA` are maxima instead. A new statistic is one file here and one line in the table.

Legend: G domains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

import torch
from torch import Tensor

from coterie.errors import UnknownName
from coterie.profile.observation import Observation

Statistic = Callable[[Observation], Mapping[str, Tensor]]

STATISTICS: dict[str, str] = {
    "usage": "coterie.profile.statistics.usage:measure",
    "channels": "coterie.profile.statistics.channels:measure",
    "gate_mass": "coterie.profile.statistics.gate_mass:measure",
    "output_norm": "coterie.profile.statistics.output_norm:measure",
    "reap": "coterie.profile.statistics.reap:measure",
    "router_probability": "coterie.profile.statistics.router_probability:measure",
    "coactivation": "coterie.profile.statistics.coactivation:measure",
    "mean_output": "coterie.profile.statistics.mean_output:measure",
    "logit_correlation": "coterie.profile.statistics.logit_correlation:measure",
    "easy_ep": "coterie.profile.statistics.easy_ep:measure",
    "tcess": "coterie.profile.statistics.tcess:measure",
    "output_peak": "coterie.profile.statistics.output_peak:measure",
}

#: Values, none of them negative, that are the maximum over tokens instead of a sum.
MAXIMA = frozenset({"output_peak"})


def merged(name: str, one: Tensor, two: Tensor) -> Tensor:
    """Return a value over two sets of tokens together: the sum, or for `MAXIMA` the larger one."""
    return torch.maximum(one, two) if name in MAXIMA else one + two


def over_domains(name: str, value_G: Tensor) -> Tensor:
    """Return a value over all domains; its domain axis comes first."""
    return value_G.amax(0) if name in MAXIMA else value_G.sum(0)


def load_statistic(name: str) -> Statistic:
    """Return the function of a statistic; raises UnknownName."""
    if name not in STATISTICS:
        raise UnknownName("statistic", name, STATISTICS)
    module, _, attribute = STATISTICS[name].partition(":")
    function: Statistic = getattr(import_module(module), attribute)
    return function
