"""Do what a plan says: checkpoint + Plan -> checkpoint, one layer at a time.

OUT appears only when it is whole: everything is written into a hidden folder beside it, loaded again by stock
transformers, compared with what was computed in flight, and only then renamed.
"""

from __future__ import annotations

import copy
import errno
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.artifact import atomic_path, write_artifact, write_json
from coterie.compress.methods import load_pass
from coterie.compress.plan import LayerTensors, Plan, Router, layer_tensors, make_plan
from coterie.compress.recipes import get_recipe
from coterie.compress.state import LayerSize, LayerState
from coterie.errors import InputError, OutOfSpace, OutputExists, ReloadMismatch
from coterie.model.checkpoint import INDEX_NAME, Checkpoint, TensorReader, read_header
from coterie.model.convert import TORCH_DTYPES, Crossing
from coterie.model.layers import Architecture, MoELayer, canonical_experts, empty_model, native_experts
from coterie.model.load import MANIFEST, attach_maps, load_model, widen_routers
from coterie.model.units import format_bytes
from coterie.profile.profile import FILE as PROFILE_FILE
from coterie.profile.profile import Profile
from coterie.profile.run import profile as run_profile
from coterie.progress import track

log = logging.getLogger(__name__)

#: Weight files are split when they would be larger than this.
MAX_SHARD_BYTES = 2 * 2**30

