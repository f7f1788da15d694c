"""Compress a checkpoint: prepare (`coterie.compress.prepare`), then a list of steps, journaled, one layer in memory.

OUT appears only when it is whole: everything is written into a run folder beside it (`coterie.journal`), loaded again
and compared with what was computed, and only then put in its place. A run that was killed goes on where it was.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from coterie.amounts import format_bytes
from coterie.artifact import write_json
from coterie.compress.decide import completed, with_types
from coterie.compress.lanes import Lanes
from coterie.compress.layer_plan import LayerPlan
from coterie.compress.layers import LayerWriter
from coterie.compress.pack import Packer, packed_names
from coterie.compress.plan import Mtp, Plan
from coterie.compress.prepare import Inputs, Job, Options, prepare
from coterie.compress.prices import Prices
from coterie.compress.recipes import Recipe
from coterie.compress.reload import check_reload
from coterie.compress.result_steps import LeftOut, load_result_step
from coterie.compress.shards import lay_out, write_shard
from coterie.compress.stock import check_stock
from coterie.compress.target import Reader
from coterie.compress.times import CHECKING
from coterie.compress.work import Work
from coterie.errors import CoterieError, OutOfSpace
from coterie.fields import Fields
from coterie.journal import Run, open_run
from coterie.journal_lines import begun
from coterie.model.arch.run_settings import Running
from coterie.model.device import check_device
from coterie.model.disk.manifest import Manifest, RouterForm
from coterie.model.numerics import as_begun
from coterie.model.stream.memory import Stage, peak_bytes
from coterie.paths import user_path
from coterie.profile.profile import Profile
from coterie.profile.run import profile_in_folder, profile_in_run
from coterie.profile.sources import On
from coterie.progress import stage, waiting
from coterie.publish.hub import RUN_FILE, find_destination, upload_result

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What `compress` made.

    Attributes:
        out: the new checkpoint.
        plan: what was done.
        manifest: what it is and what became of every layer, as ``coterie.json`` in it says.
        logits_error: largest difference of logits, in flight against loaded again, relative to the largest logit.
        seconds: seconds spent in each stage.
        forecast: the memory that was announced, in bytes.
        peak_bytes: largest resident memory of the process.
        input_bytes_read: bytes of tensors that were read from the model.
        url: where it was uploaded to, or None.
    """

    out: Path
    plan: Plan
    manifest: Manifest
    logits_error: float
    seconds: Mapping[str, float]
    forecast: int
    peak_bytes: int
    input_bytes_read: int
    url: str | None = None


