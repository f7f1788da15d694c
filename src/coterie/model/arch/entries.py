"""Entries of config.json by their path, such as ``("text_config", "num_experts")``: find, change, know their names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

Entry = tuple[str, ...]


def config_entries(config: Mapping[str, Any], path: Entry = ()) -> Iterator[tuple[Entry, Any]]:
    """Yield every entry that is no mapping itself, with its path."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from config_entries(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def whole_numbers(config: Mapping[str, Any]) -> Iterator[tuple[Entry, int]]:
    """Yield every entry that is a whole number, with its path."""
    for path, value in config_entries(config):
        if isinstance(value, int) and not isinstance(value, bool):
            yield path, value


def value_at(config: Mapping[str, Any], model: PreTrainedModel, path: Entry) -> int | None:
    """Return the whole number at a path of config.json, else the default of the config class; None without either."""
    inner: Any = config
    for key in path:
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    if inner is None:
        inner = model.config
        for key in path:
            inner = getattr(inner, key, None)
    return inner if type(inner) is int else None


def with_value(config: Mapping[str, Any], path: Entry, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a path."""
    changed = copy.deepcopy(dict(config))
    inner = changed
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    return changed


def with_values(config: Mapping[str, Any], values: Mapping[Entry, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Return a copy with other values, under all names that each entry has there.

    Args:
        config: the content of config.json.
        values: new values by path.
        model: a model of that config; its config class knows the names.
    """
    changed = copy.deepcopy(dict(config))
    for path, value in values.items():
        changed = with_value(changed, path, value)
        siblings: dict[str, Any] = changed
        for key in path[:-1]:
            siblings = siblings[key]
        for name in names_of(model, path) & siblings.keys():
            siblings[name] = value
    return changed


def names_of(model: PreTrainedModel, path: Entry) -> set[str]:
    """Return all names under which a model's config class knows the entry at a path."""
    config: Any = model.config
    for key in path[:-1]:
        config = getattr(config, key)
    renamed: dict[str, str] = getattr(config, "attribute_map", {})
    own = renamed.get(path[-1], path[-1])
    return {own} | {alias for alias, name in renamed.items() if name == own}
