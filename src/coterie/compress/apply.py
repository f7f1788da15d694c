"""Do what a plan says: checkpoint + Plan -> checkpoint, one decoder layer in memory at a time.

The layers come by as a few tokens run through the model (`coterie.model.stream`). Each is compressed, written to a
weight file, and goes on in its compressed form, so that at the end the logits of the compressed model are known. OUT
appears only when it is whole: everything is written into a run folder beside it (`coterie.journal`), loaded again and
compared with those logits, and only then put in its place. A run that was killed goes on from the last finished layer.
"""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from coterie.amounts import format_bytes, parse_bytes
from coterie.artifact import write_artifact, write_json
from coterie.compress.distill_run import make_targets, may_distill, say_cost, train
from coterie.compress.layer import LayerSummary, ResultModel, compress_layer
from coterie.compress.output import carry_files, check_space, check_target
from coterie.compress.plan import Plan, Router, check_statistics, make_plan
from coterie.compress.recipes import check_sequential, get_recipe, training_tokens
from coterie.compress.reload import check_reload
from coterie.compress.shards import Shard, lay_out, write_index, write_shard
from coterie.compress.sizes import Target, layer_tensors
from coterie.errors import ArchitectureMismatch, CoterieError, InputError, OutOfSpace
from coterie.journal import Run, open_run
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.arch.load import load_model
from coterie.model.arch.reroute import Reroute
from coterie.model.arch.resize import resized_config
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import MANIFEST
from coterie.model.disk.open import open_checkpoint
from coterie.model.stream.memory import Forecast, peak_bytes
from coterie.model.stream.stream import Stage, Stream
from coterie.profile.calibrate import take_text
from coterie.profile.calibration import TokenSet
from coterie.profile.observation import observed, proving, with_residual
from coterie.profile.profile import FILE as PROFILE_FILE
from coterie.profile.profile import Profile, Sample
from coterie.profile.run import Measure, ProfileSettings, forecast_with_sample, profile_in_run
from coterie.profile.run import profile as run_profile
from coterie.profile.self_text import SELF
from coterie.profile.statistics.channels import needs_gradients
from coterie.progress import track

log = logging.getLogger(__name__)

Inputs = Literal["original", "compressed"]

