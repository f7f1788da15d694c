"""Lanes: the batches that go through the layers while these are compressed, told apart by what they are for.

The check's random tokens go through compressed layers, so that at the end the logits of the result are known. With
compressed inputs every batch of calibration text goes through twice: in one lane through original layers, which gives
the output that a layer should have; in the other through the compressed ones, which gives what the next layer really
receives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from coterie.model.stream.stream import Call, Stage, Stream


class Lane(StrEnum):
    """What a batch is for."""

    CHECK = "check"
    COMPRESSED = "compressed"
    ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lanes:
    """Who goes through the layers.

    Attributes:
        check_ids_BS: tokens whose logits are wanted.
        batches: calibration text that is measured on the way, as (index of the domain, token ids (B, S)).
    """

    check_ids_BS: Tensor
    batches: Sequence[tuple[int, Tensor]]

    def places(self) -> list[tuple[Lane, int]]:
        """Return the lane and the number in it of every job, in the order of `jobs`."""
        numbers = range(len(self.batches))
        return [(Lane.CHECK, 0), *((Lane.COMPRESSED, n) for n in numbers), *((Lane.ORIGINAL, n) for n in numbers)]

    def jobs(self, stream: Stream) -> list[Callable[[], Any]]:
        """Return what a stream is to run."""
        ids_of = {Lane.COMPRESSED: self.batches, Lane.ORIGINAL: self.batches}
        return [
            stream.logits_job(self.check_ids_BS) if lane is Lane.CHECK else stream.base_job(ids_of[lane][number][1])
            for lane, number in self.places()
        ]

    def logits(self, results: Sequence[Any]) -> Tensor:
        """Return the logits (B, S, V) of the check from what the jobs returned."""
        logits_BSV: Tensor = results[self.places().index((Lane.CHECK, 0))]
        return logits_BSV

    def calls(self, stage: Stage) -> Mapping[tuple[Lane, int], Call]:
        """Return the calls of a stage by lane and number."""
        places = self.places()
        return {places[call.job]: call for call in stage.calls}
