"""What is known of each family, as it was when the table beside this file was made: read without torch or transformers.

`python -m coterie.testing.describe --write` makes ``families.json`` from the installed transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from coterie.errors import UnknownName

FILE = Path(__file__).with_name("families.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFacts:
    """What is known of one family.

    Attributes:
        model_type: its name in transformers.
        model_class: the stock class that loads it.
        layers: kind of each layer of the tiny model: "moe" or "dense".
        token_mixing: kinds of attention and what stands in for it, as its config names them; empty when all are alike.
        router: what its router has beside a matrix: "vectors" (biases or scales with an entry an expert), "groups",
            "spare rows" (for shared experts or for "no expert").
        experts: how its experts differ from two halves of gate and up: "no gate", "transposed", "interleaved", "bias",
            "norm" (of each expert's output).
        shared_experts: whether every token also passes experts that are not chosen.
        problem: why it cannot be compressed, None when it can.
        refusal: what Coterie says when it is tried; None when the family works.
    """

    model_type: str
    model_class: str
    layers: tuple[str, ...] = ()
    token_mixing: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    shared_experts: bool = False
    problem: str | None = None
    refusal: str | None = None

    def differences(self, other: FamilyFacts) -> tuple[str, ...]:
        """Return what another reading of the same family says otherwise, a sentence for each fact."""
        sentences = []
        for field in fields(self):
            own_fact, other_fact = getattr(self, field.name), getattr(other, field.name)
            if own_fact != other_fact:
                sentences.append(f"{self.model_type}: {field.name} is {_words(other_fact)}, was {_words(own_fact)}")
        return tuple(sentences)


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyTable:
    """The facts of all families.

    Attributes:
        transformers: the version that they were read from.
        families: the facts, in the order of their names.
    """

    transformers: str
    families: tuple[FamilyFacts, ...]

    def select(self, names: Iterable[str]) -> tuple[FamilyFacts, ...]:
        """Return the facts of these families, or of all when none is named, in the order of their names.

        Raises:
            UnknownName: a name that is not in the table; the message has the nearest ones.
        """
        by_name = {family.model_type: family for family in self.families}
        chosen = sorted(set(names)) or list(by_name)
        for name in chosen:
            if name not in by_name:
                raise UnknownName("model family", name, by_name)
        return tuple(by_name[name] for name in chosen)

    def content(self) -> dict[str, Any]:
        """Return it as JSON content."""
        return {"transformers": self.transformers, "families": [asdict(family) for family in self.families]}


def known_families(file: Path = FILE) -> FamilyTable:
    """Return the table that comes with the package."""
    content = json.loads(file.read_text(encoding="utf-8"))
    families = tuple(FamilyFacts(**_with_tuples(entry)) for entry in content["families"])
    return FamilyTable(transformers=content["transformers"], families=families)


def _with_tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return repr(value)
