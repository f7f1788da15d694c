"""Decide, without touching weights, what every layer gets: Budget + Profile -> Plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from coterie.artifact import open_artifact, write_artifact
from coterie.compress.recipes import get_recipe
from coterie.compress.state import LayerSize
from coterie.errors import ArchitectureMismatch, Infeasible, InputError, StaleArtifact, UnsupportedDtype
from coterie.model.checkpoint import Checkpoint
from coterie.model.convert import TORCH_DTYPES, Crossing
from coterie.model.layers import Architecture, MoELayer
from coterie.model.load import open_checkpoint, read_manifest
from coterie.model.units import format_bytes, parse_bytes
from coterie.profile.profile import Profile

Router = Literal["plain", "map"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `compress` will do: a size for every MoE layer and the passes of a recipe.

    Attributes:
        recipe: name of the recipe.
        router: "plain" (M rows, loads anywhere) or "map" (E rows and a map, needs Coterie to load).
        sizes: what each MoE layer gets, in order.
        untouched: parts of the checkpoint that the model class has no place for, such as heads for multi-token
            prediction; they are copied as they are, their experts too.
        original_bytes: bytes of all tensors of the checkpoint; of a quantised one, as it is read.
        predicted_bytes: bytes of all tensors of the result.
        original_parameters: number of elements of all tensors of the checkpoint.
        predicted_parameters: number of elements of all tensors of the result.
        seed: seed of everything random in the passes.
        inputs: digests of the model (and the profile's text) that the plan was made from.
    """

    recipe: str
    router: Router
    sizes: tuple[LayerSize, ...]
    untouched: tuple[str, ...]
    original_bytes: int
    predicted_bytes: int
    original_parameters: int
    predicted_parameters: int
    seed: int
    inputs: Mapping[str, str]

    def body(self) -> dict[str, Any]:
        """Return the plan as JSON content (without the input digests)."""
        content = asdict(self)
        del content["inputs"]
        return content

    def save(self, path: str | Path) -> Path:
        """Write the plan as one JSON file."""
        target = Path(path)
        write_artifact(target, kind="plan", body=self.body(), inputs=self.inputs)
        return target

    @classmethod
    def load(cls, path: str | Path, *, inputs: Mapping[str, str] | None = None) -> Plan:
        """Read a plan; raises CorruptArtifact or, when made from other inputs, StaleArtifact."""
        found = open_artifact(Path(path), kind="plan", inputs=inputs)
        body = dict(found.body)
        sizes = tuple(LayerSize(**size) for size in body.pop("sizes"))
        untouched = tuple(body.pop("untouched"))
        return cls(**body, sizes=sizes, untouched=untouched, inputs=found.inputs)