#: Largest difference of logits between the model in flight and the one loaded again, relative to the largest logit.
RELOAD_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What `compress` made.

    Attributes:
        out: the new checkpoint.
        plan: what was done.
        manifest: what ``coterie.json`` in it says.
        logits_error: largest difference of logits, in flight against loaded again, relative to the largest logit.
    """

    out: Path
    plan: Plan
    manifest: Mapping[str, Any]
    logits_error: float


def compress(
    model: str | Path,
    out: str | Path,
    *,
    keep: float | None = None,
    experts: int | None = None,
    budget: str | int | None = None,
    recipe: str = "mergemoe",
    router: Router = "plain",
    profile: Profile | str | Path | None = None,
    text: str | Path | None = None,
    tokens: int = 131_072,
    seq_len: int = 512,
    seed: int = 0,
    device: str = "cpu",
) -> Result:
    """Write a smaller checkpoint. Exactly one of `keep`, `experts` and `budget` says how small.

    Args:
        model: a model folder or hub id; it is only read.
        out: folder for the result; must not exist.
        keep: share of the experts to keep in each layer.
        experts: experts to keep in each layer.
        budget: largest size of the weight files, such as "12GiB".
        recipe: name of a recipe, see `coterie.compress.recipes`.
        router: "plain" loads anywhere; "map" is the form of the merging papers and needs Coterie to load.
        profile: a profile, or the folder of one; a folder that holds none gets the one that is made here.
        text: folder with calibration text, needed when there is no profile yet.
        tokens: calibration tokens in all.
        seq_len: tokens in a calibration sequence.
        seed: seed of everything random.
        device: where the model runs while it is profiled.

    Raises:
        OutputExists: `out` exists.
        InputError: the model, the text or the wish is not usable, see `coterie.profile` and `coterie.plan`.
        Infeasible: no result can be that small.
        OutOfSpace: the disk cannot hold the result.
        ReloadMismatch: the result does not load as what was computed; nothing is left at `out`.
    """
    clock = _Clock()
    target = Path(out).expanduser()
    checkpoint = Checkpoint.open(model)
    _check_target(target, checkpoint.path)
    architecture = Architecture.of(checkpoint)
    crossing = Crossing(checkpoint, architecture.model)
    held = _held_profile(profile, checkpoint)
    wish: dict[str, Any] = {
        "keep": keep, "experts": experts, "budget": budget, "recipe": recipe, "router": router, "seed": seed,
    }  # fmt: skip
    # Planning before profiling refuses what cannot be done before any compute.
    plan = make_plan(checkpoint, architecture, crossing, held, **wish)
    check_space(target.parent, plan.predicted_bytes)
    clock.lap("plan")
    if held is None:
        if text is None:
            raise InputError("no profile yet: give calibration text with --text, or a profile with --profile")
        folder = profile if isinstance(profile, str | Path) else None
        held = run_profile(model, folder, text=text, tokens=tokens, seq_len=seq_len, seed=seed, device=device)
        plan = make_plan(checkpoint, architecture, crossing, held, **wish)
    clock.lap("profile")
    job = _Job(checkpoint, architecture, crossing, held, plan)
    with _appearing(target) as folder:
        states = job.write_weights(folder)
        written = sum(info.num_bytes for file in folder.glob("*.safetensors") for info in read_header(file).values())
        assert written == plan.predicted_bytes, f"planned {plan.predicted_bytes} bytes, wrote {written}"
        clock.lap("compress")
        _write_config(job, folder)
        _carry_files(checkpoint, folder)
        _write_manifest(job, folder, job.manifest(states, None, clock.laps))
        error = check_reload(job, folder)
        clock.lap("check")
        manifest = job.manifest(states, error, clock.laps)
        _write_manifest(job, folder, manifest)
    return Result(out=target, plan=plan, manifest=manifest, logits_error=error)


@dataclass(slots=True)
class _Clock:
    """Seconds spent in each stage."""

    laps: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """What the manifest says of one layer."""

    expert_map: list[int]
    centres: list[int] | None
    num_experts: int
    notes: Mapping[str, object]


class _Job:
    """Everything that one compression knows; its methods run in the order they stand here."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, crossing: Crossing, profile: Profile, plan: Plan
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.profile = profile
        self.plan = plan
        self.passes = get_recipe(plan.recipe).with_router(plan.router)
        self.config = architecture.resized_config(plan.sizes[0].num_experts)
        self.small = empty_model(self.config)
        if plan.router == "map":
            widen_routers(self.small, empty_model(checkpoint.config), architecture.layers)
        self.in_memory: dict[str, Tensor] = {}
        self.maps: list[Tensor] = []
        self._crossing = crossing
        self._parts = layer_tensors(checkpoint, architecture.layers, crossing)

    def write_weights(self, folder: Path) -> list[LayerSummary]:
        """Compress layer by layer and write all tensors, changed or copied."""
        changed = {name for part in self._parts for name in (*part.experts, *part.router)}
        writer = _ShardWriter(folder, self.plan.predicted_bytes)
        summaries = []
        with self.checkpoint.reader() as reader:
            layers = list(zip(self.architecture.layers, self._parts, self.plan.sizes, strict=True))
            for layer, part, size in track(layers, "compressing", total=len(layers)):
                disk, summary = self._one_layer(reader, layer, part, size)
                for name, tensor in disk.items():
                    writer.add(name, tensor)
                summaries.append(summary)
            for name in self.checkpoint.tensors:
                if name not in changed:
                    writer.add(name, reader.read(name))
        writer.finish()
        return summaries

    def _one_layer(
        self, reader: TensorReader, layer: MoELayer, part: LayerTensors, size: LayerSize
    ) -> tuple[dict[str, Tensor], LayerSummary]:
        tensors, conversions = self._crossing.read(reader, (*part.experts, *part.router))
        state = self._initial_state(layer, tensors)
        for name, options in self.passes:
            state = load_pass(name)(state, size, **options)
        module = self.architecture.model.get_submodule(layer.experts)
        native = native_experts(module, state.experts)
        memory = {f"{layer.experts}.{name}": tensor for name, tensor in native.items()} | dict(state.router)
        disk = self._crossing.write(self.small, memory, conversions)
        # What a loader will see: the values rounded to the number format on disk.
        rounded_to = {
            self._crossing.memory_names[name]: TORCH_DTYPES[self.checkpoint.tensors[name].dtype]
            for name in (*part.experts, *part.router)
        }
        self.in_memory.update({name: tensor.to(rounded_to[name]) for name, tensor in memory.items()})
        self.maps.append(state.expert_map_E)
        summary = LayerSummary(
            expert_map=state.expert_map_E.tolist(),
            centres=None if state.centres_M is None else state.centres_M.tolist(),
            num_experts=state.experts.num_experts,
            notes=dict(state.notes),
        )
        return disk, summary

    def _initial_state(self, layer: MoELayer, tensors: Mapping[str, Tensor]) -> LayerState:
        module = copy.deepcopy(self.architecture.model.get_submodule(layer.experts))
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            parameter = torch.nn.Parameter(tensors[f"{layer.experts}.{name}"], requires_grad=False)
            module.register_parameter(name, parameter)
        experts = canonical_experts(module)
        return LayerState(
            layer=layer,
            experts=experts,
            router={name: tensors[name] for name, _ in layer.router_tensors},
            expert_map_E=torch.arange(layer.num_experts),
            statistics={name: value.sum(0) for name, value in self.profile.statistics[layer.index].items()},
            sample=self.profile.samples[layer.index],
            original=experts,
        )

    def in_flight(self) -> PreTrainedModel:
        """Return the compressed model assembled in memory, without a detour over names on disk, conversion or files."""
        model = load_model(self.checkpoint.path)
        layers = self.architecture.layers
        for layer in layers:
            old, new = model.get_submodule(layer.block), self.small.get_submodule(layer.block)
            _fill(new, old, {name.removeprefix(layer.block + "."): value for name, value in self.in_memory.items()})
            model.set_submodule(layer.block, new)
        if self.plan.router == "map":
            attach_maps(model, layers, self.maps)
        return model

    def manifest(
        self, summaries: Sequence[LayerSummary], logits_error: float | None, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the content of coterie.json."""
        mapped = self.plan.router == "map"
        how = "coterie.load_model(OUT)" if mapped else "transformers.AutoModelForCausalLM.from_pretrained(OUT)"
        return {
            "recipe": self.plan.recipe,
            "passes": [[name, dict(options)] for name, options in self.passes],
            "router": self.plan.router,
            "loads_with": "coterie" if mapped else "transformers",
            "how_to_load": how,
            "plan": self.plan.body(),
            "model": self.checkpoint.path.resolve().name,
            "domains": list(self.profile.domains),
            "calibration_tokens": sum(self.profile.num_tokens),
            "seq_len": self.profile.seq_len,
            "seed": self.plan.seed,
            "logits_error": logits_error,
            "layers": [
                {
                    "index": layer.index,
                    "block": layer.block,
                    "num_experts_before": layer.num_experts,
                    "num_experts_after": summary.num_experts,
                    "expert_map": summary.expert_map,
                    "centres": summary.centres,
                    "notes": dict(summary.notes),
                }
                for layer, summary in zip(self.architecture.layers, summaries, strict=True)
            ],
            "seconds": dict(seconds),
            "bytes_before": self.plan.original_bytes,
            "bytes_after": self.plan.predicted_bytes,
        }


def check_reload(job: _Job, folder: Path) -> float:
    """Load what was written and compare its logits with the model assembled in flight, on seeded random tokens.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        CorruptCheckpoint: tensors are missing or of the wrong shape.
        ReloadMismatch: the logits differ by more than `RELOAD_TOLERANCE`.
    """
    vocabulary = int(job.small.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (4, 64), generator=torch.Generator().manual_seed(job.plan.seed))
    with torch.no_grad():
        expected = job.in_flight()(input_ids=ids, use_cache=False).logits
        found = load_model(folder)(input_ids=ids, use_cache=False).logits
    error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error <= RELOAD_TOLERANCE:
        raise ReloadMismatch(
            f"the checkpoint that was written computes other logits than the model in flight: they differ by "
            f"{error:.2e} of the largest logit (limit {RELOAD_TOLERANCE:.0e}); nothing was kept, please report it"
        )
    return error


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OutOfSpace when the disk under `folder` has less than `num_bytes` (and some for the small files) free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    needed = num_bytes + 16 * 2**20
    if free < needed:
        raise OutOfSpace(
            errno.ENOSPC, f"the result needs {format_bytes(needed)}, {existing} has {format_bytes(free)} free"
        )


def _fill(new: nn.Module, old: nn.Module, replaced: Mapping[str, Tensor]) -> None:
    """Give the empty module `new` the tensors in `replaced` and, for all other names, those of `old`."""
    sources = dict(old.named_parameters()) | dict(old.named_buffers())
    for name, empty in [*new.named_parameters(), *new.named_buffers()]:
        owner_name, _, leaf = name.rpartition(".")
        owner = new.get_submodule(owner_name)
        value = replaced[name].float() if name in replaced else sources[name].detach()
        if isinstance(empty, nn.Parameter):
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        else:
            setattr(owner, leaf, value)


def _held_profile(profile: Profile | str | Path | None, checkpoint: Checkpoint) -> Profile | None:
    if profile is None or isinstance(profile, Profile):
        return profile
    return Profile.load(profile, model_digest=checkpoint.digest) if (Path(profile) / PROFILE_FILE).exists() else None


def _check_target(target: Path, source: Path) -> None:
    if target.exists() or target.is_symlink():
        raise OutputExists(f"{target} exists; choose another place or remove it")
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target} is inside the model folder {source}, which is never written; choose another place")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `target` that becomes `target` at the end, or vanishes on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            raise OutputExists(f"{target} appeared while it was being made; the result was dropped")
        folder.rename(target)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # from whichever file met it; the user knows the target
            raise OutOfSpace(
                errno.ENOSPC, f"the disk filled up while {target} was written; nothing was kept"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _ShardWriter:
    """Collects tensors and writes them as one weight file, or as several with an index when they are many bytes."""

    def __init__(self, folder: Path, total_bytes: int) -> None:
        self._folder = folder
        self._single = total_bytes <= MAX_SHARD_BYTES
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if not self._single and self._held and self._held_bytes + size > MAX_SHARD_BYTES:
            self._flush()
        self._held[name] = tensor
        self._held_bytes += size
        self._total += size

    def finish(self) -> None:
        if self._held:
            self._flush()
        if self._single:
            (self._folder / self._temporary(0)).rename(self._folder / "model.safetensors")
            return
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / self._temporary(number)).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._folder / INDEX_NAME, index)

    def _flush(self) -> None:
        with atomic_path(self._folder / self._temporary(len(self._shards))) as temporary:
            save_file(self._held, temporary, metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held = {}
        self._held_bytes = 0

    @staticmethod
    def _temporary(number: int) -> str:
        return f"shard-{number}.safetensors"


def _write_config(job: _Job, folder: Path) -> None:
    # A mapped result keeps the router's E rows and says so in its config, so stock loaders refuse it.
    config = job.config if job.plan.router == "plain" else dict(job.checkpoint.config)
    write_json(folder / "config.json", config)


def _write_manifest(job: _Job, folder: Path, manifest: Mapping[str, Any]) -> None:
    inputs = {"model": job.checkpoint.digest, "text": job.profile.text_digest}
    write_artifact(folder / MANIFEST, kind="manifest", body=manifest, inputs=inputs)


def _carry_files(checkpoint: Checkpoint, folder: Path) -> None:
    for file in checkpoint.other_files():
        if file.name != MANIFEST:
            shutil.copyfile(file, folder / file.name)
