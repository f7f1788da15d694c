"""Run text through a model once and keep what its experts did: checkpoint + tokens -> Profile.

Legend: E experts, D model width, T tokens, K chosen experts, G domains.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.amounts import format_bytes, parse_bytes
from coterie.errors import ArchitectureMismatch, InputError
from coterie.journal import Run, open_run
from coterie.journal_lines import begun
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.device import check_device
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.disk.open import open_checkpoint
from coterie.model.numerics import as_begun, numerics
from coterie.model.stream.loss import logits_bytes
from coterie.model.stream.memory import (
    LOGITS,
    STATISTICS,
    Forecast,
    Stage,
    batch_lines,
    fitting_batch,
    head_lines,
    peak_bytes,
    sample_lines,
    text_lines,
    unit_lines,
)
from coterie.model.stream.stream import Call, Stream
from coterie.model.stream.work import FORWARD, WITH_GRADIENTS, UnitWork, unit_work
from coterie.outputs import check_output, is_empty_folder
from coterie.paths import user_path
from coterie.profile.calibration import TokenSet
from coterie.profile.collect import Collector, statistics_bytes
from coterie.profile.data_sets import local_place
from coterie.profile.observation import observed, prove_layers, proving, with_residual
from coterie.profile.profile import FILE, Profile, Sample, write_layer
from coterie.profile.sources import On
from coterie.profile.statistics import fields_of, needs_gradients, wanted_statistics
from coterie.profile.text import CalibrationText, TextSettings, UnwrittenText
from coterie.progress import StageTime, track, waiting

log = logging.getLogger(__name__)

#: What is waited for, as the stage of a run is called.
MEASURING = "measuring"

#: Tokens, of the whole text, that statistics of all experts on all tokens are estimated from.
THIN_TOKENS = 4_096


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
    check_output(folder, kind="profile", accepts=is_empty_folder, folder=True)
    if is_empty_folder(folder):
        folder.rmdir()
    document = begun(folder)
    notes = None if document is None else document["notes"].get("numerics")
    with (
        as_begun(notes, str(stream.device), what=f"the profile {folder}") as computed_with,
        open_run(folder, measure.header(stream), what="profile", notes={"numerics": computed_with}) as run,
        stream,
    ):
        profile_in_run(run, stream, layers, measure, private=False)
        run.publish()
    return Profile.load(folder)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileSettings:
    """What of a text is measured; see `profile`."""

    sample_tokens: int = 8_192
    batch_size: int = 8
    statistics: tuple[str, ...] = field(default_factory=wanted_statistics)
    thin: int | None = None

    def measure(self, checkpoint: Checkpoint, architecture: Architecture, text: CalibrationText) -> Measure:
        """Draw the text.

        Args:
            checkpoint: the model.
            architecture: what it computes.
            text: the text.

        Raises:
            InputError: nothing to measure, or a mapped checkpoint.
            UnknownName: no such statistic.
            TextError: no text, empty text, or text shorter than a sequence.
        """
        if self.thin is not None and self.thin < 1:
            raise InputError(f"every {self.thin}-th token cannot be taken; give a thin of 1 or more")
        tokens = text.settings.tokens
        if tokens < 1 or self.sample_tokens < 1:
            raise InputError(
                f"nothing can be measured on {tokens} tokens with a sample of {self.sample_tokens}; ask for more"
            )
        manifest = Manifest.read(checkpoint.path)
        if manifest is not None and manifest.form is ResultForm.MAPPED:
            raise InputError(f"{checkpoint.path} is a mapped result; profile the model that it was made from")
        token_set = text.draw()
        if needs_gradients(self.statistics):
            check_predicts(architecture)
        hidden_size = architecture.layers[0].hidden_size
        size = fitting_batch(self.batch_size, seq_len=text.settings.seq_len, hidden_size=hidden_size)
        return Measure(
            token_set=token_set, seed=text.settings.seed, sample_tokens=self.sample_tokens, batch_size=size,
            statistics=wanted_statistics(self.statistics), thin=self.thin or usual_thin(token_set),
            device=text.device,
        )  # fmt: skip


def profile_model(
    model: PreTrainedModel,
    layers: tuple[MoELayer, ...],
    token_set: TokenSet,
    *,
    model_digest: str,
    seed: int = 0,
    sample_tokens: int = 8_192,
    batch_size: int = 8,
    statistics: Collection[str] | None = None,
    thin: int | None = None,
) -> Profile:
    """Measure a model that is in memory as a whole, in a forward pass; see `profile`."""
    measure = Measure(
        token_set=token_set, seed=seed, sample_tokens=sample_tokens, batch_size=batch_size,
        statistics=wanted_statistics(statistics), thin=thin or usual_thin(token_set),
    )  # fmt: skip
    device = next(model.parameters()).device
    prove_layers(model, layers, next(token_set.batches(1))[1].to(device))
    collectors = [measure.collector() for _ in layers]
    batches = list(token_set.batches(batch_size))
    rows = list(zip(batches, measure.batch_counts(), strict=True))
    for (domain, ids), counts_T in track(rows, MEASURING, total=len(batches)):
        watching = observed(model, layers, thin=measure.thin, fields=measure.fields, counts_T=counts_T)
        with watching as observations, torch.no_grad():
            model.base_model(input_ids=ids.to(device), use_cache=False)
        for collector, observation in zip(collectors, observations, strict=True):
            collector.add(domain, observation, counts_T=counts_T)
    return measure.profile(
        model_digest, layers, [each.statistics for each in collectors], [each.sample() for each in collectors]
    )


def usual_thin(token_set: TokenSet) -> int:
    """Return the `Observation.thin` that takes about `THIN_TOKENS` tokens of a text."""
    return max(1, sum(token_set.num_counted.values()) // THIN_TOKENS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """What is measured on which tokens.

    Attributes:
        token_set: the tokens.
        seed: seed of the draw of the token sample.
        sample_tokens: tokens of each layer's sample.
        batch_size: sequences in a batch.
        statistics: names of the statistics, see `wanted_statistics`.
        thin: see `Observation.thin`.
        device: where it is measured.
    """

    token_set: TokenSet
    seed: int
    sample_tokens: int
    batch_size: int
    statistics: tuple[str, ...] = field(default_factory=wanted_statistics)
    thin: int = 1
    device: str = "cpu"

    @property
    def gradients(self) -> bool:
        """Whether the gradient of the loss is sent back through the model, for the statistics that need it."""
        return needs_gradients(self.statistics)

    @property
    def fields(self) -> frozenset[str]:
        """Fields of an `Observation` that the statistics are made from and that cost something."""
        return fields_of(self.statistics)

    def batches(self) -> list[tuple[int, Tensor]]:
        """Return the batches: index of the domain, token ids (B, S)."""
        return list(self.token_set.batches(self.batch_size))

    def batch_counts(self) -> list[Tensor | None]:
        """Return for each batch which of its tokens count (T,), bool; None where all do."""
        each = self.token_set.batch_counts(self.batch_size)
        return [None if counts_BS is None else counts_BS.flatten() for counts_BS in each]

    def header(self, stream: Stream) -> dict[str, Any]:
        """Return all that decides what will be measured, for the header of a run."""
        return {
            "model": stream.checkpoint.digest,
            "model files": stream.checkpoint.file_stamps(),
            "text": self.token_set.digest,
            "on": self.token_set.on,
            "weights": self.token_set.weights,
            "seed": self.seed,
            "sample_tokens": self.sample_tokens,
            "batch_size": self.batch_size,
            "statistics": list(self.statistics),
            "thin": self.thin,
            "dtype": str(stream.dtype).removeprefix("torch."),
            "device": stream.device.type,
        }

    def forecast(self, stream: Stream, layers: tuple[MoELayer, ...]) -> Forecast:
        """Say how much memory measuring takes at most."""
        total, seq_len = sum(self.token_set.num_tokens.values()), self.token_set.seq_len
        text = text_lines(total)
        sums = max(statistics_bytes(layer, self.statistics, len(self.token_set.domains)) for layer in layers)
        batch = batch_lines(
            stream, layers, batch_size=self.batch_size, seq_len=seq_len, tokens=total, gradients=self.gradients
        )
        sample = sample_lines(layers, min(self.sample_tokens, total))
        lines = (*unit_lines(stream, batch), *sample, (STATISTICS, sums), *text)
        stages = [Stage(name="measuring a layer", lines=lines)]
        if self.gradients:
            vocab_size = int(stream.model.config.get_text_config().vocab_size)
            size = logits_bytes(batch_size=self.batch_size, seq_len=seq_len, vocab_size=vocab_size)
            lines = (*head_lines(stream), (LOGITS, size), *text)
            stages.append(Stage(name="the loss and its gradient", lines=lines))
        return Forecast(stages=tuple(stages))

    def work(self, stream: Stream, layers: Sequence[MoELayer]) -> UnitWork:
        """Reckon how long each unit takes."""
        factor = WITH_GRADIENTS if self.gradients else FORWARD
        tokens = sum(self.token_set.num_tokens.values())
        return unit_work(stream, layers, tokens=tokens, factor=factor, base=True)

    def time(self, stream: Stream, layers: Sequence[MoELayer]) -> StageTime:
        """Reckon how long measuring takes."""
        tokens = sum(self.token_set.num_tokens.values())
        work = self.work(stream, layers)
        return StageTime(name=MEASURING, seconds=work.total, tokens=tokens, reading=work.reading)

    def collector(self) -> Collector:
        """Return a collector for one layer."""
        return Collector(self.token_set, self.statistics, seed=self.seed, sample_tokens=self.sample_tokens)

    def stream(
        self, stream: Stream, layers: tuple[MoELayer, ...], *, skip: Collection[int] = ()
    ) -> Iterator[tuple[int, Mapping[str, Tensor], Sample]]:
        """Run the tokens through an open stream; yield each layer's index, statistics and sample as it is measured.

        With gradients that is in the backward pass, so the last layer comes first.

        Args:
            stream: the model.
            layers: its MoE layers.
            skip: indices of layers that are run but not measured.
        """
        domains, batches = zip(*self.batches(), strict=True)
        counts = self.batch_counts()
        jobs = [
            stream.loss_job(ids_BS, None if counts_T is None else counts_T.view_as(ids_BS))
            if self.gradients
            else stream.base_job(ids_BS)
            for ids_BS, counts_T in zip(batches, counts, strict=True)
        ]
        left = {layer.index for layer in layers} - set(skip)
        work = self.work(stream, layers)
        run = stream.run(jobs, gradients=self.gradients)
        for stage in track(run, MEASURING, work.total, weight=work.of, largest=work.largest / work.factor):
            here = tuple(layer for layer in layers if stage.unit.holds(layer.experts))
            if not here:
                continue
            new = {layer.index for layer in here} & left
            if new and not stage.backward:
                with proving(stream.model, here):
                    stage.calls[0].compute()
            measuring = stage.backward == self.gradients
            collectors = {index: self.collector() for index in sorted(new) if measuring}
            for call in stage.calls:
                self.measure_call(stream, call, here, stage.backward, domains[call.job], counts[call.job], collectors)
            for index, collector in collectors.items():
                yield index, collector.statistics, collector.sample()
            left -= collectors.keys()
            if not left:
                return
        if left:
            raise ArchitectureMismatch(f"text ran through the model without passing its MoE layers {sorted(left)}")

    def measure_call(
        self,
        stream: Stream,
        call: Call,
        layers: tuple[MoELayer, ...],
        backward: bool,
        domain: int,
        counts_T: Tensor | None,
        collectors: Mapping[int, Collector],
    ) -> None:
        """Compute one call of a unit, and measure the layers that have a collector.

        A function of its own: what is observed holds the unit's weights, which must be gone when the next one is read.
        """
        # Layers that are not measured are observed too: they must hand on the same numbers as those that are.
        gradients: dict[int, Tensor] = {}
        outputs: list[Any] = []
        watched = self.fields if backward == self.gradients else ()
        watching = observed(
            stream.model, layers, thin=self.thin, gradients=gradients, fields=watched, counts_T=counts_T
        )
        with watching as observations:
            answer = call.compute(watch=outputs.append)
        output = outputs[0] if backward else answer
        for observation in observations:
            if (index := observation.layer.index) in collectors:
                seen = replace(with_residual(observation, output), gradient_TD=gradients.get(index))
                collectors[index].add(domain, seen, counts_T=counts_T)
        call.finish(answer)

    def profile(
        self,
        model_digest: str,
        layers: tuple[MoELayer, ...],
        statistics: Sequence[Mapping[str, Tensor]],
        samples: Sequence[Sample],
    ) -> Profile:
        """Put a profile together."""
        num_tokens = self.token_set.num_counted
        return Profile(
            model_digest=model_digest,
            text_digest=self.token_set.digest,
            domains=self.token_set.domains,
            num_tokens=tuple(num_tokens[domain] for domain in self.token_set.domains),
            seq_len=self.token_set.seq_len,
            seed=self.seed,
            layers=layers,
            sample_counts=tuple(self.token_set.share_out(self.sample_tokens)),
            thin=self.thin,
            asked=self.statistics,
            on=self.token_set.on,
            numerics=numerics(self.device),
            statistics=statistics,
            samples=samples,
        )


def check_predicts(architecture: Architecture) -> None:
    """Raise ArchitectureMismatch for a model that predicts no next token, so that there is no loss to send back."""
    model: Any = architecture.model
    if model.get_output_embeddings() is None:
        raise ArchitectureMismatch(
            f"{type(model).__name__} predicts no next token, so the gradient of that loss cannot be measured; leave "
            "--gradients out, and use a recipe that needs none, such as easy-slim"
        )