def plan(
    model: str | Path,
    profile: Profile | str | Path | None = None,
    *,
    keep: float | None = None,
    experts: int | None = None,
    budget: str | int | None = None,
    recipe: str = "mergemoe",
    router: Router = "plain",
    seed: int = 0,
) -> Plan:
    """Decide what every layer gets. Exactly one of `keep`, `experts` and `budget` says how small.

    Args:
        model: a model folder or hub id; only headers are read.
        profile: a profile of the same model; with it the plan checks that the recipe finds what it needs.
        keep: share of the experts to keep in each layer, above 0 and up to 1.
        experts: experts to keep in each layer.
        budget: largest size of the weight files, such as "12GiB", "800MB" or a number of bytes.
        recipe: name of a recipe.
        router: "plain" or "map".
        seed: seed of everything random in the passes.

    Raises:
        InputError: not exactly one wish, or a wish out of range.
        Infeasible: too few experts for the router, or a budget below the smallest result; names the nearest wish.
        UnknownName: no such recipe.
        StaleArtifact: the profile is of another model.
    """
    checkpoint = open_checkpoint(model)
    architecture = Architecture.of(checkpoint)
    if isinstance(profile, str | Path):
        profile = Profile.load(profile, model_digest=checkpoint.digest)
    return make_plan(
        checkpoint, architecture, Crossing(checkpoint, architecture.model), profile,
        keep=keep, experts=experts, budget=budget, recipe=recipe, router=router, seed=seed,
    )  # fmt: skip


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    crossing: Crossing,
    profile: Profile | None,
    *,
    keep: float | None,
    experts: int | None,
    budget: str | int | None,
    recipe: str,
    router: Router,
    seed: int,
) -> Plan:
    """Make a plan for a checkpoint that is already open; see `plan`."""
    chosen = get_recipe(recipe)
    chosen.with_router(router)
    manifest = read_manifest(checkpoint.path)
    if manifest is not None and manifest["router"] == "map":
        raise InputError(f"{checkpoint.path} is a mapped result; compress the model that it was made from")
    if profile is not None:
        check_profile(profile, checkpoint, chosen.needs)
    parts = layer_tensors(checkpoint, architecture.layers, crossing)
    _check_dtypes(checkpoint, parts)
    sizing = _Sizing(checkpoint, architecture, crossing, parts, router)
    count = _wished_count(architecture, sizing, keep=keep, experts=experts, budget=budget)
    inputs = {"model": checkpoint.digest}
    if profile is not None:
        inputs["text"] = profile.text_digest
    return Plan(
        recipe=recipe,
        router=router,
        sizes=tuple(LayerSize(num_experts=count) for _ in architecture.layers),
        untouched=untouched_parts(checkpoint, architecture, crossing),
        original_bytes=checkpoint.num_bytes,
        predicted_bytes=sizing.num_bytes(count),
        original_parameters=sum(info.num_elements for info in checkpoint.tensors.values()),
        predicted_parameters=sizing.num_parameters(count),
        seed=seed,
        inputs=inputs,
    )


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Names on disk of one layer's tensors that have an expert axis."""

    experts: tuple[str, ...]
    router: tuple[str, ...]


def layer_tensors(checkpoint: Checkpoint, layers: tuple[MoELayer, ...], crossing: Crossing) -> tuple[LayerTensors, ...]:
    """Return for each layer the names on disk of its experts' and its router's tensors.

    Raises:
        ArchitectureMismatch: a layer has no expert or no router tensor in the checkpoint.
    """
    owner: dict[str, tuple[int, str]] = {}
    for layer in layers:
        owner.update({name: (layer.index, "router") for name, _ in layer.router_tensors})
    prefixes = {layer.experts: layer.index for layer in layers}
    found: list[dict[str, list[str]]] = [{"experts": [], "router": []} for _ in layers]
    for disk_name in sorted(checkpoint.tensors):
        memory_name = crossing.memory_names[disk_name]
        if memory_name in owner:
            index, kind = owner[memory_name]
            found[index][kind].append(disk_name)
        elif (prefix := memory_name.rpartition(".")[0]) in prefixes:
            found[prefixes[prefix]]["experts"].append(disk_name)
    for layer, entry in zip(layers, found, strict=True):
        for kind, names in entry.items():
            if not names:
                raise ArchitectureMismatch(f"{checkpoint.path}: no tensor of the {kind} of {layer.block} was found")
    return tuple(LayerTensors(experts=tuple(entry["experts"]), router=tuple(entry["router"])) for entry in found)


def untouched_parts(checkpoint: Checkpoint, architecture: Architecture, crossing: Crossing) -> tuple[str, ...]:
    """Return the names on disk, up to the layer number, of tensors that the model class has no place for."""
    places = architecture.model.state_dict().keys()
    parts = set()
    for disk_name, memory_name in crossing.memory_names.items():
        if memory_name not in places:
            match = re.match(r".*?\.\d+(?=\.)", disk_name)
            parts.add(match.group() if match else disk_name)
    return tuple(sorted(parts))


