"""Decide, without touching weights, what every layer gets: Budget + Profile -> Plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from coterie.artifact import open_artifact, write_artifact
from coterie.compress.recipes import get_recipe
from coterie.compress.sizes import LayerTensors, Sizing, Target, layer_tensors, sizes_for
from coterie.compress.state import LayerSize
from coterie.errors import ArchitectureMismatch, InputError, StaleArtifact, UnsupportedDtype
from coterie.model.arch.conversion import TORCH_DTYPES, WeightConversion
from coterie.model.arch.layers import Architecture
from coterie.model.arch.ragged import places_of
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import read_manifest
from coterie.model.disk.open import open_checkpoint
from coterie.profile.profile import Profile
from coterie.profile.run import check_predicts
from coterie.profile.statistics.channels import needs_gradients

Router = Literal["plain", "mean", "refit", "map"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `compress` will do: a size for every MoE layer and the passes of a recipe.

    Attributes:
        recipe: name of the recipe.
        router: "map" (E rows and a map, needs Coterie to load) or a form of M rows, which loads anywhere: "plain"
            (those of the centres), "mean" (means over the clusters) or "refit" (fitted to the block's output).
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

    @property
    def ragged(self) -> bool:
        """Whether experts get widths of their own; such a result needs Coterie to load."""
        return any(size.widths is not None for size in self.sizes)

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
        sizes = tuple(
            LayerSize(**{**size, "widths": size["widths"] and tuple(size["widths"])}) for size in body.pop("sizes")
        )
        untouched = tuple(body.pop("untouched"))
        return cls(**body, sizes=sizes, untouched=untouched, inputs=found.inputs)


def plan(
    model: str | Path,
    profile: Profile | str | Path | None = None,
    *,
    keep: float | None = None,
    experts: int | None = None,
    width: int | None = None,
    budget: str | int | None = None,
    recipe: str = "coterie",
    router: Router = "plain",
    seed: int = 0,
) -> Plan:
    """Decide what every layer gets. Exactly one of `keep`, `experts`, `width` and `budget` says how small.

    Args:
        model: a model folder or hub id; only headers are read.
        profile: a profile of the same model; with it the plan checks that the recipe finds what it needs. A ragged
            recipe cannot do without.
        keep: share of the experts to keep in each layer, or of the width of each expert, above 0 and up to 1.
        experts: experts to keep in each layer.
        width: hidden neurons to keep in each expert, for a recipe that slims them.
        budget: largest size of the weight files, such as "12GiB", "800MB" or a number of bytes.
        recipe: name of a recipe.
        router: form of the router: "plain", "mean", "refit" or "map", see `Plan`.
        seed: seed of everything random in the passes.

    Raises:
        InputError: not exactly one target, one out of range or not for this recipe, or no profile for a ragged one.
        Infeasible: too few experts for the router, a width that the config cannot say, or a budget below the smallest
            result; names the nearest target.
        UnknownName: no such recipe.
        StaleArtifact: the profile is of another model.
    """
    checkpoint = open_checkpoint(model)
    architecture = Architecture.of(checkpoint)
    if isinstance(profile, str | Path):
        profile = Profile.load(profile, model_digest=checkpoint.digest)
    target = Target(keep=keep, experts=experts, width=width, budget=budget)
    conversion = WeightConversion(checkpoint, architecture.model)
    made = make_plan(
        checkpoint, architecture, conversion, profile, target=target, recipe=recipe, router=router, seed=seed
    )
    if made.ragged and profile is None:
        raise InputError(
            f"recipe {recipe} ranks the hidden neurons of all layers by what was measured: give a profile that was "
            "made with --gradients"
        )
    return made


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    conversion: WeightConversion,
    profile: Profile | None,
    *,
    target: Target,
    recipe: str,
    router: Router,
    seed: int,
) -> Plan:
    """Make a plan for a checkpoint that is already open; see `plan`.

    Without a profile, the plan of a ragged recipe only says that the target can be met, and how large the result is.
    """
    chosen = get_recipe(recipe)
    chosen.with_router(router)
    manifest = read_manifest(checkpoint.path)
    if manifest is not None and manifest["loads_with"] != "transformers":
        kind = "mapped" if manifest["router"] == "map" else "ragged"
        raise InputError(f"{checkpoint.path} is a {kind} result; compress the model that it was made from")
    parts = layer_tensors(checkpoint, architecture.layers, conversion)
    _check_dtypes(checkpoint, parts)
    if chosen.ragged:
        places_of(conversion, architecture, [part.experts for part in parts])
    if needs_gradients(chosen.needs):
        check_predicts(architecture)
    if profile is not None:
        check_profile(profile, checkpoint, chosen.needs)
    sizing = Sizing(checkpoint, architecture, conversion, parts, keeps_rows=router == "map")
    sizes = sizes_for(chosen, architecture, sizing, target, profile)
    inputs = {"model": checkpoint.digest}
    if profile is not None:
        inputs["text"] = profile.text_digest
    return Plan(
        recipe=recipe,
        router=router,
        sizes=sizes,
        untouched=untouched_parts(checkpoint, architecture, conversion),
        original_bytes=checkpoint.num_bytes,
        predicted_bytes=sizing.num_bytes(sizes),
        original_parameters=sum(info.num_elements for info in checkpoint.tensors.values()),
        predicted_parameters=sizing.num_parameters(sizes),
        seed=seed,
        inputs=inputs,
    )


def untouched_parts(
    checkpoint: Checkpoint, architecture: Architecture, conversion: WeightConversion
) -> tuple[str, ...]:
    """Return the names on disk, up to the layer number, of tensors that the model class has no place for."""
    places = architecture.model.state_dict().keys()
    parts = set()
    for disk_name, memory_name in conversion.memory_names.items():
        if memory_name not in places:
            match = re.match(r".*?\.\d+(?=\.)", disk_name)
            parts.add(match.group() if match else disk_name)
    return tuple(sorted(parts))


def check_profile(profile: Profile, checkpoint: Checkpoint, needs: tuple[str, ...]) -> None:
    """Raise StaleArtifact for the profile of another model, ArchitectureMismatch where it lacks what a recipe needs."""
    if profile.model_digest != checkpoint.digest:
        raise StaleArtifact(
            f"the profile was made from another model ({profile.model_digest[:12]}; {checkpoint.path} is "
            f"{checkpoint.digest[:12]}); run coterie profile again"
        )
    check_statistics(profile.statistics[0].keys(), needs)


_NO_SCORES = "the model records no router scores; use a recipe that compares outputs, such as reap or hc-smoe"

#: Why a statistic may be missing from a profile.
_REASONS = {
    "router_probability": _NO_SCORES,
    "logit_sum": _NO_SCORES,
    "logit_product": _NO_SCORES,
    "tcess": _NO_SCORES,
    "tcess_tokens": _NO_SCORES,
    "easy_ep": "the block's output is not simply added to the residual stream; use reap",
}


def check_statistics(held: Iterable[str], needs: Iterable[str]) -> None:
    """Raise ArchitectureMismatch, or InputError for gradients, when a recipe needs what was not measured."""
    missing = sorted(set(needs) - set(held))
    if needs_gradients(missing):
        raise InputError(
            f"the recipe needs {', '.join(missing)}, which are measured where the gradient of the loss is sent back "
            "through the model: run coterie profile with --gradients, or leave the profile out"
        )
    if missing:
        reasons = sorted({_REASONS.get(name, "it was made by an earlier version: profile again") for name in missing})
        raise ArchitectureMismatch(
            f"the recipe needs {', '.join(missing)}, which the profile does not hold: {'; '.join(reasons)}"
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
