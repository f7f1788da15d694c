"""A unit: what is in memory at a time when a model is streamed."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A part of the model that is called as a whole and whose weights are in memory together.

    Attributes:
        name: name of its module.
        order: position among the units.
        names: names in memory of its parameters and persistent buffers.
        disk_names: names on disk of the tensors that they are read from.
    """

    name: str
    order: int
    names: tuple[str, ...]
    disk_names: tuple[str, ...]

    def holds(self, module: str) -> bool:
        """Tell whether a module of that name is this unit or a part of it."""
        return module == self.name or module.startswith(f"{self.name}.")
