"""Names and places of tensors, from disk to a GGUF file: one table (`families`), read from left to right.

`coterie.model.disk.gguf.tensors` reads it from right to left. No torch here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from coterie.model.disk.gguf.families import Family, Row
from coterie.model.disk.gguf.take import Take
from coterie.model.disk.tensors import TensorInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """What cuts of attention matrices hang on.

    Attributes:
        queries: number of heads.
        keys: number of heads of keys and values.
        latent_keys: columns of a head's keys that come from a latent vector (``qk_nope_head_dim``).
    """

    queries: int
    keys: int
    latent_keys: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Which part of a matrix on disk a tensor of a file is; a `Take` for any shape.

    Attributes:
        input_first, turned, stacked: as in a `Take`.
        groups: which heads its rows belong to; None for one group.
        rows: which rows of each group, of how many there are.
    """

    input_first: bool = False
    turned: bool = False
    stacked: bool = False
    groups: Literal["queries", "keys"] | None = None
    rows: Callable[[int, Heads], range | tuple[int, ...]] | None = None

    def take(self, shape: tuple[int, ...], heads: Heads) -> Take:
        """Return how it is taken of a matrix of this shape on disk."""
        rows = (*shape, 1)[1 if self.input_first else 0]
        groups = 1 if self.groups is None else int(getattr(heads, self.groups))
        return Take(
            input_first=self.input_first,
            groups=groups,
            rows=None if self.rows is None else tuple(self.rows(rows // groups, heads)),
            turned=self.turned,
            stacked=self.stacked,
        )


def _neighbours(count: int, heads: Heads) -> tuple[int, ...]:
    """Halves of a head in turn: transformers rotates row i with row i + half, the graph neighbours."""
    half = count // 2
    return tuple(row for pair in range(half) for row in (pair, half + pair))


#: Every cut that a family has, by the name that a row gives it.
CUTS = {
    "whole": Cut(),
    "input first": Cut(input_first=True),
    "first half": Cut(rows=lambda count, heads: range(count // 2)),
    "second half": Cut(rows=lambda count, heads: range(count // 2, count)),
    "even": Cut(rows=lambda count, heads: range(0, count, 2)),
    "odd": Cut(rows=lambda count, heads: range(1, count, 2)),
    "even, input first": Cut(input_first=True, rows=lambda count, heads: range(0, count, 2)),
    "odd, input first": Cut(input_first=True, rows=lambda count, heads: range(1, count, 2)),
    "heads of queries": Cut(groups="queries", rows=_neighbours),
    "heads of keys": Cut(groups="keys", rows=_neighbours),
    "latent keys": Cut(
        groups="queries", rows=lambda count, heads: range(heads.latent_keys), turned=True, stacked=True
    ),
    "latent values": Cut(groups="queries", rows=lambda count, heads: range(heads.latent_keys, count), stacked=True),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a tensor on disk goes, or a part of it.

    Attributes:
        name: in the file.
        expert: which expert of a stack it is; None for a tensor that is whole, or a stack already.
        take: what of it goes there.
    """

    name: str
    expert: int | None = None
    take: Take = field(default_factory=Take)


#: A layer's number, in names on both sides.
_LAYER = re.compile(r"(?:model\.layers|blk)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to, by either of its names; None for those of no layer."""
    layer = _LAYER.match(name)
    return int(layer[1]) if layer else None


def targets_of(
    family: Family, heads: Heads, num_layers: int, tied: bool, tensors: Mapping[str, TensorInfo]
) -> dict[str, tuple[Target, ...] | None]:
    """Return where each tensor on disk goes: None where no place is known, and nothing for what is left out.

    Left out are prediction layers, a head that is the embedding, and what follows from the config.

    Args:
        family: the family.
        heads: the model's.
        num_layers: layers that are run.
        tied: the head is the embedding.
        tensors: the checkpoint's, by name on disk.
    """
    targets: dict[str, tuple[Target, ...] | None] = {}
    for name, info in tensors.items():
        layer = layer_of(name)
        behind = layer is not None and layer >= num_layers
        # Older checkpoints hold rotary frequencies.
        if behind or (tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq"):
            targets[name] = ()
        else:
            targets[name] = tuple(_targets(family, heads, name, info)) or None
    return targets


def _targets(family: Family, heads: Heads, name: str, info: TensorInfo) -> Iterator[Target]:
    for row in family.rows:
        match = pattern_of(row.disk).fullmatch(name)
        if match is None:
            continue
        there = match.groupdict()
        expert = there.pop("expert", None)
        inner = info.shape[1:] if is_stack(row) else info.shape
        yield Target(
            name=row.gguf.format(**there),
            expert=None if expert is None else int(expert),
            take=CUTS[row.cut].take(inner, heads),
        )


def is_known(family: Family, name: str) -> bool:
    """Tell whether a family has a place for a tensor of a file."""
    return any(pattern_of(row.gguf).fullmatch(name) for row in family.rows)


def is_stack(row: Row) -> bool:
    """Tell whether a tensor on disk is a stack of all experts' matrices, or of the vectors that biases are."""
    return "_exps." in row.gguf and "{expert}" not in row.disk


@functools.cache
def pattern_of(template: str) -> re.Pattern[str]:
    """Return the pattern of the names that a name in a `Row` stands for; its groups are what changes."""
    pattern = re.escape(template)
    for part, text in (("layer", r"\d+"), ("expert", r"\d+"), ("kind", "weight|bias")):
        pattern = pattern.replace(rf"\{{{part}\}}", f"(?P<{part}>{text})")
    return re.compile(pattern)
