"""How far models in given types are from the original: all of them in one pass over the layers.

Matrices are rounded to the nearest numbers of their types, columns weighing what comes into them; there is no error
feedback. Each model has hidden states of its own, in files where they are large; the layers come by once for all, and
models that agree in all types so far are computed once. What is compared are predictions over the whole vocabulary.

Legend: N sequences, B sequences of a batch, S tokens of a sequence, P positions, V vocabulary, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coterie.compress.search.bank import Bank
from coterie.compress.search.evolve import PASSES
from coterie.compress.search.filling import Filling
from coterie.compress.search.importance import Importance
from coterie.compress.search.levels import Types
from coterie.compress.source import Source
from coterie.compress.weights import Weight, weights_among
from coterie.model.nested import mapped
from coterie.model.stream.likelihood import counted, row_slices, token_kl
from coterie.model.stream.reading import base_output, logits_at, predictions
from coterie.model.stream.stream import Stage, Stream
from coterie.progress import within

#: Sequences of a batch.
BATCH = 8


@dataclass(kw_only=True)
class Divergences:
    """Compares models in some types with the original.

    Attributes:
        stream: the original, open.
        source: the same by its headers.
        weights: the matrices that have types.
        ids_NS: the text.
        counts_NS: which of its tokens count, bool; None where all do.
        bank: the matrices as they were rounded so far.
    """

    stream: Stream
    source: Source
    weights: Sequence[Weight]
    ids_NS: Tensor
    counts_NS: Tensor | None
    bank: Bank
    _importance: Importance = field(default_factory=Importance, init=False)
    _hidden: list[Tensor] = field(default_factory=list, init=False)
    _parts: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False)
    _output: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._of_unit = {unit.name: weights_among(self.weights, unit.disk_names) for unit in self.stream.units}

    def read_original(self) -> None:
        """Send all text through the original: what it predicts, and what comes into its matrices."""
        batches = _batches(range(len(self.ids_NS)))
        jobs = [functools.partial(base_output, self.stream.model, self.ids_NS[batch]) for batch in batches]
        counts = [None if self.counts_NS is None else self.counts_NS[batch] for batch in batches]
        run = self.stream.run(jobs)
        for stage in run:
            self._importance.watch(self.stream, self.source, stage, self._of_unit[stage.unit.name], counts)
        outside = {name for unit in self.stream.outside() for name in unit.disk_names}
        heads = [weight for weight in weights_among(self.weights, outside) if weight.kind == "linear"]
        for output, counts_BS in zip(run.results, counts, strict=True):
            self._hidden.extend(output.last_hidden_state)
            for weight in heads:
                name = self.stream.conversion.memory_names[weight.names[0]]
                hidden_TD = output.last_hidden_state.flatten(0, 1)
                self._importance.add_linear(name, hidden_TD, None if counts_BS is None else counts_BS.flatten())
        self._output = type(run.results[0])
        self.stream.release()

    def of(self, candidates: Sequence[Types], rows: Sequence[int]) -> list[float]:
        """Return the mean of KL(original || model) over all tokens that are predicted and count, nats a token.

        Args:
            candidates: the types of each model's matrices, by pattern.
            rows: numbers of the sequences.
        """
        batches = _batches(rows)
        places = [(number, batch) for number in range(len(candidates)) for batch in range(len(batches))]
        jobs = [functools.partial(base_output, self.stream.model, self.ids_NS[batches[batch]]) for _, batch in places]
        passed: list[tuple[str, ...]] = [()] * len(candidates)
        run = self.stream.run(jobs)
        for stage in run:
            with within(1 / (PASSES * len(self.stream.units))):
                self._pass(stage, candidates, places, passed)
        divergences = self._compare(candidates, batches, dict(zip(places, run.results, strict=True)))
        self.stream.release()
        return divergences

    @torch.no_grad()
    def _pass(
        self,
        stage: Stage,
        candidates: Sequence[Types],
        places: Sequence[tuple[int, int]],
        passed: list[tuple[str, ...]],
    ) -> None:
        """Compute a unit for all models: those of one choice of its types after those of another.

        Args:
            stage: the unit, with the weights of the original.
            candidates: the types of each model.
            places: of each job, the number of the model and of its batch.
            passed: by model, the types of all that it passed before; this unit's are added.
        """
        weights = self._of_unit[stage.unit.name]
        here = sorted({places[call.job][0] for call in stage.calls})
        groups: dict[tuple[str, ...], list[int]] = {}
        for number in here:
            kinds = tuple(candidates[number][weight.pattern] for weight in weights)
            passed[number] += kinds
            groups.setdefault(kinds, []).append(number)
        filling = self._filling(stage.unit.names, weights, stage.conversions)
        filling.round(groups)
        for kinds, members in groups.items():
            filling.put(kinds)
            outputs: dict[tuple[Any, int], Any] = {}
            for call in stage.calls:
                number, batch = places[call.job]
                if number not in members:
                    continue
                key = passed[number], batch
                alike = [other for other in members if passed[other] == passed[number]]
                if key not in outputs:
                    outputs[key] = call.compute()
                # A model may write into what it received: nobody else's.
                call.finish(outputs[key] if number == alike[-1] else mapped(outputs[key], Tensor.clone))
                if number == alike[-1]:
                    del outputs[key]

    @torch.no_grad()
    def _compare(
        self,
        candidates: Sequence[Types],
        batches: Sequence[Sequence[int]],
        outputs: Mapping[tuple[int, int], Any],
    ) -> list[float]:
        """Return the mean divergences, from what the base models returned by model and batch."""
        vocab_size = int(self.stream.model.config.get_text_config().vocab_size)
        sums, counts = [0.0] * len(candidates), [0] * len(candidates)
        with self.stream.head() as head:
            outside = self.stream.outside()
            weights = weights_among(self.weights, {name for unit in outside for name in unit.disk_names})
            filling = self._filling([name for unit in outside for name in unit.names], weights, [])
            groups: dict[tuple[str, ...], list[int]] = {}
            for number, types in enumerate(candidates):
                groups.setdefault(tuple(types[weight.pattern] for weight in weights), []).append(number)
            filling.round(groups, keep=True)
            for kinds, members in groups.items():
                for batch, rows in enumerate(batches):
                    ids_BS, counts_BS = self.ids_NS[rows], None if self.counts_NS is None else self.counts_NS[rows]
                    original = self._output(last_hidden_state=torch.stack([self._hidden[row] for row in rows]))
                    for positions, _ in predictions(ids_BS, vocab_size):
                        filling.put_back()
                        base_BPV = logits_at(head, ids_BS, original, positions)
                        filling.put(kinds)
                        for number in members:
                            logits_BPV = logits_at(head, ids_BS, outputs[number, batch], positions)
                            value_T = counted(divergence(base_BPV, logits_BPV), counts_BS, positions)
                            sums[number] += float(value_T.double().sum())
                            counts[number] += len(value_T)
        return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]

    def _filling(self, names: Sequence[str], weights: Sequence[Weight], conversions: list[Any]) -> Filling:
        return Filling(
            stream=self.stream, source=self.source, importance=self._importance, bank=self.bank, names=names,
            weights=weights, conversions=conversions, parts=self._parts,
        )  # fmt: skip


def divergence(base_BPV: Tensor, logits_BPV: Tensor) -> Tensor:
    """Return KL(base || model) behind all positions but the last of each sequence, nats (T,), float32 or wider."""
    return torch.cat(
        [
            token_kl(base_PV[:-1][rows], logits_PV[:-1][rows])
            for base_PV, logits_PV in zip(base_BPV, logits_BPV, strict=True)
            for rows in row_slices(len(base_PV) - 1, base_PV.shape[-1])
        ]
    )


def _batches(rows: Sequence[int]) -> list[list[int]]:
    return [list(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
