"""Which entry of config.json says how many experts a token chooses.

Nothing is listed by family: meta models that differ in one entry are asked, as for the number of experts
(`coterie.model.arch.layers`) and their width (`coterie.model.arch.width`).

Legend: E experts, K chosen experts.
"""

from __future__ import annotations

import json
import re

from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.entries import Entry, names_of, whole_numbers, with_values
from coterie.model.arch.layers import Architecture, once_per_config
from coterie.model.arch.meta import meta_model
from coterie.model.arch.probe import probe_top_k

_LIKELY = re.compile(r"tok|top|chosen|select|activ|moe_k")


@once_per_config
def choice_key(architecture: Architecture) -> Entry:
    """Derive the path of the entry that is K.

    Raises:
        Infeasible: no entry lets every token choose more experts and changes nothing else, or layers differ in K.
        ArchitectureMismatch: several entries could be meant.
    """
    choices = sorted({layer.top_k for layer in architecture.layers})
    if len(choices) > 1:
        raise Infeasible(f"the layers choose different numbers of experts ({choices}), which no single entry says")
    tried: set[Entry] = set()
    for likely in (True, False):
        for source in (architecture.config, architecture.model.config.to_dict()):
            candidates: list[Entry] = []
            for path, value in whole_numbers(source):
                if value != choices[0] or path in tried or bool(_LIKELY.search(path[-1])) != likely:
                    continue
                tried.add(path)
                if not any(path[-1] in names_of(architecture.model, other) for other in candidates):
                    candidates += [path] if _chooses_twice(architecture, path) else []
            if len(candidates) > 1:
                names = [".".join(path) for path in candidates]
                raise ArchitectureMismatch(f"several config keys could be the number of chosen experts: {names}")
            if candidates:
                return candidates[0]
    raise Infeasible(f"no entry of config.json lets a token choose more than {choices[0]} experts")


def _chooses_twice(architecture: Architecture, path: Entry) -> bool:
    """Tell whether twice the value at a path makes tokens choose 2 K of 2 E experts, and leaves every shape alone."""
    layer = architecture.layers[0]
    doubled = {architecture.expert_key: 2 * layer.num_experts}
    config = with_values(architecture.config, {**doubled, path: 2 * layer.top_k}, architecture.model)
    names = [each.experts for each in architecture.layers]
    try:
        model = meta_model(config)
        top_k_by_name = probe_top_k(
            model, names, "a model of twice the experts", known_as=json.dumps(config, sort_keys=True, default=str)
        )
        before = meta_model(with_values(architecture.config, doubled, architecture.model))
    except Exception:  # whatever a family's constructor or block raises, it means: not this entry
        return False
    same = {name: tensor.shape for name, tensor in before.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    return same and [top_k_by_name.get(name) for name in names] == [2 * layer.top_k] * len(names)
