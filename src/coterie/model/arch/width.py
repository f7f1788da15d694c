"""Which entries of config.json say how wide experts are, and which widths a plain checkpoint can have.

Nothing is listed by family. Meta models that differ in one entry are compared, as for the number of experts
(`coterie.model.arch.layers`): the entry that makes all routed experts narrower is the one to change. In half of all
families it makes shared experts narrower too, as their number times the width of one. Those must stay as they are, so a
second entry is looked for that gives them their size back, such as the number of shared experts: half the width, twice
the number. That the rest of the model computes the same with it is checked on the weights (`coterie.compress.layer`).

Legend: F expert width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch, Infeasible
from coterie.model.arch.entries import Entry, config_entries, names_of, with_values
from coterie.model.arch.experts import canonical_experts
from coterie.model.arch.layers import Architecture, once_per_config
from coterie.model.arch.meta import meta_model

#: Grouped matrix products, transformers' default for experts, want rows of a multiple of 16 bytes: torch says "strides
#: should be multiple of 16 bytes". So many weights of 16 bits are that.
ALIGNMENT = 8

_LIKELY = re.compile(r"expert|intermediate|width|dense|ffn|mlp")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthRule:
    """How config.json says the width of the routed experts.

    Attributes:
        key: path of the entry that is the width.
        width: F.
        multipliers: entries that go up as the width goes down, with their value at F, so that the parts of the model
            that are sized by both keep their size.
        fixed: entries that are empty and stand for the width then, with the value that keeps everything else as it is.
    """

    key: Entry
    width: int
    multipliers: tuple[tuple[Entry, int], ...] = ()
    fixed: tuple[tuple[Entry, int], ...] = ()

    def values(self, width: int) -> dict[Entry, int]:
        """Return what to set in config.json for experts of a width; raises Infeasible for one that cannot be."""
        self.check_feasible(width)
        changed = {path: value * self.width // width for path, value in self.multipliers}
        return {self.key: width} | changed | dict(self.fixed)

    def feasible_widths(self) -> list[int]:
        """Return the widths that a plain checkpoint can have, ascending; F is the last."""
        step = math.gcd(self.width, ALIGNMENT)
        return [width for width in range(step, self.width + 1, step) if self._problem(width) is None]

    def check_feasible(self, width: int) -> None:
        """Raise Infeasible, with the nearest widths that can be, for one that a plain checkpoint cannot have."""
        problem = self._problem(width)
        if problem is None:
            return
        near = sorted(sorted(self.feasible_widths(), key=lambda each: abs(each - width))[:2])
        raise Infeasible(
            f"experts of width {width} instead of {self.width} are not possible: {problem}; nearest widths that are: "
            f"{', '.join(map(str, near))}"
        )

    def _problem(self, width: int) -> str | None:
        if not 1 <= width <= self.width:
            return f"it must be 1 to {self.width}"
        step = math.gcd(self.width, ALIGNMENT)
        if width % step:
            return f"fast matrix products want a multiple of {step}"
        for path, value in self.multipliers:
            if value * self.width % width:
                return (
                    f"config.json sizes other parts of the model by {self.key[-1]} times {path[-1]} = {value} x "
                    f"{self.width}, which {width} does not divide"
                )
        return None


@once_per_config
def width_rule(architecture: Architecture) -> WidthRule:
    """Derive how a config says the width of the routed experts.

    Raises:
        ArchitectureMismatch: layers differ in width, or several entries could be meant.
        Infeasible: no entry makes the experts narrower and nothing else.
    """
    widths = sorted({layer.width for layer in architecture.layers})
    if len(widths) > 1:
        raise ArchitectureMismatch(f"layers with experts of different widths ({widths}) cannot all be given the same")
    width = widths[0]
    divisor = next((number for number in range(2, width + 1) if width % number == 0), 0)
    if not divisor:
        raise Infeasible(f"experts of width {width} cannot be narrower")
    search = _Search(architecture, width, divisor)
    key = search.find_key()
    multipliers, fixed = search.find_repair(key)
    return WidthRule(key=key, width=width, multipliers=multipliers, fixed=fixed)


class _Search:
    """Compares meta models with experts narrower by a factor."""

    def __init__(self, architecture: Architecture, width: int, divisor: int) -> None:
        self._architecture = architecture
        self._width = width
        self._divisor = divisor
        self._experts = tuple(f"{layer.experts}." for layer in architecture.layers)
        self._shapes = self._others(architecture.model)

    def find_key(self) -> Entry:
        """Find the entry that makes all routed experts narrower, whatever else it does."""
        candidates: list[Entry] = []
        # Entries that stand in the file come first: a default that it leaves out may have another name in the class.
        for stage in self._stages():
            for path, value in stage:
                twin = any(path in _paths(self._architecture.model, other) for other in candidates)
                if value == self._width and not twin and self._narrowed({path: value // self._divisor}) is not None:
                    candidates.append(path)
            if candidates:
                break
        if len(candidates) != 1:
            names = [".".join(path) for path in candidates] or "none"
            raise ArchitectureMismatch(
                f"the config key that says how wide experts are ({self._width}) is not clear; found: {names}"
            )
        return candidates[0]

    def find_repair(self, key: Entry) -> tuple[tuple[tuple[Entry, int], ...], tuple[tuple[Entry, int], ...]]:
        """Find the entries that give everything but the experts its size back; see `WidthRule`."""
        multipliers: list[tuple[Entry, int]] = []
        fixed: list[tuple[Entry, int]] = []
        values = {key: self._width // self._divisor}
        wrong = self._narrowed(values)
        assert wrong is not None
        while wrong:
            step = self._best_step(values, wrong)
            if step is None:
                raise Infeasible(
                    f"{'.'.join(key)} = {self._width} in config.json sizes the experts and {len(wrong)} other tensors "
                    f"({sorted(wrong)[0]}, ...), and no other entry keeps those as they are: no plain checkpoint of "
                    "this family can have narrower experts alone; use a recipe that lowers their number"
                )
            path, old, new, wrong = step
            values[path] = new
            (fixed if old is None else multipliers).append((path, new if old is None else old))
        return tuple(multipliers), tuple(fixed)

    def _best_step(
        self, values: Mapping[Entry, int], wrong: set[str]
    ) -> tuple[Entry, int | None, int, set[str]] | None:
        """Return the entry that leaves fewest wrong, its old and new value and what is left; None when none helps."""
        lengths = {length for name in wrong for length in self._shapes.get(name, ())}
        for stage in self._stages():
            steps: list[tuple[Entry, int | None, int, set[str]]] = []
            for path, value in stage:
                if path in values or any(path in _paths(self._architecture.model, other) for other in values):
                    continue
                for new in self._replacements(value, lengths):
                    still_wrong = self._narrowed({**values, path: new})
                    if still_wrong is not None and still_wrong < wrong:
                        steps.append((path, value, new, still_wrong))
            if steps:
                least = min(len(still_wrong) for *_, still_wrong in steps)
                best = [step for step in steps if len(step[3]) == least]
                names = {".".join(path) for path, *_ in best}
                twins = _paths(self._architecture.model, best[0][0])
                if any(path not in twins for path, *_ in best):
                    raise ArchitectureMismatch(f"several config keys could keep shared experts as they are: {names}")
                return best[0]
        return None

    def _replacements(self, value: int | None, lengths: set[int]) -> list[int]:
        if value is None:
            return sorted(lengths)
        return [value * self._divisor] if value * self._width in lengths else []

    def _stages(self) -> Iterator[list[tuple[Entry, int | None]]]:
        """Yield entries to try, likely ones first: of the file, then of the class, then unlikely ones of both."""
        sources = [self._architecture.config, self._architecture.model.config.to_dict()]
        for likely in (True, False):
            for source in sources:
                yield [
                    (path, value)
                    for path, value in config_entries(source)
                    if (value is None or (isinstance(value, int) and not isinstance(value, bool)))
                    and bool(_LIKELY.search(path[-1])) == likely
                    and path != self._architecture.expert_key
                ]

    def _narrowed(self, values: Mapping[Entry, int]) -> set[str] | None:
        """Return the tensors outside the experts that other values change; None unless all experts become narrower."""
        architecture = self._architecture
        try:
            model = meta_model(with_values(architecture.config, values, architecture.model))
            experts = [canonical_experts(model.get_submodule(layer.experts)) for layer in architecture.layers]
        except Exception:  # whatever a family's constructor raises, it means: not this entry
            return None
        narrower = [(layer.num_experts, self._width // self._divisor) for layer in architecture.layers]
        if [(each.num_experts, each.width) for each in experts] != narrower:
            return None
        shapes = self._others(model)
        return {name for name in shapes.keys() | self._shapes.keys() if shapes.get(name) != self._shapes.get(name)}

    def _others(self, model: PreTrainedModel) -> Shapes:
        state = model.state_dict().items()
        return {name: tuple(tensor.shape) for name, tensor in state if not name.startswith(self._experts)}


def _paths(model: PreTrainedModel, path: Entry) -> set[Entry]:
    """Return a path under all names that its entry has."""
    return {(*path[:-1], name) for name in names_of(model, path)} | {path}
