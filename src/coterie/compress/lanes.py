"""Lanes: the batches that go through the layers while these are compressed, told apart by what they are for.

The check's random tokens go through compressed layers, so that at the end the logits of the result are known. With
compressed inputs every batch of calibration text goes through twice: in one lane through original layers, which gives
the output that a layer should have; in the other through the compressed ones, which gives what the next layer really
receives.
"""

from __future__ import annotations

import functools
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
        see_last: told what the base model returns for each batch in the compressed lane: (its number, (B, S, D)).
        compares: whether the text goes through original layers as well.
    """

    check_ids_BS: Tensor
    batches: Sequence[tuple[int, Tensor]]
    see_last: Callable[[int, Tensor], None] | None = None
    compares: bool = True

    def places(self) -> list[tuple[Lane, int]]:
        """Return the lane and the number in it of every job, in the order of `jobs`."""
        lanes = (Lane.COMPRESSED, Lane.ORIGINAL) if self.compares else (Lane.COMPRESSED,)
        return [(Lane.CHECK, 0), *((lane, number) for lane in lanes for number in range(len(self.batches)))]

    def jobs(self, stream: Stream) -> list[Callable[[], Any]]:
        """Return what a stream is to run."""
        return [self._job(stream, lane, number) for lane, number in self.places()]

    def _job(self, stream: Stream, lane: Lane, number: int) -> Callable[[], Any]:
        if lane is Lane.CHECK:
            return stream.logits_job(self.check_ids_BS)
        ids_BS = self.batches[number][1]
        if lane is Lane.ORIGINAL or self.see_last is None:
            return stream.base_job(ids_BS)
        return stream.base_job(ids_BS, functools.partial(self.see_last, number))

    def logits(self, results: Sequence[Any]) -> Tensor:
        """Return the logits (B, S, V) of the check from what the jobs returned."""
        logits_BSV: Tensor = results[self.places().index((Lane.CHECK, 0))]
        return logits_BSV

    def calls(self, stage: Stage) -> Mapping[tuple[Lane, int], Call]:
        """Return the calls of a stage by lane and number."""
        places = self.places()
        return {places[call.job]: call for call in stage.calls}