def compress(
    model: str | Path,
    out: str | Path,
    *,
    keep: float | str | None = None,
    experts: int | None = None,
    width: int | None = None,
    budget: str | int | None = None,
    params: str | int | None = None,
    active_params: str | int | None = None,
    bits: float | None = None,
    type: str | None = None,
    plan: Plan | str | Path | None = None,
    recipe: str | Recipe | None = None,
    effort: str = "balanced",
    train_tokens: int | None = None,
    router: RouterForm | None = None,
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
    prices: Prices | str | Path | None = None,
    mtp: Mtp | None = None,
    multiple_of: int | None = None,
    target: Reader | None = None,
    experts_only: bool = False,
    running: Running | None = None,
    on: On | None = None,
    search: int | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Result:
    """Write a smaller checkpoint; one of `keep`, `experts`, `width`, `budget`, `bits`, `type`, `plan` says how small.

    A run that was ended early goes on from the last finished layer when it is called again in the same way.

    Args:
        model: a model folder or hub id; it is only read.
        out: folder for the result; must not exist.
        keep: share of the experts to keep in each layer, or of the width of each expert, as the recipe has it;
            0.5 or "50%".
        experts: experts to keep in each layer.
        width: hidden neurons to keep in each expert, for a recipe that slims them; on average, for a ragged one.
        budget: largest size of the weight files, such as "12GiB".
        params: most parameters in all, such as "15B"; for recipes that change the number of experts or their width.
        active_params: most parameters that one token uses, such as "2B"; for the same.
        bits: most bits that a number of a matrix takes, for a recipe that stores weights in fewer bits.
        type: the type that matrices are stored in, for such a recipe: one of GGML, like "Q4_K", one that
            compressed-tensors stores, like "INT4", or planes of bits, like "PLANES4".
        plan: a plan, or its file, perhaps edited; it says how small, with which recipe and which router.
        recipe: name of a recipe, see `coterie.compress.recipes`; ``"module:attribute"`` of your own, or the recipe
            itself; None for the usual one, see `coterie.compress.target.Target.usual_recipe`.
        effort: "fast", "balanced" or "thorough": how long a recipe that distils trains the result, see
            `coterie.compress.recipes.EFFORTS`. It is left out, and said so, where the result does not fit into the
            memory that there is, or into `max_memory`.
        train_tokens: tokens that such a recipe trains on, in place of what `effort` says; 0 for none. They are drawn
            from `text` beside those that are measured; less text is seen again, up to `EPOCHS` times.
        router: form of the router, see `Plan`: "plain" (when None), "mean" and "refit" load anywhere; "map" is the form
            of the merging papers; it loads with Coterie, or the code beside it.
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
        prices: what storing each matrix in each type would cost (`coterie.price`), or the folder of that, for a recipe
            that chooses types by it; a folder that holds none gets the prices that are measured here.
        mtp: what becomes of prediction layers (MTP), which transformers does not run: "keep" (when None), as many
            experts of the same numbers and width as in the last layer, or "drop". A plan says it already.
        multiple_of: the number of experts or their width, whichever the recipe lowers, is the nearest multiple of this,
            such as 8 for expert parallelism or 256 for K-quants.
        target: who is to read weights in fewer bits: "gguf" (when None), what GGUF files can say, or "packed", what
            no GGUF file holds, which is smaller where rows are no multiple of 256, or "compressed-tensors", integers
            that transformers and vLLM read. A plan says it already.
        experts_only: where weights are stored in fewer bits, leave all but those of routed experts as they are.
        running: how the result is to run in llama.cpp, where `budget` is for all memory that this takes, not for the
            weights alone: keys, values and buffers are put aside, see `coterie.compress.memory_budget`.
        on: which tokens count where experts are measured and the result is trained: "all" (when None), or those of
            answers in conversations and of completions, "assistant". With a profile that is there, its own.
        search: for a recipe that gives each matrix a type, go on from what it chose with an evolutionary search of so
            many generations at most (EvoPress, arXiv 2410.14649), see `coterie.compress.search`; None or 0 for none.
        push_to_hub: id of a repository on the model hub that the result is uploaded to once it is whole; that this can
            be is asked first. None uploads nothing.
        private: make that repository a private one.

    Raises:
        OutputExists: `out` exists.
        OutputBusy: another run writes to `out`.
        StaleArtifact: an earlier run to `out` that was ended early had other settings or another input, or the plan
            was made from another model.
        InputError: the model, the text or the target is not usable, see `coterie.profile` and `coterie.plan`.
        Infeasible: no result can be that small, the model cannot have what a plan says, or `max_memory` is too little.
        OutOfSpace: the disk cannot hold the result.
        ReloadMismatch: the result does not load as what was computed; nothing is left at `out`.
        HubError: the hub refuses, or the upload failed; then the result is at `out` all the same.
    """
    options = Options.of(
        model=model, out=out, keep=keep, experts=experts, width=width, budget=budget, params=params,
        active_params=active_params, bits=bits, type=type,
        multiple_of=multiple_of, target=target, experts_only=experts_only, running=running, plan=plan, recipe=recipe,
        effort=effort, train_tokens=train_tokens, router=router, profile=profile, text=text, weights=weights,
        tokens=tokens, seq_len=seq_len, seed=seed, sample_tokens=sample_tokens, device=device, inputs=inputs,
        output_dtype=output_dtype, max_memory=max_memory, allow_pickle=allow_pickle, cache=cache, prices=prices,
        mtp=mtp, on=on, search=search,
    )  # fmt: skip
    destination = find_destination(push_to_hub, private=private)
    clock = _Clock()
    with prepared(options) as job:
        clock.lap("plan")
        with waiting(job.times):
            result = _execute(job, clock)
    return result if destination is None else replace(result, url=upload_result(result.out, destination))


@contextmanager
def prepared(options: Options) -> Iterator[Job]:
    """Within the block, a compression can begin; a run that goes on has the threads that it began with."""
    check_device(options.device)
    record = begun(options.out) or {"header": {}, "notes": {}}
    what = f"the compression {options.out}"
    with as_begun(record["notes"].get("numerics"), options.device, what=what) as computed_with:
        yield prepare(options, recorded=record["header"], numerics=computed_with)


def _execute(job: Job, clock: _Clock) -> Result:
    """Do what was prepared."""
    options, measured, prices = job.options, _profile_for_others(job), _prices_for_others(job)
    notes = {"numerics": dict(job.numerics)}
    with (
        open_run(options.out, job.header(measured, prices), what="compression", notes=notes) as run,
        _worthless_on_error(run),
        job.stream,
    ):
        work = Work(
            job=job,
            run=run,
            shards=lay_out(
                job.source.checkpoint, job.stream.units, job.stream.conversion, packed_names(job.source, job.outline)
            ),
            profile=measured,
            plan=job.outline,
            measured_before=measured,
            prices=prices,
        )
        for name, step in STEPS:
            step(work)
            clock.lap(name)
        manifest = work.write_manifest(whole=True)
        work.write_card(manifest)
        peak = peak_bytes()
        took = {
            "seconds": clock.laps,
            "forecast_bytes": job.forecast.num_bytes,
            "peak_bytes": peak,
            "input_bytes_read": job.stream.bytes_read,
            "device": options.device,
        }
        write_json(run.folder / RUN_FILE, took)
        run.publish()
    log.info("memory: the peak was %s", format_bytes(peak))
    assert work.logits_error is not None
    return Result(
        out=options.out, plan=work.plan, manifest=manifest, logits_error=work.logits_error, seconds=clock.laps,
        forecast=job.forecast.num_bytes, peak_bytes=peak, input_bytes_read=job.stream.bytes_read,
    )  # fmt: skip


def _measure(work: Work) -> None:
    """Measure the original, layer by layer; with compressed inputs that is done while layers are compressed."""
    job = work.job
    if work.profile is None and job.options.inputs == "original":
        assert job.measure is not None
        profile_in_run(work.run, job.stream, job.source.architecture.layers, job.measure, private=True)
        work.profile = Profile.load(work.run.private)


def _decide(work: Work) -> None:
    """Make the plan: what each layer becomes, with the experts named wherever what was measured is enough."""
    job, profile = work.job, work.profile
    if job.request is not None and job.request.recipe.prices:
        prices = work.prices
        if prices is None:
            assert job.pricing is not None
            prices = job.pricing.in_run(work.run)
        work.plan = with_types(job.source, work.plan, job.request, prices)
        if job.search is not None:
            work.plan = job.search.in_run(work.run, work.plan, prices)
    if profile is None:
        return
    work.plan = completed(job.source, work.plan, job.request, profile)


def _compress_layers(work: Work) -> None:
    """Send every layer through the passes and write it."""
    measure = work.job.measure if work.profile is None else None
    lanes = Lanes(check_ids_BS=work.check_ids(), batches=() if measure is None else measure.batches())
    packer = None
    if work.plan.packed:
        assert measure is not None
        packer = Packer(
            stream=work.job.stream, source=work.job.source, plan=work.plan, counts=measure.batch_counts(),
        )  # fmt: skip
        lanes = packer.with_text(lanes)
    writer = LayerWriter(
        run=work.run,
        stream=work.job.stream,
        source=work.job.source,
        plan=work.plan,
        result=work.result,
        shards=work.shards,
        profile=work.profile,
        measure=measure,
        seconds=work.job.seconds,
        lanes=lanes,
        packer=packer,
    )
    work.logits_BSV = writer.write()
    work.summaries = writer.summaries
    executed = (
        LayerPlan.from_fields(Fields(dict(summary.plan), where="the journal"))
        for _, summary in sorted(writer.summaries.items())
    )
    work.plan = replace(work.plan, layers=tuple(executed))


def _write_rest(work: Work) -> None:
    """Copy what no layer wrote: shared files, and parts of the model that text does not pass; then the small files."""
    for shard in work.shards:
        if shard.file not in work.run.finished:
            # Experts of a prediction layer may lie in several files.
            rest, known = work.rest_of(shard), work.job.source.checkpoint.tensors
            write_shard(work.run.folder, shard, rest, known=known.keys() | rest.keys() if work.plan.integers else known)
            work.run.finish(shard.file, files=[shard.file])
    work.write_small_files()


def _finish(work: Work) -> None:
    """Do what is done to the whole result."""
    for name, options in work.plan.result_steps:
        prepared = work.job.result_steps[name]
        if prepared is not None and not isinstance(prepared, LeftOut):
            load_result_step(name).run(work, prepared, **options)
            work.write_small_files()


def _check(work: Work) -> None:
    """Load what was written, and compare it with what was computed."""
    assert work.logits_BSV is not None
    device = work.job.options.device
    with stage(CHECKING):
        work.logits_error = check_reload(work.run.folder, work.check_ids(), work.logits_BSV, device=device)
        if isinstance(work.job.stock, Stage):
            check_stock(work.run.folder, work.result, work.shards, work.check_ids()[:1, :2])


#: What a compression does, in order; the name is that of the stage whose seconds are counted.
STEPS: tuple[tuple[str, Callable[[Work], None]], ...] = (
    ("profile", _measure),
    ("decide", _decide),
    ("compress", _compress_layers),
    ("write", _write_rest),
    ("finish", _finish),
    ("check", _check),
)


def _profile_for_others(job: Job) -> Profile | None:
    """Return the profile that there is; one that a folder was named for is made first, by a run of its own."""
    if job.profile is not None or job.profile_folder is None:
        return job.profile
    assert job.measure is not None
    layers = job.source.architecture.layers
    return profile_in_folder(job.profile_folder, job.stream, layers, job.measure)


def _prices_for_others(job: Job) -> Prices | None:
    """Return the prices that there are; those that a folder was named for are measured first, by a run of its own."""
    folder = job.options.prices
    if job.prices is not None or job.pricing is None or folder is None:
        return job.prices
    assert not isinstance(folder, Prices)
    return job.pricing.in_folder(user_path(folder))


@dataclass(slots=True)
class _Clock:
    """Seconds spent in each stage."""

    laps: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


@contextmanager
def _worthless_on_error(run: Run) -> Iterator[None]:
    """Keep what was finished when the disk is full or somebody stops the run; a result that is wrong is dropped."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:  # from whichever file met it; the user knows the target
            raise OutOfSpace(
                errno.ENOSPC,
                f"the disk filled up while {run.target} was made; the {len(run.finished)} finished steps are kept: "
                "free some space and give the same command again",
            ) from error
        raise
    except CoterieError:
        run.discard()
        raise