class _Sizing:
    """Predicts the size of the result: tensors with an expert axis scale with the number of experts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        crossing: Crossing,
        parts: tuple[LayerTensors, ...],
        router: Router,
    ) -> None:
        self._checkpoint = checkpoint
        self._layers = architecture.layers
        # Router rows behind the experts' (for shared experts, or for "no expert") stay, however many experts go.
        axes = {name: axis for layer in self._layers for name, axis in layer.router_tensors}
        state = architecture.model.state_dict()
        self._rows = {
            disk: state[memory].shape[axes[memory]] for disk, memory in crossing.memory_names.items() if memory in axes
        }
        self._scaled = [(*part.experts, *(part.router if router == "plain" else ())) for part in parts]

    def num_bytes(self, count: int) -> int:
        return self._total(count, "num_bytes")

    def num_parameters(self, count: int) -> int:
        return self._total(count, "num_elements")

    def _total(self, count: int, measure: str) -> int:
        total: int = sum(getattr(info, measure) for info in self._checkpoint.tensors.values())
        for layer, names in zip(self._layers, self._scaled, strict=True):
            experts = layer.num_experts
            scaled: int = sum(
                getattr(self._checkpoint.tensors[name], measure) * experts // self._rows.get(name, experts)
                for name in names
            )
            total += scaled * count // layer.num_experts - scaled
        return total


def _wished_count(
    architecture: Architecture, sizing: _Sizing, *, keep: float | None, experts: int | None, budget: str | int | None
) -> int:
    wishes = {"keep": keep, "experts": experts, "budget": budget}
    given = [name for name, value in wishes.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"say how small with exactly one of --keep, --experts and --budget; got {given or 'none'}")
    total = architecture.layers[0].num_experts
    if keep is not None:
        if not 0 < keep <= 1:
            raise InputError(f"--keep {keep:g} is not a share: it must be above 0 and at most 1 (0.5 keeps half)")
        experts = max(1, round(keep * total))
    if budget is not None:
        return _largest_within(architecture, sizing, parse_bytes(budget))
    assert experts is not None
    if not 1 <= experts <= total:
        raise Infeasible(f"--experts {experts} is out of range: every layer has {total}; choose 1 to {total}")
    architecture.check_feasible(experts)
    return experts


def _largest_within(architecture: Architecture, sizing: _Sizing, limit: int) -> int:
    counts = architecture.feasible_counts()
    fitting = [count for count in counts if sizing.num_bytes(count) <= limit]
    if not fitting:
        floor = sizing.num_bytes(counts[0])
        raise Infeasible(
            f"a budget of {format_bytes(limit)} cannot be met by keeping fewer experts: the least that can be routed, "
            f"{counts[0]} a layer, takes {format_bytes(floor)}"
        )
    return fitting[-1]


def check_profile(profile: Profile, checkpoint: Checkpoint, needs: tuple[str, ...]) -> None:
    """Raise StaleArtifact for the profile of another model, ArchitectureMismatch where it lacks what a recipe needs."""
    if profile.model_digest != checkpoint.digest:
        raise StaleArtifact(
            f"the profile was made from another model ({profile.model_digest[:12]}; {checkpoint.path} is "
            f"{checkpoint.digest[:12]}); run coterie profile again"
        )
    check_statistics(profile.statistics[0].keys(), needs)


def check_statistics(held: Iterable[str], needs: Iterable[str]) -> None:
    """Raise ArchitectureMismatch when a recipe needs statistics that were not measured."""
    missing = sorted(set(needs) - set(held))
    if missing:
        raise ArchitectureMismatch(
            f"the recipe needs {', '.join(missing)}, which the profile does not hold: the model records no router "
            "scores; use a recipe that compares outputs or weights, such as hc-smoe or mergemoe"
        )


def _check_dtypes(checkpoint: Checkpoint, parts: tuple[LayerTensors, ...]) -> None:
    for part in parts:
        for name in (*part.experts, *part.router):
            dtype = checkpoint.tensors[name].dtype
            if dtype not in TORCH_DTYPES:
                raise UnsupportedDtype(
                    f"{checkpoint.path}: {name} is stored as {dtype}; experts in {', '.join(TORCH_DTYPES)} can be "
                    "compressed: convert the checkpoint first (transformers dequantizes on load)"
                )
