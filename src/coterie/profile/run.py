"""Run text through a model once and keep what its experts did: checkpoint + tokens -> Profile, in a folder."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coterie.amounts import format_bytes, parse_bytes
from coterie.journal import Run, open_run
from coterie.journal_lines import begun
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.device import check_device
from coterie.model.disk.open import open_checkpoint
from coterie.model.numerics import as_begun
from coterie.model.stream.memory import Forecast, peak_bytes
from coterie.model.stream.stream import Stream
from coterie.outputs import check_output, is_empty_folder
from coterie.paths import user_path
from coterie.profile.data_sets import local_place
from coterie.profile.measure import Measure, ProfileSettings
from coterie.profile.profile import FILE, Profile, write_layer
from coterie.profile.sources import On
from coterie.profile.statistics import wanted_statistics
from coterie.profile.text import CalibrationText, TextSettings, UnwrittenText
from coterie.progress import StageTime, waiting

log = logging.getLogger(__name__)


def profile(
    model: str | Path,
    out: str | Path | None = None,
    *,
    text: str | Path,
    tokens: int = 131_072,
    seq_len: int = 512,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    sample_tokens: int = 8_192,
    domains: tuple[str, ...] | None = None,
    weights: Mapping[str, float] | None = None,
    batch_size: int = 8,
    statistics: Collection[str] | None = None,
    gradients: bool = False,
    thin: int | None = None,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    on: On = "all",
) -> Profile:
    """Measure what the experts of a model do on text, one decoder layer in memory at a time.

    A run with `out` that was ended early goes on from the last finished layer when it is called again in the same way.

    Args:
        model: a model folder or hub id.
        out: folder for the profile; when None the profile is held in memory.
        text: folder with one text file a domain, see `coterie.profile.documents`; ``hf:`` and the name of a data set,
            see `coterie.profile.data_sets`; "self" for text that the model writes itself, for which it is loaded as a
            whole, see `coterie.profile.self_text`.
        tokens: tokens in all, shared by the domains, whether they count or not.
        seq_len: tokens in a sequence.
        seed: seed of the draw of text and of the token sample.
        device: where the layers are computed.
        dtype: number format that layers are computed in; see `coterie.model.stream.stream.working_dtype`.
        sample_tokens: tokens of the sample of each layer, shared by the domains.
        domains: only these domains.
        weights: share of the tokens by domain, in any unit, and of the sample; domains that are not named get nothing.
            Equal shares when None.
        batch_size: sequences in a batch at most; the result does not depend on it beyond rounding.
        statistics: names of what is measured, see `coterie.profile.statistics`; None for all that a recipe or the
            report reads and a forward pass shows.
        gradients: also measure what a recipe reads and only the gradient of the loss shows; takes three to four times
            as long, and is done in any case where `statistics` names such a value.
        thin: statistics of all experts on all tokens are estimated from every so many-th token; None for about
            `THIN_TOKENS` tokens of the text. Parts of a text whose profiles are to be added take that of the whole.
        max_memory: bytes, or an amount like "8GiB", that the run may take.
        allow_pickle: read weights that are stored as pickles.
        on: which tokens count: "all", or those of answers in conversations and of completions, "assistant". A token
            counts in statistics and samples where it is read, and in the loss of gradients where it is predicted.

    Raises:
        OutputExists: `out` is taken.
        InputError: `out` is inside the model or the text.
        OutputBusy: another run writes to `out`.
        StaleArtifact: an earlier run to `out` that was ended early had other settings or another input.
        Infeasible: `max_memory` is too little.
        TextError: no text, empty text, or text shorter than a sequence.
        UnknownName: no such statistic.
        NotACheckpoint, NotAMoE, CorruptCheckpoint: the model cannot be used.
        ArchitectureMismatch: a layer does not compute what its canonical experts compute.
    """
    prepared = prepare(
        model, out, text=text, tokens=tokens, seq_len=seq_len, seed=seed, device=device, dtype=dtype,
        sample_tokens=sample_tokens, domains=domains, weights=weights, batch_size=batch_size, statistics=statistics,
        gradients=gradients, thin=thin, max_memory=max_memory, allow_pickle=allow_pickle, on=on,
    )  # fmt: skip
    with waiting([prepared.time]):
        return _run(prepared)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A measurement that can begin.

    Attributes:
        target: folder of the profile, or None.
        stream: the model, not open.
        layers: its MoE layers.
        measure: what is measured.
        forecast: the memory that it takes.
        limit: bytes of memory that it may take, or None.
    """

    target: Path | None
    stream: Stream
    layers: tuple[MoELayer, ...]
    measure: Measure
    forecast: Forecast
    limit: int | None

    @property
    def time(self) -> StageTime:
        """How long it is reckoned to take."""
        return self.measure.time(self.stream, self.layers)


