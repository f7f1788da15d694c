"""One number under several names in config.json: entries beside the one that the config class reads.

Some checkpoints state a number twice, under the name that transformers reads and under one that another program reads.
When the number changes, both must. Nothing is listed by family: an entry that the config class does not know, that has
the same value and whose name says the same in other words, is another spelling of it. A name that says it and something
more could mean either, so it is refused with its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from coterie.errors import ArchitectureMismatch
from coterie.model.arch.entries import Entry, config_entries, names_of, with_value
from coterie.model.arch.meta import meta_model

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")

# Words of one meaning, by the word that stands for them; those that say nothing here stand for "".
_MEANINGS = {
    **dict.fromkeys(("expert", "experts", "moe"), "expert"),
    **dict.fromkeys(("top", "topk", "k", "select", "selected", "chosen", "active", "activated"), "chosen"),
    **dict.fromkeys(("intermediate", "ffn", "inner", "mlp", "feedforward"), "inner"),
    **dict.fromkeys(("tok", "toks", "token", "tokens"), "token"),
    **dict.fromkeys(("num", "n", "number", "of", "count", "total", "local", "routed", "router"), ""),
    **dict.fromkeys(("size", "dim", "width", "hidden"), ""),
}  # fmt: skip

#: With one of these words a name counts or places something else.
_OTHER_THINGS = frozenset(
    (
        "shared", "group", "groups", "layer", "layers", "head", "heads", "parallel", "capacity", "freq", "frequency",
        "step", "every", "period", "offset", "start", "end", "index", "id", "interval",
    )
)  # fmt: skip


def other_spellings(
    config: Mapping[str, Any], model: PreTrainedModel, path: Entry, old: int, new: int
) -> dict[Entry, int | list[int]]:
    """Find the entries that say the same as one whose value changes, and what they must say then.

    Args:
        config: the content of config.json.
        model: a model of that config; its config class knows which entries are read.
        path: of the entry that changes.
        old: its value.
        new: its new value.

    Returns:
        New values by path, of entries under names that the config class does not know. A list of one value for each
        layer stays a list.

    Raises:
        ArchitectureMismatch: an entry of that value, which the class does not read, could mean the same.
    """
    if old == new:
        return {}
    meanings = {frozenset(_meaning(name)) for name in names_of(model, path)} - {frozenset()}
    changed: dict[Entry, int | list[int]] = {}
    for other, value in config_entries(config):
        holder, known_names = _holder(model.config, other)
        if other[-1] in known_names or other == path or not _equals(value, old):
            continue
        meaning = _meaning(other[-1])
        on_the_way = other[:-1] == path[: len(other) - 1]
        if on_the_way and meaning in meanings:
            changed[other] = [new] * len(value) if isinstance(value, list) else new
            continue
        unclear = (on_the_way or holder is None) and any(_could_be(meaning, each) for each in meanings)
        if unclear and not _is_read(config, model, other, new):
            raise ArchitectureMismatch(
                f"config.json says {'.'.join(path)} = {old}, which becomes {new}, and {'.'.join(other)} = {value}, "
                "which transformers does not read and which may be the same number under another name: in a copy of "
                f"the model folder remove {other[-1]} from config.json if it is, or rename it if it is not"
            )
    return changed


def _meaning(key: str) -> frozenset[str]:
    """Return what the name of an entry says, as a set of words that stand for all of their meaning."""
    words = [word.lower() for word in _WORD.findall(key)]
    meaning = {_MEANINGS.get(word, word) for word in words} - {""}
    if {"per", "token"} <= meaning:
        meaning = meaning - {"per", "token"} | {"chosen"}
    # "top_k" and "experts_per_token" both say how many experts are chosen.
    return frozenset(meaning - {"expert"} if "chosen" in meaning else meaning)


def _could_be(meaning: frozenset[str], known: frozenset[str]) -> bool:
    if not meaning or (meaning - known) & _OTHER_THINGS:
        return False
    return meaning <= known or known <= meaning


def _equals(value: Any, number: int) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(type(each) is int and each == number for each in values)


def _holder(config: Any, path: Entry) -> tuple[PreTrainedConfig | None, set[str]]:
    """Return the config object that reads the mapping of an entry, None where none does, and all names it knows."""
    for key in path[:-1]:
        config = getattr(config, key, None)
    if not isinstance(config, PreTrainedConfig):
        return None, set()
    fields: Mapping[str, Any] = getattr(type(config), "__dataclass_fields__", {})
    return config, {*fields, *config.attribute_map, *config.attribute_map.values()}


def _is_read(config: Mapping[str, Any], model: PreTrainedModel, path: Entry, value: int) -> bool:
    """Tell whether another value of an entry that a config class does not declare changes anything but itself."""
    try:
        other = meta_model(with_value(config, path, value))
    except Exception:  # whatever a family's constructor raises, it has read the entry
        return True
    if _shapes(other) != _shapes(model):
        return True
    mine, theirs = (dict(_without(each.config.to_dict(), path)) for each in (model, other))
    return mine != theirs


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _without(config: Mapping[str, Any], path: Entry) -> Iterator[tuple[Entry, str]]:
    # As text, since a config may hold numbers that do not equal themselves.
    return ((other, repr(value)) for other, value in config_entries(config) if other != path)