#: What the run took: beside the manifest, since it differs between two runs that give the same result.
RUN_FILE = "coterie-run.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What `compress` made.

    Attributes:
        out: the new checkpoint.
        plan: what was done.
        manifest: what ``coterie.json`` in it says.
        logits_error: largest difference of logits, in flight against loaded again, relative to the largest logit.
        seconds: seconds spent in each stage.
        forecast: the memory that was announced, in bytes.
        peak_bytes: largest resident memory of the process.
        input_bytes_read: bytes of tensors that were read from the model.
    """

    out: Path
    plan: Plan
    manifest: Mapping[str, Any]
    logits_error: float
    seconds: Mapping[str, float]
    forecast: int
    peak_bytes: int
    input_bytes_read: int


def compress(
    model: str | Path,
    out: str | Path,
    *,
    keep: float | None = None,
    experts: int | None = None,
    width: int | None = None,
    budget: str | int | None = None,
    recipe: str = "coterie",
    effort: str = "balanced",
    train_tokens: int | None = None,
    router: Router = "plain",
    profile: Profile | str | Path | None = None,
    text: str | Path | None = None,
    weights: Mapping[str, float] | None = None,
    tokens: int = 131_072,
    seq_len: int = 512,
    seed: int = 0,
    sample_tokens: int = 8_192,
    device: str = "cpu",
    inputs: Inputs = "original",
    output_dtype: str = "bfloat16",
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    cache: str | Path | None = None,
) -> Result:
    """Write a smaller checkpoint. Exactly one of `keep`, `experts`, `width` and `budget` says how small.

    A run that was ended early goes on from the last finished layer when it is called again in the same way.

    Args:
        model: a model folder or hub id; it is only read.
        out: folder for the result; must not exist.
        keep: share of the experts to keep in each layer, or of the width of each expert, as the recipe has it.
        experts: experts to keep in each layer.
        width: hidden neurons to keep in each expert, for a recipe that slims them; on average, for a ragged one.
        budget: largest size of the weight files, such as "12GiB".
        recipe: name of a recipe, see `coterie.compress.recipes`.
        effort: "fast", "balanced" or "thorough": how long a recipe that distils trains the result, see
            `coterie.compress.recipes.EFFORTS`. It is left out, and said so, where the result does not fit into the
            memory that there is, or into `max_memory`.
        train_tokens: tokens that such a recipe trains on, in place of what `effort` says; 0 for none. They are drawn
            from `text` beside those that are measured; less text is seen again, up to `distill_run.EPOCHS` times.
        router: form of the router, see `Plan`: "plain", "mean" and "refit" load anywhere; "map" is the form of the
            merging papers and needs Coterie to load.
        profile: a profile, or the folder of one; a folder that holds none gets the one that is made here.
        text: folder with calibration text, needed when there is no profile yet.
        weights: share of the text by domain, see `coterie.profile.run.profile`.
        tokens: calibration tokens in all.
        seq_len: tokens in a calibration sequence.
        seed: seed of everything random.
        sample_tokens: tokens of the sample of each layer, where a profile is made.
        device: where layers are computed; what is done to their weights is always done on the CPU, in float32.
        inputs: what each layer receives while it is measured: "original", the output of the original layers before
            it, or "compressed", the output of the compressed ones (sequential calibration). The output that it is
            compared with is the original model's in both cases. "compressed" takes text and no profile.
        output_dtype: number format of weights that are stored quantised; all others keep theirs.
        max_memory: bytes, or an amount like "8GiB", that the run may take.
        allow_pickle: read weights that are stored as pickles.
        cache: folder where the original's predictions on the text that results are trained on are kept for other runs.

    Raises:
        OutputExists: `out` exists.
        OutputBusy: another run writes to `out`.
        StaleArtifact: an earlier run to `out` that was ended early had other settings or another input.
        InputError: the model, the text or the target is not usable, see `coterie.profile` and `coterie.plan`.
        Infeasible: no result can be that small, or `max_memory` is too little.
        OutOfSpace: the disk cannot hold the result.
        ReloadMismatch: the result does not load as what was computed; nothing is left at `out`.
    """
    clock = _Clock()
    target = Path(out).expanduser()
    checkpoint = open_checkpoint(model, output_dtype=output_dtype, allow_pickle=allow_pickle)
    check_target(target, checkpoint.path)
    if inputs == "compressed":
        if profile is not None or text is None:
            raise InputError("with compressed inputs every layer is measured anew: give --text, and no --profile")
        check_sequential(recipe)
    architecture = Architecture.of(checkpoint)
    stream = Stream(checkpoint, device=device, scratch=target.parent)
    held = _held_profile(profile, checkpoint)
    decide = functools.partial(
        make_plan, checkpoint, architecture, stream.conversion, recipe=recipe, router=router, seed=seed,
        target=Target(keep=keep, experts=experts, width=width, budget=budget),
    )  # fmt: skip
    # Planning before profiling refuses what cannot be done before any compute.
    plan = decide(held)
    check_space(target.parent, plan.predicted_bytes)
    measure: Measure | None = None
    gradients = needs_gradients(get_recipe(recipe).needs)
    wanted = training_tokens(recipe, effort)
    if train_tokens is not None:
        wanted = _checked_training(recipe, train_tokens)
    wanted = wanted if plan.predicted_bytes < plan.original_bytes else 0
    if held is None and text is None:
        raise InputError("no profile yet: give calibration text with --text, or a profile with --profile")
    if wanted and text is None:
        raise InputError(
            f"recipe {recipe} trains its result on text at effort {effort}: give it with --text beside the profile, or "
            "take --effort fast"
        )
    token_set: TokenSet | None = None
    if held is None:
        settings = ProfileSettings(
            text=str(text), weights=weights, tokens=tokens, seq_len=seq_len, seed=seed, sample_tokens=sample_tokens,
            gradients=gradients, device=device, max_memory=max_memory,
        )  # fmt: skip
        measure = settings.measure(checkpoint, architecture)
    limit = None if max_memory is None else parse_bytes(max_memory)
    expected = _forecast(stream, architecture.layers, measure, held)
    expected.check(limit)
    if wanted and may_distill(architecture, plan.sizes[0], seq_len, limit, stream.device):
        own = str(text) == SELF  # what the model wrote to be measured has to do: writing takes long
        token_set = take_text(
            checkpoint, str(text), seq_len=seq_len, tokens=min(wanted, tokens) if own else wanted, seed=seed,
            weights=weights, device=device, limit=limit, up_to=True,
        )  # fmt: skip
        if sum(map(len, token_set.sequences.values())) < 2:
            log.warning("one sequence of text is too little to train on and to see whether it helped: left out")
            token_set = None
        else:
            wanted = say_cost(architecture, plan.sizes[0], token_set, wanted, stream.device)
    clock.lap("plan")
    if isinstance(profile, str | Path) and held is None:
        held = run_profile(
            model, profile, text=str(text), weights=weights, tokens=tokens, seq_len=seq_len, seed=seed, device=device,
            sample_tokens=sample_tokens, gradients=gradients, max_memory=max_memory, allow_pickle=allow_pickle,
        )  # fmt: skip
        measure = None
        plan = decide(held)
    header = {
        "plan": plan.body(),
        "inputs": inputs,
        "distilled": None if token_set is None else [token_set.digest, wanted],
        "output_dtype": output_dtype,
        "model": checkpoint.digest,
        "model files": checkpoint.file_stamps(),
        "device": stream.device.type,
        "profile": None if held is None else held.digest(),
        "measured": None if measure is None else measure.header(stream),
    }
    with open_run(target, header, what="compression") as run, _worthless_on_error(run, target), stream:
        if held is None and inputs == "original":
            assert measure is not None
            profile_in_run(run, stream, architecture.layers, measure, private=True)
            held = Profile.load(run.private)
            plan = decide(held)
        clock.lap("profile")
        job = _Job(stream, architecture, plan, held, measure)
        logits_BSV = job.write_weights(run)
        clock.lap("compress")
        job.write_rest(run)
        job.write_small_files(run)
        clock.lap("write")
        if token_set is not None:
            logits_BSV = job.distill(run, token_set, wanted, logits_BSV, None if cache is None else Path(cache))
            job.write_small_files(run)
            clock.lap("distill")
        error = check_reload(run.folder, job.check_ids(), logits_BSV, device=device)
        manifest = job.write_manifest(run, logits_error=error)
        clock.lap("check")
        peak = peak_bytes()
        took = {
            "seconds": clock.laps,
            "forecast_bytes": expected.num_bytes,
            "peak_bytes": peak,
            "input_bytes_read": stream.bytes_read,
            "device": device,
        }
        write_json(run.folder / RUN_FILE, took)
        run.publish()
    log.info("memory: the peak was %s", format_bytes(peak))
    return Result(
        out=target, plan=plan, manifest=manifest, logits_error=error, seconds=clock.laps,
        forecast=expected.num_bytes, peak_bytes=peak, input_bytes_read=stream.bytes_read,
    )  # fmt: skip


def _checked_training(recipe: str, train_tokens: int) -> int:
    if train_tokens < 0:
        raise InputError(f"a result cannot be trained on {train_tokens} tokens; give 0 or more")
    if train_tokens and not get_recipe(recipe).distills:
        raise InputError(f"recipe {recipe} trains nothing: leave --train-tokens out, or take a recipe such as coterie")
    return train_tokens


@dataclass(slots=True)
class _Clock:
    """Seconds spent in each stage."""

    laps: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


class _Job:
    """One compression: goes through the model's stages, and knows what the manifest has to say."""

    def __init__(
        self, stream: Stream, architecture: Architecture, plan: Plan, profile: Profile | None, measure: Measure | None
    ) -> None:
        self.stream = stream
        self.checkpoint = stream.checkpoint
        self.layers = architecture.layers
        self.plan = plan
        self.shards = lay_out(stream.checkpoint, stream.units, stream.conversion)
        self._architecture = architecture
        self._profile = profile
        self._measure = measure
        #: Text that is measured while the layers are compressed: none where a profile is there.
        self._batches = measure.batches() if profile is None and measure is not None else []
        self._passes = get_recipe(plan.recipe).with_router(plan.router)
        self._parts = layer_tensors(stream.checkpoint, architecture.layers, stream.conversion)
        self._result_model = ResultModel(stream, architecture, plan)
        self._reroute = Reroute(architecture, stream.model, plan.sizes[0].top_k)
        wanted = profile is not None and "output_peak" in get_recipe(plan.recipe).needs
        self._peaks_LE = profile.all_layers("output_peak") if profile is not None and wanted else None
        self._summaries: dict[int, LayerSummary] = {}
        self._distilled: Mapping[str, object] | None = None

    def check_ids(self) -> Tensor:
        """Return the seeded random tokens (B, S) that the result is checked with."""
        vocabulary = int(self.stream.model.config.get_text_config().vocab_size)
        return torch.randint(vocabulary, (2, 64), generator=torch.Generator().manual_seed(self.plan.seed))

    def write_weights(self, run: Run) -> Tensor:
        """Compress layer by layer and write each layer's file; return the logits (B, S, V) of the result in flight."""
        stream = self.stream
        by_unit = {shard.unit: shard for shard in self.shards if shard.unit is not None}
        routed = {name for part in self._parts for name in (*part.experts, *part.router)}
        jobs: list[Any] = [stream.logits_job(self.check_ids())]
        jobs += [stream.base_job(ids_BS) for _, ids_BS in (*self._batches, *self._batches)]
        passes = stream.run(jobs, keep=lambda name: name not in routed)
        seen: set[str] = set()
        for stage in track(passes, "compressing", total=len(stream.units)):
            shard = by_unit.get(stage.unit.name)
            here = [layer for layer in self.layers if stage.unit.holds(layer.experts)]
            if here and stage.unit.name in seen:
                raise ArchitectureMismatch(f"{stage.unit.name} runs more than once for one text: not supported")
            if here:
                assert shard is not None, f"{stage.unit.name} has no weight file"
                self._one_stage(run, stage, here, shard)
            elif shard is not None and shard.file not in run.finished:
                write_shard(run.folder, shard, {name: stage.kept[name] for name in shard.names})
                run.finish(shard.file, files=[shard.file])
            seen.add(stage.unit.name)
        missed = [layer.block for layer in self.layers if layer.index not in self._summaries]
        if missed:
            raise ArchitectureMismatch(f"text ran through the model without passing its MoE layers {missed}")
        logits_BSV: Tensor = passes.results[0]
        return logits_BSV

    def distill(self, run: Run, token_set: TokenSet, tokens: int, logits_BSV: Tensor, cache: Path | None) -> Tensor:
        """Train the result, write its layers anew where that helped, and return the logits of the check."""
        batches = list(token_set.batches(8))
        targets = make_targets(run, self.stream, batches, cache)
        model = load_model(run.folder, dtype=torch.float32, device=str(self.stream.device))
        outcome = train(
            run, model, self._architecture, torch.cat([ids_BS for _, ids_BS in batches]), targets,
            tokens=tokens, seed=self.plan.seed, rounded=self._result_model.rounded,
        )  # fmt: skip
        self._distilled = outcome.notes
        if outcome.weights is None:
            return logits_BSV
        for shard in self.shards:
            content = run.finished[shard.file].content
            changed = self._result_model.changed(run.folder, shard, outcome.weights)
            if changed is not None:
                run.forget(shard.file)
                write_shard(run.folder, shard, changed)
                run.finish(shard.file, files=[shard.file], content=content)
        with torch.no_grad():
            found_BSV: Tensor = model(input_ids=self.check_ids().to(model.device), use_cache=False).logits
        return found_BSV.float().cpu()

    def write_rest(self, run: Run) -> None:
        """Copy what no stage wrote: shared files, and parts of the model that text does not pass."""
        for shard in self.shards:
            if shard.file not in run.finished:
                write_shard(run.folder, shard, {name: self.stream.read(name) for name in shard.names})
                run.finish(shard.file, files=[shard.file])

    def write_small_files(self, run: Run) -> None:
        """Write all that makes weight files a checkpoint."""
        written = write_index(run.folder, self.shards)
        assert written == self.plan.predicted_bytes, f"planned {self.plan.predicted_bytes} bytes, wrote {written}"
        write_json(run.folder / "config.json", self.result_config())
        carry_files(self.checkpoint, run.folder)
        self.write_manifest(run, logits_error=None)

    def _one_stage(self, run: Run, stage: Stage, here: Sequence[MoELayer], shard: Shard) -> None:
        """Compress the MoE layers of a unit (as a rule one), write the unit's file and let the jobs go on."""
        finished = shard.file in run.finished
        measured = self._measured(stage, here, measuring=not finished)
        memory: dict[str, Tensor] = {}
        if finished:
            contents = run.finished[shard.file].content["layers"]
            summaries = {layer.index: LayerSummary(**contents[str(layer.index)]) for layer in here}
            memory = self._result_model.read(run.folder, shard, here)
        else:
            disk, summaries = {name: tensor for name, tensor in stage.kept.items() if name in shard.names}, {}
            for layer in here:
                by_domain, sample = measured[layer.index]
                new, summaries[layer.index] = compress_layer(
                    self.stream.model, layer, self.plan.sizes[layer.index], self._passes, by_domain, sample,
                    self._reroute, self.plan.seed, self._peaks_LE,
                )  # fmt: skip
                disk |= self._result_model.on_disk(new, stage.conversions)
                memory |= self._result_model.rounded(new)
                del by_domain, sample, new
            measured.clear()
            write_shard(run.folder, shard, disk)
            content = {str(index): summary.content() for index, summary in summaries.items()}
            run.finish(shard.file, files=[shard.file], content={"layers": content})
        self._summaries |= summaries
        maps = {layer.index: summaries[layer.index].expert_map for layer in here}
        if not finished and self.plan.sizes[0].width is not None:
            routers = {name for layer in here for name, _ in layer.router_tensors}
            cut = self.plan.sizes[0].top_k is not None
            experts = {name: tensor for name, tensor in memory.items() if cut or name not in routers}
            with self._result_model.filled(stage.unit, experts, maps) as module:
                self._result_model.check_rest(stage.calls[0], module)
        with self._result_model.filled(stage.unit, memory, maps) as module:
            for call in stage.calls:
                # The check and, after it, the first half of the text run through compressed layers.
                if call.job <= len(self._batches):
                    call.finish(call.compute(module))

    def _measured(
        self, stage: Stage, here: Sequence[MoELayer], *, measuring: bool
    ) -> dict[int, tuple[Mapping[str, Tensor], Sample]]:
        """Return statistics and sample of each layer: from the profile or, with compressed inputs, measured now."""
        if self._profile is not None:
            if not measuring:
                return {}
            profile = self._profile
            return {layer.index: (profile.statistics[layer.index], profile.samples[layer.index]) for layer in here}
        assert self._measure is not None
        batches, model, count = self._batches, self.stream.model, len(self._batches)
        collectors = {layer.index: self._measure.collector() for layer in here}
        if measuring:
            with proving(model, tuple(here)):
                stage.calls[1].compute()
        for number, (domain, _) in enumerate(batches):
            prefix, original = stage.calls[1 + number], stage.calls[1 + count + number]
            # A finished layer is observed too: it must hand on the very same numbers as in the first run.
            with observed(model, tuple(here)) as targets:
                original.finish(original.compute())
            if not measuring:
                continue
            with observed(model, tuple(here), thin=self._measure.thin) as observations:
                output = prefix.compute()
            for observation, target in zip(observations, targets, strict=True):
                seen = with_residual(observation, output)
                collectors[observation.layer.index].add(domain, seen, target_TD=target.output_TD)
        if not measuring:
            return {}
        for each in collectors.values():
            check_statistics(each.statistics, get_recipe(self.plan.recipe).needs)
        return {index: (each.statistics, each.sample()) for index, each in collectors.items()}

    def result_config(self) -> dict[str, Any]:
        """Return the content of the result's config.json."""
        size = self.plan.sizes[0]
        if self.plan.router != "map" and not self.plan.ragged:
            return resized_config(self._architecture, size.num_experts, size.width, size.top_k)
        # A mapped result keeps the router's E rows, a ragged one the full width, and the config says so, while the
        # files hold less: stock loaders refuse them.
        return dict(self.checkpoint.config)

    def write_manifest(self, run: Run, *, logits_error: float | None) -> dict[str, Any]:
        """Write coterie.json into the result, and return its content."""
        ours = self.plan.router == "map" or self.plan.ragged
        how = "coterie.load_model(OUT)" if ours else "transformers.AutoModelForCausalLM.from_pretrained(OUT)"
        if self._profile is not None:
            domains, num_tokens, seq_len = self._profile.domains, sum(self._profile.num_tokens), self._profile.seq_len
            text_digest = self._profile.text_digest
        else:
            assert self._measure is not None
            token_set = self._measure.token_set
            domains, num_tokens, seq_len = token_set.domains, sum(token_set.num_tokens.values()), token_set.seq_len
            text_digest = token_set.digest
        body = {
            "recipe": self.plan.recipe,
            "passes": [[name, dict(options)] for name, options in self._passes],
            "router": self.plan.router,
            "loads_with": "coterie" if ours else "transformers",
            "how_to_load": how,
            "plan": self.plan.body(),
            "model": self.checkpoint.path.resolve().name,
            "domains": list(domains),
            "calibration_tokens": num_tokens,
            "calibration_inputs": "original" if self._profile is not None else "compressed",
            "seq_len": seq_len,
            "seed": self.plan.seed,
            "logits_error": logits_error,
            "ragged": self._result_model.ragged,
            "distilled": self._distilled,
            "layers": [
                {
                    "index": layer.index,
                    "block": layer.block,
                    "num_experts_before": layer.num_experts,
                    "num_experts_after": self._summaries[layer.index].num_experts,
                    "top_k_before": layer.top_k,
                    "top_k_after": self.plan.sizes[layer.index].top_k or layer.top_k,
                    "width_before": layer.width,
                    "width_after": self._summaries[layer.index].width,
                    "widths_after": self.plan.sizes[layer.index].widths,
                    "expert_map": self._summaries[layer.index].expert_map,
                    "centres": self._summaries[layer.index].centres,
                    "notes": dict(self._summaries[layer.index].notes),
                }
                for layer in self.layers
            ],
            "bytes_before": self.plan.original_bytes,
            "bytes_after": self.plan.predicted_bytes,
        }
        inputs = {"model": self.checkpoint.digest, "text": text_digest}
        write_artifact(run.folder / MANIFEST, kind="manifest", body=body, inputs=inputs)
        return body


def _forecast(stream: Stream, layers: tuple[MoELayer, ...], measure: Measure | None, held: Profile | None) -> Forecast:
    if measure is not None:
        return measure.forecast(stream, layers)
    assert held is not None
    return forecast_with_sample(stream, layers, len(held.samples[0].domain_T))


@contextmanager
def _worthless_on_error(run: Run, target: Path) -> Iterator[None]:
    """Keep what was finished when the disk is full or somebody stops the run; a result that is wrong is dropped."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:  # from whichever file met it; the user knows the target
            raise OutOfSpace(
                errno.ENOSPC,
                f"the disk filled up while {target} was made; the {len(run.finished)} finished steps are kept: free "
                "some space and give the same command again",
            ) from error
        raise
    except CoterieError:
        run.discard()
        raise


def _held_profile(profile: Profile | str | Path | None, checkpoint: Checkpoint) -> Profile | None:
    if profile is None or isinstance(profile, Profile):
        return profile
    return Profile.load(profile, model_digest=checkpoint.digest) if (Path(profile) / PROFILE_FILE).exists() else None