def prepare(
    model: str | Path,
    out: str | Path | None,
    *,
    text: str | Path,
    tokens: int,
    seq_len: int,
    seed: int,
    device: str,
    dtype: torch.dtype | None,
    sample_tokens: int,
    domains: tuple[str, ...] | None,
    weights: Mapping[str, float] | None,
    batch_size: int,
    statistics: Collection[str] | None,
    gradients: bool,
    thin: int | None,
    max_memory: int | str | None,
    allow_pickle: bool,
    on: On,
    dry: bool = False,
) -> Prepared:
    """Open the model, check all that is asked for, and announce what it takes; see `profile`.

    `dry` for a run that is only to be foretold.
    """
    check_device(device)
    target = None if out is None else user_path(out)
    if target is not None:
        reads = {"model folder": [model], "text folder": [local_place(text)]}
        check_output(target, kind="profile", reads=reads, accepts=is_empty_folder, folder=True)
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    architecture = Architecture.of(checkpoint)
    limit = None if max_memory is None else parse_bytes(max_memory)
    scratch = None if target is None else target.parent
    text_settings = TextSettings(
        source=text, tokens=tokens, seq_len=seq_len, seed=seed, domains=domains, weights=weights, on=on
    )
    settings = ProfileSettings(
        sample_tokens=sample_tokens, batch_size=batch_size, thin=thin,
        statistics=wanted_statistics(statistics, gradients=gradients),
    )  # fmt: skip
    kind = UnwrittenText if dry and text_settings.own else CalibrationText
    calibration_text = kind(checkpoint, text_settings, device=device, limit=limit, scratch=scratch)
    measure = settings.measure(checkpoint, architecture, calibration_text)
    stream = Stream(checkpoint, device=device, dtype=dtype, scratch=scratch)
    forecast = measure.forecast(stream, architecture.layers)
    forecast.check(limit)
    return Prepared(
        target=target, stream=stream, layers=architecture.layers, measure=measure, forecast=forecast, limit=limit
    )


def _run(prepared: Prepared) -> Profile:
    target, stream, layers, measure = prepared.target, prepared.stream, prepared.layers, prepared.measure
    if target is None:
        with stream:
            measured = {layer: entry for layer, *entry in measure.stream(stream, layers)}
        statistics, samples = zip(*(measured[layer.index] for layer in layers), strict=True)
        return measure.profile(stream.checkpoint.digest, layers, statistics, samples)
    written = profile_in_folder(target, stream, layers, measure)
    log.info("memory: the peak was %s", format_bytes(peak_bytes()))
    return written


def profile_in_folder(folder: Path, stream: Stream, layers: tuple[MoELayer, ...], measure: Measure) -> Profile:
    """Measure a model into a folder of its own, in a run that goes on where it was killed.

    Args:
        folder: where the profile will be; not there, or empty.
        stream: the model, not open.
        layers: its MoE layers.
        measure: what is measured.

    Raises:
        OutputExists: the folder is taken.
    """
    with measuring_run(folder, stream, measure.header(stream), kind="profile") as run:
        profile_in_run(run, stream, layers, measure, private=False)
        run.publish()
    return Profile.load(folder)


@contextmanager
def measuring_run(folder: Path, stream: Stream, header: Mapping[str, Any], *, kind: str) -> Iterator[Run]:
    """Yield the run that makes a folder of what is measured of a model: a new one, or the one that was killed.

    Within the block the stream is open, and what is computed with is what the run began with.

    Args:
        folder: where it will be; not there, or empty.
        stream: the model, not open.
        header: all that decides what is measured.
        kind: what it is, such as "profile".

    Raises:
        OutputExists: the folder is taken.
    """
    check_output(folder, kind=kind, accepts=is_empty_folder, folder=True)
    if is_empty_folder(folder):
        folder.rmdir()
    document = begun(folder)
    notes = None if document is None else document["notes"].get("numerics")
    with (
        as_begun(notes, str(stream.device), what=f"the {kind} {folder}") as computed_with,
        open_run(folder, header, what=kind, notes={"numerics": computed_with}) as run,
        stream,
    ):
        yield run


def profile_in_run(run: Run, stream: Stream, layers: tuple[MoELayer, ...], measure: Measure, *, private: bool) -> None:
    """Measure layer by layer, each a step of a run; layers that the run has finished are not measured again.

    Args:
        run: where the profile's files go.
        stream: the model, open.
        layers: its MoE layers.
        measure: what is measured.
        private: whether the files go into the run's private folder instead of its result.
    """
    folder = run.private if private else run.folder
    kind = "private" if private else "files"
    done = {layer.index for layer in layers if _step(layer.index) in run.finished}
    for index, statistics, sample in measure.stream(stream, layers, skip=done):
        names = [write_layer(folder, index, statistics, sample)]
        run.finish(_step(index), files=() if private else names, private=names if private else ())
        del statistics, sample
    if "profile" not in run.finished:
        steps = [run.finished[_step(layer.index)] for layer in layers]
        digests = {name: digest for step in steps for name, digest in getattr(step, kind).items()}
        measure.profile(stream.checkpoint.digest, layers, (), ()).commit(folder, digests)
        run.finish("profile", files=() if private else [FILE], private=[FILE] if private else ())


def _step(index: int) -> str:
    return f"profile of layer {index}"
