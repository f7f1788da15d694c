"""Statistics: one file each, a function ``Observation -> {name: sum over tokens}``.

Every value is a sum over the tokens of the batch, float64, so batches, halves of a text and domains add up. A new
statistic is one file here and one line in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from torch import Tensor

from coterie.errors import UnknownName
from coterie.profile.observation import Observation

Statistic = Callable[[Observation], Mapping[str, Tensor]]

STATISTICS: dict[str, str] = {
    "usage": "coterie.profile.statistics.usage:measure",
    "gate_mass": "coterie.profile.statistics.gate_mass:measure",
    "output_norm": "coterie.profile.statistics.output_norm:measure",
    "reap": "coterie.profile.statistics.reap:measure",
    "router_probability": "coterie.profile.statistics.router_probability:measure",
    "coactivation": "coterie.profile.statistics.coactivation:measure",
    "mean_output": "coterie.profile.statistics.mean_output:measure",
    "logit_correlation": "coterie.profile.statistics.logit_correlation:measure",
}


def load_statistic(name: str) -> Statistic:
    """Return the function of a statistic; raises UnknownName."""
    if name not in STATISTICS:
        raise UnknownName("statistic", name, STATISTICS)
    module, _, attribute = STATISTICS[name].partition(":")
    function: Statistic = getattr(import_module(module), attribute)
    return function
