"""What is measured on which tokens, and how: a model in memory, or one that goes by unit after unit.

Legend: E experts, D model width, T tokens, K chosen experts, G domains.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.errors import ArchitectureMismatch, InputError
from coterie.model.arch.layers import Architecture, MoELayer
from coterie.model.disk.checkpoint import Checkpoint
from coterie.model.disk.manifest import Manifest, ResultForm
from coterie.model.numerics import numerics
from coterie.model.stream.loss import logits_bytes
from coterie.model.stream.memory import (
    LOGITS,
    STATISTICS,
    Forecast,
    Stage,
    batch_lines,
    fitting_batch,
    head_lines,
    sample_lines,
    text_lines,
    unit_lines,
)
from coterie.model.stream.stream import Call, Stream
from coterie.model.stream.work import FORWARD, WITH_GRADIENTS, UnitWork, unit_work
from coterie.profile.calibration import TokenSet
from coterie.profile.collect import Collector, statistics_bytes
from coterie.profile.observation import observed, prove_layers, proving, with_residual
from coterie.profile.profile import Profile, Sample
from coterie.profile.statistics import fields_of, needs_gradients, wanted_statistics
from coterie.profile.text import CalibrationText
from coterie.progress import StageTime, track

#: What is waited for, as the stage of a run is called.
MEASURING = "measuring"

#: Tokens, of the whole text, that statistics of all experts on all tokens are estimated from.
THIN_TOKENS = 4_096


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
